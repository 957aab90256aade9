"""What an evaluation asks: rows with `prompt`, a text or messages, and if known `category`; and which are benign."""

import toy_world
from formats.row_files import DataError, Malformed
from formats.row_prompts import as_turns
from tools.prompts import Question, read_prompts, text_of


def read(args, tokenizer, reader=None):
    """PromptFile of --prompts.  Raises DataError with file:line at the first mistake."""
    file = read_prompts(args, tokenizer, question_of, reader)
    if not file.prompts:
        raise DataError(f'{args.prompts} has no prompts: it needs rows like {{"prompt": "...", "category": "..."}}')
    return file


def question_of(row, where):
    """The Question of a row (dict) at file:line, with its category.  Raises Malformed."""
    prompt, category = row.get("prompt"), row.get("category")
    is_text = isinstance(prompt, str) and prompt.strip()
    if not is_text and not isinstance(prompt, list):
        raise Malformed("there is no `prompt` that is a text or a list of messages with role and content")
    if not isinstance(category, str | None):
        raise Malformed("`category` is not a str")
    prompt = prompt if is_text else as_turns(prompt, "prompt")
    said = text_of(prompt) + (category or "")
    said.encode()  # half a surrogate is no text, which would show after hours of sampling
    fields = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
    return Question(prompt, fields | {"category": category or "no category"})


def rule_of(prompts):
    """Of prompts of a toy world what judges their responses, row -> {field: value}; else None."""
    if all(toy_world.judge(prompt.text, "").kind != "unknown" for prompt in prompts):
        return lambda row: toy_world.judge(row["prompt"], row["response"])._asdict()
    if not all(prompt.pictures for prompt in prompts):
        return None
    import toy_vision  # texts are of the other world

    try:
        things = [toy_vision.things_in(path) for (path,) in (prompt.pictures.sources for prompt in prompts)]
    except (ValueError, TypeError, DataError):  # several pictures, bytes, a file of somebody else
        return None

    def rule(row):
        verdict = toy_vision.judge(row["prompt"], things[row["prompt_index"]], row["response"])
        kind = "harm" if verdict.category == "harm" else "benign"
        seen = {"kind": kind, "helpful": verdict.right, "harmful": float(verdict.harmful), "refusal": verdict.refused}
        return seen | {"polite": None, "hallucinated": None if kind == "harm" else verdict.hallucinated}

    return rule


def what_is_known(prompts, args):
    """(rule_of the prompts, are_benign of them)."""
    rule = rule_of(prompts)
    return rule, are_benign(prompts, args, rule)


def with_pictures(samples, prompts):
    """Entries of report["samples"] with the pictures of their prompt, as data URIs, where it has some."""
    for sample in samples:
        first = next(iter(sample["rows"].values()))
        if pictures := prompts[first["prompt_index"]].pictures:
            sample["pictures"] = [pictures.reader.data_uri(source) for source in pictures.sources]
    return samples


def are_benign(prompts, args, rule):
    """Whether each prompt is benign; by the rule None.  Raises DataError for a category that no prompt has."""
    names = {prompt.fields["category"] for prompt in prompts}
    for name in args.benign_categories or ():
        if rule:
            raise DataError("--benign-categories has no effect here, where the toy world's rule knows what is benign")
        if name not in names:
            raise DataError(f"--benign-categories {name}: no prompt has it; there are {', '.join(sorted(names))}")
    if rule:
        return [None] * len(prompts)
    benign = args.benign_categories or [name for name in names if name.lower().startswith("benign")]
    return [prompt.fields["category"] in benign for prompt in prompts]
