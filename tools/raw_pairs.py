"""Preferences and labelled responses -> one of each pair, in splits by prompt, and what became of every row.

answers      responses to a prompt, each labelled safe or harmful: paired with one another
preferences  pairs of one dimension: copies go, and what contradicts itself
splits       a prompt is in one split, for both dimensions, whatever else is read and in whatever order
"""

import hashlib
import itertools
import json
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from formats.row_prompts import said

SPLITS, DIMENSIONS = ("train", "val", "test"), ("helpful", "harmless")


class Messages(str):
    """Messages as their JSON, which is counted, split and drawn as a text is."""

    def strip(self):
        """What makes them the same: roles and texts, as `said`, without white space around the texts."""
        return json.dumps([[role, text.strip(), *rest] for role, text, *rest in said(json.loads(self))], sort_keys=True)


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
    row: int
    prompt: str
    text: str
    is_safe: bool


class Ledger:
    """Every row with its file and its place; in the end it is used, or dropped for the first reason that was given."""

    def __init__(self):
        self.rows, self.responses, self.pairs = [], [], []

    def drop(self, row, reason, part_of=None, detail=""):
        """Drop a row; with one of `responses` and `pairs`, a part of it: the row too, if nothing else of it is used."""
        file, place, fate = self.rows[row]
        self.rows[row] = file, place, fate or (reason, place + detail)
        if part_of is not None:
            part_of.append((row, reason))

    def close(self, used):
        """The account of the rows, and of each file's into its own; of dropped responses, and of dropped pairs."""
        rows, responses, pairs = {"read": len(self.rows), "used": len(used), "dropped": {}}, {}, {}
        for number, (file, _, fate) in enumerate(self.rows):
            file["read"] += 1
            file["used"] += number in used
            if number not in used:
                tally(rows["dropped"], *fate)
                tally(file["dropped"], *fate)
        for parts, table in (self.responses, responses), (self.pairs, pairs):
            for row, reason in sorted(parts):
                tally(table, reason, self.rows[row][1])
        return rows, responses, pairs


def tally(table, reason, first):
    table.setdefault(reason, {"count": 0, "first": first})["count"] += 1


def draw(seed, *texts):
    """A number in [0, 1) that depends on the seed and the texts alone: the order of rows has no say."""
    digest = hashlib.sha256("\0".join((str(seed), *texts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def pair_answers(answers, seed, ledger):
    """Harmless pairs of the safe and the harmful responses to each prompt; `answers` has a list for every prompt.

    There are as many pairs as there are responses on the larger side: each of them is in one pair, and the smaller
    side goes round, so that none of it is used more than once above another.
    """
    preferences = []
    for group in answers.values():
        copies, usable = defaultdict(list), []
        for answer in sorted(group, key=lambda answer: (answer.text, answer.prompt, answer.row)):
            copies[answer.text.strip()].append(answer)
        for same in copies.values():
            agree = len({answer.is_safe for answer in same}) == 1
            reason = "the response is there already" if agree else "the response is labelled both safe and harmful"
            usable += same[:agree]
            for answer in same[agree:]:
                ledger.drop(answer.row, reason, ledger.responses)
        usable.sort(key=lambda answer: draw(seed, answer.prompt, answer.text))
        safe, harmful = ([answer for answer in usable if answer.is_safe is side] for side in (True, False))
        if not safe or not harmful:
            for answer in usable:
                reason = f"all responses to the prompt are {'safe' if safe else 'harmful'}"
                ledger.drop(answer.row, reason, ledger.responses)
            continue
        for n in range(max(len(safe), len(harmful))):
            chosen, rejected = safe[n % len(safe)], harmful[n % len(harmful)]
            rows = tuple(sorted({chosen.row, rejected.row}))
            preferences.append(Preference(rows, "harmless", chosen.prompt, chosen.text, rejected.text, (-1, 1)))
    return preferences


def without_copies(preferences, ledger):
    """One of each pair; none where copies contradict each other: nobody knows which is right, and being read first is
    no reason.  White space around a text makes no other pair; of copies, one with labels stays.
    """
    groups, kept = defaultdict(list), []
    for p in preferences:
        groups[p.dimension, p.prompt.strip(), frozenset((p.chosen.strip(), p.rejected.strip()))].append(p)
    for copies in groups.values():
        copies.sort(key=lambda p: (p.labels is None, p.prompt, p.chosen, p.rejected, p.rows))
        keep = 0
        if len({p.chosen.strip() for p in copies}) == 2:
            reason = "the same two responses are there the other way round"
        elif len({p.labels for p in copies if p.labels}) > 1:
            reason = "the same pair is there with other labels"
        elif copies[0].dimension == "harmless" and copies[0].labels == (1, -1):
            reason = "the response that is called safer is labelled harmful (1) and the other safe (-1)"
        else:
            keep, reason = 1, "the same pair is there already"
        kept += copies[:keep]
        for p in copies[keep:]:
            for n, row in enumerate(p.rows):
                ledger.drop(row, reason, None if n else ledger.pairs)
    return kept


def split_of(prompt, ratios, seed):
    """The split that the seed and the prompt alone decide; `ratios` of the prompts are in train, val, test."""
    position, ends = draw(seed, prompt.strip()), itertools.accumulate(ratios)
    last = [split for split, ratio in zip(SPLITS, ratios, strict=True) if ratio][-1]  # 0.7 + 0.2 + 0.1 is below 1
    return next((split for split, end in zip(SPLITS, ends, strict=True) if position < end), last)


def benchmark(pairs, category, categories, labels, max_prompts, seed):
    """Rows {prompt, category} of the harmful prompts of `pairs`, one of each category in turn while there are some.

    Harmful is a prompt with a response that is labelled so and, where no label is known, a prompt of harmless pairs.
    """
    texts, by_category = {}, defaultdict(list)
    for p in pairs:
        known = labels[p.prompt.strip()]
        if 1 in known or (not known and p.dimension == "harmless"):
            texts.setdefault(p.prompt.strip(), p.prompt)
    for key in sorted(texts, key=partial(draw, seed)):
        row = {"prompt": written(texts[key]), "category": category.get(key, "unknown")}
        by_category[row["category"]].append(
            row | ({"all_categories": sorted(categories[key])} if len(categories[key]) > 1 else {})
        )
    turns = itertools.zip_longest(*(by_category[name] for name in sorted(by_category)))
    return [row for turn in turns for row in turn if row][: max_prompts or None]


def pair_row(p, category):
    names = ("chosen", "rejected") if isinstance(p.prompt, Messages) else ("chosen_response", "rejected_response")
    row = dict(zip(("prompt", *names), map(written, (p.prompt, p.chosen, p.rejected)), strict=True))
    row["dimension"] = p.dimension
    if p.labels:
        row["safety_labels"] = {"chosen": p.labels[0], "rejected": p.labels[1]}
    return row | ({"category": category} if category else {})


# -- the account of it all -------------------------------------------------------------------------------------------


def counts(splits):
    """Pairs per dimension and split, prompts per split, labels; `splits` has the pairs of every file."""
    pairs = {dimension: dict.fromkeys(SPLITS, 0) for dimension in DIMENSIONS}
    labels = {dimension: {"pairs": 0, "safe": 0, "harmful": 0} for dimension in DIMENSIONS}
    prompts = {split: set() for split in SPLITS}
    for name, members in splits.items():
        split = name.partition("/")[0]
        for p in members:
            pairs[p.dimension][split] += 1
            prompts[split].add(p.prompt.strip())
            labels[p.dimension]["pairs"] += bool(p.labels)
            for label in p.labels or ():
                labels[p.dimension]["safe" if label == -1 else "harmful"] += 1
    return {"splits": pairs, "prompts": {split: len(keys) for split, keys in prompts.items()}, "labels": labels}


def dropped(table):
    """Lines with the reasons, the most frequent first."""
    for reason, entry in sorted(table["dropped"].items(), key=lambda item: -item[1]["count"]):
        yield f"  {entry['count']:,} because {reason}; the first is {entry['first']}"


def report(account):
    """The account as lines to print."""
    for file in account["files"]:
        yield f"{file['file']}: {file['kind']}, {file['read']:,} rows, {file['used']:,} used"
        for name, count in file.get("columns_not_read", {}).items():
            yield f"  the column {name} is not read, in {count:,} rows"
    rows, pairs = account["rows"], account["pairs"]
    yield f"rows: {rows['read']:,} read, {rows['used']:,} used, {rows['read'] - rows['used']:,} dropped"
    yield from dropped(rows)
    if account["responses"]["dropped"]:
        yield "responses dropped:"
        yield from dropped(account["responses"])
    yield f"pairs: {pairs['made']:,} made, {pairs['kept']:,} kept, {pairs['made'] - pairs['kept']:,} dropped"
    yield from dropped(pairs)
    shares = [f"{n:,} ({n / sum(account['prompts'].values()):.1%})" for n in account["prompts"].values()]
    yield " " * 10 + "".join(f"{split:>16}" for split in SPLITS)
    yield f"{'prompts':10}" + "".join(f"{share:>16}" for share in shares)
    for dimension in DIMENSIONS:
        numbers, labels = account["splits"][dimension].values(), account["labels"][dimension]
        known = f"{labels['pairs']:,} with labels: {labels['safe']:,} responses safe, {labels['harmful']:,} harmful"
        yield f"{dimension:10}" + "".join(f"{n:16,}" for n in numbers) + f"   {known}"
    if "benchmark" in account:
        kinds = account["benchmark"]["categories"]
        sizes = sorted({min(kinds.values()), max(kinds.values())})
        how = f"{len(kinds)} categories with {' to '.join(map(str, sizes))} each"
        if kinds.keys() == {"unknown"}:
            how = "not balanced, as no row names a category"
        yield f"{account['benchmark']['file']}: {account['benchmark']['prompts']:,} harmful prompts, {how}"
