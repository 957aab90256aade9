"""The shapes of preference rows: how a row of each becomes (prompt, chosen, rejected), strings or lists of messages."""

import math
import textwrap
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from formats.row_files import Malformed, Unusable
from formats.row_prompts import as_turns, common_prefix, is_within, parted, said


class Shape(NamedTuple):
    name: str
    fields: dict  # field -> the type it has in every row
    texts: Callable  # row, its lists as turns -> (prompt, chosen, rejected)
    without: tuple = ()  # fields no row may have: they would hold a prompt
    reads: tuple = ()  # fields that a row may have
    lists: tuple = ()  # fields that are lists of something else than messages
    example: str = ""  # a row, where its fields alone do not show one
    fits: Callable = lambda row: True  # what else a file's first row has


ANSWER = "\n\nAssistant:"  # of HH transcripts
ONE_TRANSCRIPT = "only one of chosen and rejected is a transcript"
ASKS, ANSWERS = '{"role": "user", "content": "…"}', '{"role": "assistant", "content": "…"}'


def strings(*names):
    return dict.fromkeys(names, str)


def chosen_and_rejected(row):
    """Two strings without a prompt: Anthropic HH transcripts, which part after the last "Assistant:", or a beginning
    that both share, cut back to whole words (a tokenizer's words begin with their blank, so the blank stays behind).
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if ANSWER in chosen and ANSWER in rejected:
        (prompt, _, chosen), (other, _, rejected) = chosen.rpartition(ANSWER), rejected.rpartition(ANSWER)
        if prompt != other:
            raise Unusable("the prompts of chosen and rejected differ")
        return prompt + ANSWER, chosen, rejected
    if ANSWER in chosen or ANSWER in rejected:  # the words of a user would be trained as a response
        raise Unusable(ONE_TRANSCRIPT)
    same = common_prefix(chosen, rejected)
    same = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same) + 1, 0)
    return chosen[:same], chosen[same:], rejected[same:]


def prompt_and_responses(prompt, chosen, rejected):
    """The Shape of strings in these fields.  The prompt comes off responses that both repeat it, unless it is short:
    an answer to "Hello" may begin with "Hello".
    """

    def texts(row):
        asked, responses = row[prompt], [row[chosen], row[rejected]]
        transcripts = [text for text in responses if text.lstrip().startswith("Human:") and ANSWER in text]
        if len(transcripts) == 1 and is_within(asked, transcripts[0].rpartition(ANSWER)[0]):
            raise Unusable(ONE_TRANSCRIPT)
        if len(transcripts) == 2:
            transcript = chosen_and_rejected({"chosen": responses[0], "rejected": responses[1]})
            if not is_within(asked, transcript[0]):
                raise Unusable("the prompts of chosen and rejected differ")
            return transcript
        again = asked.strip()
        if len(again) >= 30 and all(text.lstrip().startswith(again) for text in responses):
            blanks = asked[len(asked.rstrip()) :]  # behind the prompt: a response repeats them too
            responses = [text.lstrip()[len(again) :].removeprefix(blanks) for text in responses]
        return asked, *responses

    return Shape(f"{prompt}/{chosen}/{rejected}", strings(prompt, chosen, rejected), texts)


def message_lists(row):
    return parted(row.get("prompt"), row["chosen"], row["rejected"])


def asked_and_answers(asked, chosen, rejected, kind):
    """The Shape of messages in the field `asked` and two answers of one kind: lists of messages, a message or texts.

    ShareGPT and its kin.  Where the messages end in the chosen answer, it is taken off them.
    """

    def texts(row):
        answers = [row[name] for name in (chosen, rejected)]
        if kind is dict:
            answers = [as_turns([answer], name) for answer, name in zip(answers, (chosen, rejected), strict=True)]
        elif kind is str:
            answers = [[{"role": "assistant", "content": text}] for text in answers]
        turns = row[asked]
        if asked != "prompt" and turns[-1]["role"] == "assistant":
            if said(turns[-1:]) != said(answers[0][-1:]):
                raise Malformed(f"`{asked}` ends in an answer that is not `{chosen}`: end it in what is asked")
            turns = turns[:-1]
        return parted(turns, *answers)

    name = {list: "messages", dict: "as one message each", str: "as texts"}[kind]
    start = "prompt messages" if asked == "prompt" else asked
    return Shape(f"{start}, {chosen}/{rejected} {name}", {asked: list, chosen: kind, rejected: kind}, texts)


def openai_preference(row):
    """{"messages": [...]} as `input`, of OpenAI's preference fine-tuning."""
    asked = row["input"]
    others = [key for key, value in asked.items() if key not in ("messages", "parallel_tool_calls") and value]
    if others:
        raise Malformed(f"`input` has `{others[0]}`, which is not read there: give the row a column of that name")
    return parted(
        as_turns(asked.get("messages"), "input.messages"), row["preferred_output"], row["non_preferred_output"]
    )


def rejected_beside_messages(row, field):
    """ms-swift: `messages` end in the chosen answer; the rejected one is a text, or messages that begin the same."""
    *asked, chosen = row["messages"]
    if chosen["role"] != "assistant":
        raise Malformed("`messages` does not end in an answer of the assistant's, which would be the chosen one")
    if field == "rejected_messages":
        return parted(None, row["messages"], row[field])
    if not asked:
        raise Malformed("there is no prompt: `messages` is an answer alone")
    return asked, [chosen], [{"role": "assistant", "content": row[field]}]


def stack_exchange(row):
    return f"Question: {row['question']}\n\nAnswer: ", row["response_j"], row["response_k"]


def instruction(row, chosen="chosen", rejected="rejected"):
    if not isinstance(row.get("input"), str | None):
        raise Malformed("`input` is not a str")
    return "\n\n".join(filter(None, (row["instruction"], row.get("input")))) + "\n\n", row[chosen], row[rejected]


RATINGS = "ratings", "rating", "scores", "overall_score"  # lists beside the responses
SCORES = "overall_score", "overall-rating", "overall_rating", "rating", "score"  # in each of them
TEXTS = "response", "text", "completion", "content", "generation"


def best_and_worst(row, field):
    """Two texts of a row: of the responses in `field`, the one with the highest and the one with the lowest rating, the
    first of equals.  The ratings are a list beside them, or one in each: UltraFeedback, Argilla, distilabel.

    Raises Malformed, and Unusable where no two ratings differ; a response without a rating is not asked.
    """
    responses = row[field]
    column = next((name for name in RATINGS if isinstance(row.get(name), list)), None)
    if column:
        texts, ratings = responses, row[column]
        if len(texts) != len(ratings):
            raise Malformed(f"`{column}` has {len(ratings)} entries and `{field}` has {len(texts)}")
    else:
        if not all(isinstance(response, dict) for response in responses):
            raise Malformed(f"`{field}` is not a list of objects with a response and a rating")
        texts = _of_each(responses, TEXTS, field)
        ratings = _of_each(responses, SCORES, field)
    if not all(isinstance(text, str) for text in texts):
        raise Malformed(f"a response of `{field}` is not a str")
    rated = [(_number(rating, field), text) for text, rating in zip(texts, ratings, strict=True)]
    rated = [(rating, text) for rating, text in rated if rating is not None]
    if len({rating for rating, _ in rated}) < 2:
        raise Unusable("no two responses have different ratings")
    best = max(rated, key=lambda entry: entry[0])
    worst = min(rated, key=lambda entry: entry[0])
    return best[1], worst[1]


def _of_each(responses, names, field):
    """Of each response (a dict) what stands under the first of the names that one of them has.  Raises Malformed."""
    name = next((name for name in names if any(name in response for response in responses)), None)
    if name is None:
        raise Malformed(f"`{field}` has no {' or '.join(names)}")
    return [response.get(name) for response in responses]


def _number(rating, field):
    """A rating, perhaps in text ("4", "N/A"), as a number; None where there is none.  Raises Malformed."""
    try:
        if rating is None or str(rating).strip().lower() in ("", "n/a", "nan", "none"):
            return None
        if isinstance(rating, str | int | float) and not isinstance(rating, bool) and math.isfinite(float(rating)):
            return float(rating)
    except (ValueError, OverflowError):
        pass
    raise Malformed(f"a rating of `{field}` is {textwrap.shorten(repr(rating), 40)}, and no number")


def rated_responses(asked, field):
    """The Shape of a prompt and a list of responses with ratings: the best is chosen, the worst rejected."""

    def texts(row):
        chosen, rejected = best_and_worst(row, field)
        row = row | {"chosen": chosen, "rejected": rejected}
        return instruction(row) if asked == "instruction" else (row[asked], chosen, rejected)

    def has_ratings(row):
        beside = any(isinstance(row.get(name), list) for name in RATINGS)
        return beside or any(isinstance(response, dict) and response.keys() & set(SCORES) for response in row[field])

    return Shape(
        f"{asked}/{field} with ratings",
        {asked: str, field: list},
        texts,
        reads=RATINGS + (("input",) if asked == "instruction" else ()),
        lists=(field,),
        example=f'{{"{asked}": "…", "{field}": [{{"response": "…", "overall_score": 5}}, …]}}',
        fits=has_ratings,
    )


def is_said(asked, row):
    return row[asked].strip() != ""


def dual_labels(row):
    """PKU-SafeRLHF, by helpfulness.  Question and answer are two texts there: a newline keeps them apart."""
    better, responses = row["better_response_id"], (row["response_0"], row["response_1"])
    if better not in (0, 1):
        raise Malformed("`better_response_id` is neither 0 nor 1")
    return row["prompt"].rstrip() + "\n", responses[better], responses[1 - better]


INSTRUCTION = Shape(
    "instruction/chosen/rejected", strings("instruction", "chosen", "rejected"), instruction, reads=("input",)
)
SHAPES = [  # the first whose fields fit a file's first row is the shape of the file
    prompt_and_responses("prompt", "chosen", "rejected"),
    Shape("prompt/chosen/rejected messages", {"prompt": list, "chosen": list, "rejected": list}, message_lists),
    prompt_and_responses("prompt", "chosen_response", "rejected_response"),
    Shape("prompt string, messages", {"prompt": str, "chosen": list, "rejected": list}, message_lists),
    *(
        asked_and_answers(asked, "chosen", "rejected", kind)
        for asked in ("conversations", "messages", "prompt")
        for kind in (list, dict, str)
        if (asked, kind) != ("prompt", list)
    ),
    Shape(
        "input/preferred_output/non_preferred_output",
        {"input": dict, "preferred_output": list, "non_preferred_output": list},
        openai_preference,
        example='{"input": {"messages": [{"role": "user", "content": "…"}]}, "preferred_output": '
        '[{"role": "assistant", "content": "…"}], "non_preferred_output": [{"role": "assistant", "content": "…"}]}',
    ),
    Shape(
        "messages/rejected_messages",
        {"messages": list, "rejected_messages": list},
        partial(rejected_beside_messages, field="rejected_messages"),
        example=f'{{"messages": [{ASKS}, {ANSWERS}], "rejected_messages": [{ASKS}, {ANSWERS}]}}',
    ),
    Shape(
        "messages/rejected_response",
        {"messages": list, "rejected_response": str},
        partial(rejected_beside_messages, field="rejected_response"),
        example=f'{{"messages": [{ASKS}, {ANSWERS}], "rejected_response": "…"}}',
    ),
    Shape("chosen/rejected messages", {"chosen": list, "rejected": list}, message_lists, ("prompt",)),
    Shape("question/response_j/response_k", strings("question", "response_j", "response_k"), stack_exchange),
    Shape(
        "prompt/response_0/response_1/better_response_id",
        strings("prompt", "response_0", "response_1") | {"better_response_id": int},
        dual_labels,
    ),
    INSTRUCTION,
    INSTRUCTION._replace(
        name="instruction/chosen_response/rejected_response",
        fields=strings("instruction", "chosen_response", "rejected_response"),
        texts=partial(instruction, chosen="chosen_response", rejected="rejected_response"),
    ),
    *(
        prompt_and_responses(asked, "chosen", "rejected")._replace(fits=partial(is_said, asked))
        for asked in ("question", "query", "input")
    ),
    *(
        rated_responses(asked, field)
        for asked in ("prompt", "instruction", "question", "query", "input")
        for field in ("completions", "generations", "responses")
    ),
    Shape(
        "chosen/rejected strings",
        strings("chosen", "rejected"),
        chosen_and_rejected,
        ("prompt", "instruction", "question"),
    ),
]
