"""Preferences and labelled responses -> one of each pair, in splits by prompt.

answers      responses to a prompt, each labelled safe or harmful: paired with one another
preferences  pairs of one dimension: copies go, and what contradicts itself
splits       a prompt is in one split, for both dimensions, whatever else is read and in whatever order
"""

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from functools import partial
from typing import NamedTuple

from formats.row_prompts import said

SPLITS, DIMENSIONS = ("train", "val", "test"), ("helpful", "harmless")


class Messages(str):
    """Messages as their JSON, which is counted, split and drawn as a text is."""

    def strip(self):
        """What makes them the same: roles and texts, as `said`, without white space around the texts."""
        return json.dumps([[role, text.strip(), *rest] for role, text, *rest in said(json.loads(self))], sort_keys=True)


class Seen(str):
    """A prompt and its pictures as their JSON: the same words about another picture are another prompt."""

    def parts(self):
        """(names of the files of its pictures, the prompt: a text or Messages)."""
        pictures, prompt = json.loads(self)
        return pictures, as_json(prompt) if isinstance(prompt, list) else prompt

    def strip(self):
        pictures, prompt = self.parts()
        return json.dumps([pictures, prompt.strip()])


def with_pictures(prompt, pictures):
    """The prompt, and Seen where there are pictures: names of files, each the sha256 of what is in it."""
    return Seen(json.dumps([pictures, written(prompt)], ensure_ascii=False)) if pictures else prompt


def parts_of(prompt):
    return prompt.parts() if isinstance(prompt, Seen) else ([], prompt)


def as_json(messages):
    return Messages(json.dumps(messages, ensure_ascii=False, default=str))


def written(text):
    return json.loads(text) if isinstance(text, Messages) else text


class Preference(NamedTuple):
    rows: tuple  # numbers of rows in the ledger
    dimension: str
    prompt: str
    chosen: str
    rejected: str
    labels: tuple | None  # of harm, (chosen, rejected): 1 is harmful, -1 is safe


class Answer(NamedTuple):
    row: int  # its number in the ledger
    prompt: str
    text: str
    is_safe: bool


def draw(seed, *texts):
    """A number in [0, 1) that depends on the seed and the texts alone: the order of rows has no say."""
    digest = hashlib.sha256("\0".join((str(seed), *texts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# -- pairs -----------------------------------------------------------------------------------------------------------


def pair_answers(answers, seed, ledger):
    """Harmless pairs of the safe and the harmful responses to each prompt; `answers` has a list for every prompt.

    There are as many pairs as there are responses on the larger side: each of them is in one pair, and the smaller
    side goes round, so that none of it is used more than once above another.
    """
    preferences = []
    for group in answers.values():
        usable = one_of_each(group, ledger)
        usable.sort(key=lambda answer: draw(seed, answer.prompt, answer.text))
        safe = [answer for answer in usable if answer.is_safe]
        harmful = [answer for answer in usable if not answer.is_safe]
        if not safe or not harmful:
            for answer in usable:
                reason = f"all responses to the prompt are {'safe' if safe else 'harmful'}"
                ledger.drop_response(answer.row, reason)
            continue
        for n in range(max(len(safe), len(harmful))):
            chosen, rejected = safe[n % len(safe)], harmful[n % len(harmful)]
            rows = tuple(sorted({chosen.row, rejected.row}))
            preferences.append(Preference(rows, "harmless", chosen.prompt, chosen.text, rejected.text, (-1, 1)))
    return preferences


def one_of_each(answers, ledger):
    """One of the answers with the same text; none where their labels contradict each other."""
    by_text, kept = defaultdict(list), []
    for answer in sorted(answers, key=lambda answer: (answer.text, answer.prompt, answer.row)):
        by_text[answer.text.strip()].append(answer)
    for copies in by_text.values():
        if len({answer.is_safe for answer in copies}) == 1:
            kept.append(copies.pop(0))
            reason = "the response is there already"
        else:
            reason = "the response is labelled both safe and harmful"
        for answer in copies:
            ledger.drop_response(answer.row, reason)
    return kept


def without_copies(preferences, ledger):
    """One of each pair; none where copies contradict each other: nobody knows which is right, and being read first is
    no reason.  White space around a text makes no other pair; of copies, one with labels stays.
    """
    groups, kept = defaultdict(list), []
    for p in preferences:
        groups[p.dimension, p.prompt.strip(), frozenset((p.chosen.strip(), p.rejected.strip()))].append(p)
    for copies in groups.values():
        copies.sort(key=lambda p: (p.labels is None, p.prompt, p.chosen, p.rejected, p.rows))
        reason = contradiction(copies)
        if reason is None:
            kept.append(copies.pop(0))
            reason = "the same pair is there already"
        for p in copies:
            ledger.drop_pair(p.rows, reason)
    return kept


def contradiction(copies):
    """Why the copies of a pair cannot all be right, or None."""
    if len({p.chosen.strip() for p in copies}) == 2:
        return "the same two responses are there the other way round"
    if len({p.labels for p in copies if p.labels}) > 1:
        return "the same pair is there with other labels"
    if copies[0].dimension == "harmless" and copies[0].labels == (1, -1):
        return "the response that is called safer is labelled harmful (1) and the other safe (-1)"
    return None


# -- splits and rows -------------------------------------------------------------------------------------------------


def split_of(prompt, ratios, seed):
    """The split that the seed and the prompt alone decide; `ratios` of the prompts are in train, val, test."""
    position = draw(seed, prompt.strip())
    for split, end in zip(SPLITS, itertools.accumulate(ratios), strict=True):
        if position < end:
            return split
    # 0.7 + 0.2 + 0.1 is a little below 1: what is left belongs to the last split that is not empty.
    return [split for split, ratio in zip(SPLITS, ratios, strict=True) if ratio][-1]


def in_splits(preferences, ratios, seed):
    """{split: {dimension: [Preference]}}, each list in an order that the seed and the texts alone decide."""
    splits = {split: {dimension: [] for dimension in DIMENSIONS} for split in SPLITS}
    for p in sorted(preferences, key=lambda p: draw(seed, p.prompt, p.chosen, p.rejected)):
        splits[split_of(p.prompt, ratios, seed)][p.dimension].append(p)
    return splits


def rarest_categories(categories):
    """{prompt: the one of its categories that the fewest prompts have}, of those that have any."""
    count = Counter(name for names in categories.values() for name in names)
    return {prompt: min(names, key=lambda name: (count[name], name)) for prompt, names in categories.items() if names}


def prompt_row(prompt, images):
    """A prompt as the beginning of a row; images: the path from the row's file to the folder of the pictures."""
    pictures, prompt = parts_of(prompt)
    paths = {"images": [f"{images}/{name}" for name in pictures]} if pictures else {}
    return paths | {"prompt": written(prompt)}


def pair_row(p, category, images):
    """A preference as a row of the data that training reads."""
    is_chat = isinstance(parts_of(p.prompt)[1], Messages)
    names = ("chosen", "rejected") if is_chat else ("chosen_response", "rejected_response")
    row = prompt_row(p.prompt, images) | dict(zip(names, map(written, (p.chosen, p.rejected)), strict=True))
    row["dimension"] = p.dimension
    if p.labels:
        row["safety_labels"] = {"chosen": p.labels[0], "rejected": p.labels[1]}
    return row | ({"category": category} if category else {})


def benchmark(preferences, category, categories, labels, max_prompts, seed, images):
    """Rows {prompt, category} of the harmful prompts of `preferences`, one of each category in turn while there are
    some.

    Harmful is a prompt with a response that is labelled so and, where no label is known, a prompt of harmless pairs.
    category {prompt: its rarest}, categories {prompt: all of its names}, labels {prompt: those of its responses};
    images: as in prompt_row.
    """
    texts = {}
    for p in preferences:
        prompt_labels = labels[p.prompt.strip()]
        if 1 in prompt_labels or (not prompt_labels and p.dimension == "harmless"):
            texts.setdefault(p.prompt.strip(), p.prompt)
    by_category = defaultdict(list)
    for prompt in sorted(texts, key=partial(draw, seed)):
        row = prompt_row(texts[prompt], images) | {"category": category.get(prompt, "unknown")}
        if len(categories[prompt]) > 1:
            row["all_categories"] = sorted(categories[prompt])
        by_category[row["category"]].append(row)
    turns = itertools.zip_longest(*(by_category[name] for name in sorted(by_category)))
    in_turn = [row for turn in turns for row in turn if row]
    return in_turn[: max_prompts or None]
