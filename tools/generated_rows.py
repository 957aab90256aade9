"""Rows in, each with a prompt; rows out, with the responses to it: all of them, or best against worst as a pair."""

import re

from formats.preference_rows import own_texts
from formats.row_prompts import CONTEXT, as_turns, check_columns

# Fields of a row that speak of the responses it came with: new responses leave them behind.
OF_RESPONSES = re.compile("response|chosen|rejected|reward|score|safe|dimension|messages")


class PromptError(ValueError):
    """A row without a prompt, in a few words."""


def prompt_of(row, shape=None):
    """(prompt, fields that go along to the rows out) of a row (dict).  Raises PromptError, Malformed or Unusable.

    shape: the row's preference_rows.Shape, where it is a preference row; its prompt then is the pair's.  A prompt is a
    text or a list of messages, without the columns that row_prompts.with_context puts around it: these go along.
    """
    prompt = own_texts(row, shape)[0] if shape else row.get("prompt")
    if not isinstance(prompt, str | list):
        raise PromptError(f"`prompt` is {'neither a text nor a list of messages' if 'prompt' in row else 'missing'}")
    prompt = prompt if isinstance(prompt, str) else as_turns(prompt, "prompt")
    used = {"prompt", *(shape.fields | dict.fromkeys(shape.reads) if shape else ())}
    others = {name: value for name, value in row.items() if name not in used and not OF_RESPONSES.search(name)}
    check_columns(others, CONTEXT, shape.name if shape else "prompt", prompt, [])
    return prompt, others


def text_of(prompt):
    """The prompt as a reward function reads it: its text, or what its messages say."""
    return prompt if isinstance(prompt, str) else "\n\n".join(str(message["content"]) for message in prompt)


def best_and_worst(texts, rewards):
    """Places of the responses with the highest and the lowest reward, the first of equals; None where these are equal
    in reward or in text.  An empty response is neither.
    """
    said = [place for place, text in enumerate(texts) if text.strip()]
    if not said:
        return None
    best, worst = max(said, key=rewards.__getitem__), min(said, key=rewards.__getitem__)
    return None if rewards[best] == rewards[worst] or texts[best] == texts[worst] else (best, worst)


def pair_row(prompt, others, texts, rewards):
    """A row of preference_rows' shapes: best against worst response, messages where the prompt is; None for a tie."""
    places = best_and_worst(texts, rewards)
    if places is None:
        return None
    chosen, rejected = (texts[place] for place in places)
    if not isinstance(prompt, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | dict(zip(("chosen_reward", "rejected_reward"), (rewards[place] for place in places))) | others


def response_rows(prompt, others, texts, rewards=()):
    """A row for each response, with its reward where there are some."""
    rows = [{"prompt": prompt, "response": text} for text in texts]
    if rewards:
        rows = [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]
    return [row | others for row in rows]


# -- what was written so far -----------------------------------------------------------------------------------------

COUNTS = "prompts responses tokens cut ties below rows reward_sum reward_squares".split()


def count(progress, rewards, **counts):
    """Add a batch to progress (a dict with COUNTS): its counts by name, and its rewards, where there are some, to the
    mean and spread of all so far."""
    for name, number in counts.items():
        progress[name] += number
    if rewards:
        progress["reward_sum"] += sum(rewards)
        progress["reward_squares"] += sum(reward**2 for reward in rewards)
        mean = progress["reward_sum"] / progress["responses"]
        variance = progress["reward_squares"] / progress["responses"] - mean**2
        progress |= {"rm_reward_mean": mean, "rm_reward_std": max(variance, 0) ** 0.5}


def in_words(progress, pairs):
    """The counts as a line of the log."""
    words = f"{progress['rows']:,} {'pairs' if pairs else 'rows'} of {progress['responses']:,} responses"
    words += f" to {progress['prompts']:,} prompts"
    counts = {"ties": "ties dropped", "below": "below --min-reward", "cut": "cut at --max-new-tokens"}
    words += "".join(f", {progress[name]:,} {what}" for name, what in counts.items() if progress[name])
    if "rm_reward_mean" in progress:
        words += f", rm_reward_mean={progress['rm_reward_mean']:.4f} rm_reward_std={progress['rm_reward_std']:.4f}"
    return words
