"""What became of every raw row: used, or dropped for a reason; counted for account.json, and as lines to print."""

from dataclasses import dataclass

from tools.prepare_pairs import DIMENSIONS, SPLITS


@dataclass
class RawRow:
    file: dict  # the account of its file
    place: str  # file:line
    reason: str | None = None  # the first for which it was dropped, or a part of it
    first: str = ""  # what the account says where it is the first row with that reason


class Ledger:
    """Every row that was read; a row is used if anything of it is, else dropped for the first reason that was given."""

    def __init__(self):
        self.rows = []  # RawRow; everybody else knows a row by its number here
        self.dropped_responses, self.dropped_pairs = [], []  # (row, reason)

    def add(self, file, place):
        """A row that was read; its number."""
        self.rows.append(RawRow(file, place))
        return len(self.rows) - 1

    def drop_row(self, row, reason, detail=""):
        raw = self.rows[row]
        if raw.reason is None:
            raw.reason, raw.first = reason, raw.place + detail

    def drop_response(self, row, reason):
        """A response of a row; the row too, if nothing else of it is used."""
        self.dropped_responses.append((row, reason))
        self.drop_row(row, reason)

    def drop_pair(self, rows, reason):
        """A pair that was made of these rows; the rows too, if nothing else of them is used."""
        self.dropped_pairs.append((rows[0], reason))
        for row in rows:
            self.drop_row(row, reason)

    def count_rows(self, used):
        """{"read", "used", "dropped"} of all rows; each file's own numbers go into its account.  used: row numbers."""
        dropped = {}
        for number, raw in enumerate(self.rows):
            raw.file["read"] += 1
            if number in used:
                raw.file["used"] += 1
            else:
                tally(dropped, raw.reason, raw.first)
                tally(raw.file["dropped"], raw.reason, raw.first)
        return {"read": len(self.rows), "used": len(used), "dropped": dropped}

    def count_parts(self, parts):
        """{reason: {count, first}} of dropped responses or dropped pairs."""
        dropped = {}
        for row, reason in sorted(parts):
            tally(dropped, reason, self.rows[row].place)
        return dropped


def tally(dropped, reason, first):
    dropped.setdefault(reason, {"count": 0, "first": first})["count"] += 1


def count_splits(splits):
    """Pairs per dimension and split, prompts per split, labels; splits {split: {dimension: [Preference]}}."""
    pairs = {dimension: dict.fromkeys(SPLITS, 0) for dimension in DIMENSIONS}
    labels = {dimension: {"pairs": 0, "safe": 0, "harmful": 0} for dimension in DIMENSIONS}
    prompts = {split: set() for split in SPLITS}
    for split, by_dimension in splits.items():
        for dimension, members in by_dimension.items():
            pairs[dimension][split] = len(members)
            for preference in members:
                prompts[split].add(preference.prompt.strip())
                labels[dimension]["pairs"] += bool(preference.labels)
                for label in preference.labels or ():
                    labels[dimension]["safe" if label == -1 else "harmful"] += 1
    return {"splits": pairs, "prompts": {split: len(keys) for split, keys in prompts.items()}, "labels": labels}


def reasons(dropped):
    """Lines with the reasons, the most frequent first."""
    for reason, entry in sorted(dropped.items(), key=lambda item: -item[1]["count"]):
        yield f"  {entry['count']:,} because {reason}; the first is {entry['first']}"


def report(account):
    """The account as lines to print."""
    for file in account["files"]:
        yield f"{file['file']}: {file['kind']}, {file['read']:,} rows, {file['used']:,} used"
        for name, count in file.get("columns_not_read", {}).items():
            yield f"  the column {name} is not read, in {count:,} rows"
    rows, pairs = account["rows"], account["pairs"]
    yield f"rows: {rows['read']:,} read, {rows['used']:,} used, {rows['read'] - rows['used']:,} dropped"
    yield from reasons(rows["dropped"])
    if account["responses"]["dropped"]:
        yield "responses dropped:"
        yield from reasons(account["responses"]["dropped"])
    yield f"pairs: {pairs['made']:,} made, {pairs['kept']:,} kept, {pairs['made'] - pairs['kept']:,} dropped"
    yield from reasons(pairs["dropped"])
    yield from split_table(account)
    if "benchmark" in account:
        yield benchmark_line(account["benchmark"])


def split_table(account):
    """Prompts and pairs of each split, in columns."""
    total = sum(account["prompts"].values())
    shares = [f"{count:,} ({count / total:.1%})" for count in account["prompts"].values()]
    yield " " * 10 + "".join(f"{split:>16}" for split in SPLITS)
    yield f"{'prompts':10}" + "".join(f"{share:>16}" for share in shares)
    for dimension in DIMENSIONS:
        pairs = "".join(f"{count:16,}" for count in account["splits"][dimension].values())
        labels = account["labels"][dimension]
        words = f"{labels['pairs']:,} with labels: {labels['safe']:,} responses safe, {labels['harmful']:,} harmful"
        yield f"{dimension:10}{pairs}   {words}"


def benchmark_line(benchmark):
    sizes = benchmark["categories"].values()
    if benchmark["categories"].keys() == {"unknown"}:
        balance = "not balanced, as no row names a category"
    elif min(sizes) == max(sizes):
        balance = f"{len(sizes)} categories with {min(sizes)} each"
    else:
        balance = f"{len(sizes)} categories with {min(sizes)} to {max(sizes)} each"
    return f"{benchmark['file']}: {benchmark['prompts']:,} harmful prompts, {balance}"
