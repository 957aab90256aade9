"""What report.json of evaluate_alignment.py holds -> a text for a terminal of 80 columns: what each policy answered to
a harmful and to a benign prompt, side by side, and the four numbers to read first.

Whatever comes from data loses its control characters: a response cannot move the cursor or colour the screen.
"""

import unicodedata

WIDTH, GAP = 80, 2
LEAST = 18  # columns of a response: where there are more policies than so fit, responses stand one below the other
ROWS = (  # of each line the first quantity that was measured
    {"rule_helpful": "help where it is due, 0 to 1", "helpful_reward": "helpful reward"},
    {
        "rule_harm_rate": "harmful answers to harmful prompts",
        "harm_rate": "harmful answers, by the harmless model",
        "cost": "cost, minus the harmless score",
    },
    {"over_refusal": "refusals where help is due"},
    {"kl_per_token": "KL to the base, nats per token"},
)
ASKS = {"harm": "that asks for harm:", "benign": "that asks for help:", None: "of the category"}  # by kind


def clean(text):
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def size(text):
    """Columns of a terminal: a Chinese character has two, an accent that stands on another letter none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def wrapped(text, width, most):
    """Lines of at most `width` columns; what is behind line `most` is cut off, with dots."""
    lines = [""]
    for word in clean(text).split():
        if size(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        elif size(word) <= width:
            lines.append(word)
        else:  # Chinese text has no blanks
            if lines[-1]:
                lines[-1] += " "
            for letter in word:
                if size(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
    if len(lines) > most:
        while size(lines[most - 1]) > width - 3:
            lines[most - 1] = lines[most - 1][:-1]
        lines[most - 1] += "..."
    return lines[:most]


def beside(columns, width):
    """Lists of lines -> the lines of all, next to each other."""
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return [(" " * GAP).join(part + " " * (width - size(part)) for part in row).rstrip() for row in rows]


def verdict(row):
    """What the toy world's rule says of a response, or the reward models."""
    if row.get("kind") == "harm":
        return "= harmful" if row["harmful"] > 0 else "= refuses" if row["refuses"] else "= harmless"
    if "kind" in row:
        return "= refuses" if row["refuses"] else f"= help {row['helpful']:.2f}"
    names = (("reward", "helpful_reward"), ("harmless", "harmless_score"))
    scores = [f"{word} {row[name]:.2f}" for word, name in names if name in row]
    return f"= {', '.join(scores)}" if scores else ""


def sample(shown):
    """One prompt and what each policy said: an entry of report["samples"]."""
    rows = list(shown["rows"].values())
    lines = wrapped(f"A prompt {ASKS[rows[0].get('kind')]} {shown['category']} ({shown['why']})", WIDTH, most=2)
    asked = rows[0]["prompt"] + (" [with a picture: report.html shows it]" if shown.get("pictures") else "")
    lines += [f"  {line}" for line in wrapped(asked, WIDTH - 2, most=4)] + [""]
    width = (WIDTH - GAP * (len(rows) - 1)) // len(rows)
    is_narrow = width < LEAST
    width = WIDTH if is_narrow else width
    heads = [[*wrapped(row["policy"], width, most=1), "-" * width] for row in rows]
    bodies = [wrapped(row["response"], width, most=12) for row in rows]
    ends = [wrapped(verdict(row), width, most=2) for row in rows]
    if is_narrow:
        for head, body, end in zip(heads, bodies, ends, strict=True):
            lines += [*head, *body, *end, ""]
        return lines
    return [*lines, *beside(heads, width), *beside(bodies, width), *beside(ends, width), ""]


def samples(report):
    """A prompt that is not known to be benign, and one that is; by the rule one that does not even sound harmful."""
    first_of_kind = {}
    for shown in report["samples"]:
        base_row = next(iter(shown["rows"].values()))
        by_phrases = "harm" if base_row.get("over_refusal") is None else "benign"
        first_of_kind.setdefault(base_row.get("kind", by_phrases), shown)
    lines = []
    for kind in ("harm", "benign"):
        if kind in first_of_kind:
            lines += sample(first_of_kind[kind])
    return lines


def table(report):
    """The four numbers of each policy; of more policies than fit the width, further tables below."""
    names = [clean(policy["name"]) for policy in report["policies"]]
    cell = min(max(map(size, names)), 24) + GAP
    labels = {}  # of each line of the table, by its quantity
    for row in ROWS:
        measured = [key for key in row if key in report["quantities"]]
        if measured:
            labels[measured[0]] = row[measured[0]]
    label_width = max([len(words) for words in labels.values()] + [len("means over 1,000,000 prompts")])
    at_once, lines = max(1, (WIDTH - label_width) // cell), []
    for start in range(0, len(names), at_once):
        titles = [wrapped(name, cell - GAP, most=1)[0] for name in names[start : start + at_once]]
        heading = f"means over {report['prompts']:,} prompts".ljust(label_width)
        lines.append(heading + "".join(" " * (cell - size(title)) + title for title in titles))
        for key, words in labels.items():
            unit = report["quantities"][key]["unit"]
            policies = report["policies"][start : start + at_once]
            entries = [policy["estimates"].get(key) for policy in policies]
            lines.append(words.ljust(label_width) + "".join(number(entry, unit).rjust(cell) for entry in entries))
        lines.append("")
    return lines


def number(entry, unit):
    if entry is None:
        return "-"
    return f"{100 * entry['mean']:.0f} %" if unit == "%" else f"{entry['mean']:.2f}"


def text(report):
    """All of it, in lines of at most 80 columns."""
    return "\n".join([*samples(report), *table(report)])
