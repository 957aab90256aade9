"""What report.json of evaluate_alignment.py holds -> one HTML page, drawn with charts.py: tables, bars with whiskers,
curves of training, samples side by side.  On a narrow screen a table's row becomes a block with a line for each column.
"""

import json
from contextlib import suppress

from harness import charts
from harness.charts import (
    LEFT,
    RIGHT,
    Curve,
    curve_chart,
    figure,
    grid,
    label,
    line,
    number,
    scale,
    series,
    shown,
    tick,
    ticks,
)
from harness.training_curves import above, threshold

SAID = {  # below a sample
    "helpful_reward": "helpful reward",
    "harmless_score": "harmless score",
    "helpful": "helpful by the rule",
    "harmful": "harmful by the rule",
    "kl": "KL to the base",
}
SAFE_FIRST = 0, 2, 1, 3  # places in report["quadrants"]: better and worse but safe, then better and worse and unsafe
OPEN = ' open=""'  # of the first category's samples
SCROLLS = '<p class="muted wide">Where the window is too narrow for all columns, the table scrolls sideways.</p>'

STYLE = (
    charts.STYLE
    + """
.ci { font-size: 0.85em; white-space: nowrap; } .name { overflow-wrap: anywhere; }
.box { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.7rem; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; } thead th { background: var(--panel); } th { font-weight: 600; }
tbody th { font-weight: 500; min-width: 8.3rem; max-width: 17rem; overflow-wrap: anywhere; background: var(--bg);
  position: sticky; left: 0; } th .ci { white-space: normal; }
td:empty::before { content: "\\2013"; }
.mean { white-space: nowrap; } .clear { font-weight: 600; } td > div { margin-bottom: 0.1rem; }
@media screen and (max-width: 700px) {  /* a row is a block, a line for each column: nothing lies beyond the edge */
  .wide, thead { display: none; } table, tbody, tr, tbody th, td { display: block; border: 0; }
  tbody th { position: static; max-width: none; font-weight: 600; background: var(--panel); }
  td { display: grid; grid-template-columns: minmax(5.5rem, 32%) 1fr; gap: 0 0.7rem; padding: 0.25rem 0.7rem; }
  td::before { content: attr(data-head); color: var(--muted); overflow-wrap: anywhere; grid-row: span 2; }
  td:empty { display: none; } td:last-child { padding-bottom: 0.6rem; } .mean { white-space: normal; } }
.sample { border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem 0.9rem; margin: 0.9rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.2rem 0 0.5rem; max-width: none; }
.picture { display: block; max-width: 100%; min-width: 6rem; margin: 0.4rem 0.4rem 0 0; image-rendering: pixelated; }
.prompt { background: var(--panel); border-radius: 4px; padding: 0.4rem 0.6rem; }
.responses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.8rem; }
.response { border-left: 4px solid currentColor; padding-left: 0.7rem; min-width: 0; }
.response > * { color: var(--ink); } .response .muted { color: var(--muted); font-size: 0.85rem; }
summary { cursor: pointer; font-weight: 600; padding: 0.3rem 0; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: 0.1rem 1rem; font-size: 0.88rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { .box { overflow: visible; } .response, tr { break-inside: avoid; } table { font-size: 7pt; }
  .mean, .ci { white-space: normal; } th, td { padding: 0.15rem 0.2rem; } tbody th { min-width: 0; position: static; }
  .wide { display: none; } details::details-content { content-visibility: visible; display: block; } }
"""
)


# -- words and numbers -----------------------------------------------------------------------------------------------


def with_interval(entry, unit, difference=False):
    """(mean, its interval) in words, with as many digits; a difference of shares is in points."""
    digits = charts.digits_of(entry["mean"], entry["low"], entry["high"])
    mean, low, high = (number(entry[key], unit, digits) for key in ("mean", "low", "high"))
    if difference and entry["mean"] > 0:
        mean = f"+{mean}"
    if unit == "%":
        mean += " points" if difference else " %"
    return mean, f"[{low}, {high}]"


def change(entry, better):
    """What a difference to the base amounts to: better, worse, higher, lower, or nothing that is clear."""
    if entry["low"] <= 0 <= entry["high"]:
        return ""
    direction = "higher" if entry["mean"] > 0 else "lower"
    if not better:
        return direction
    return "better" if direction == better else "worse"


# -- tables ----------------------------------------------------------------------------------------------------------


def cell(statistics, name, quantity, kinds=("estimates", "differences")):
    """The mean of a quantity in the statistics and, where there is one, its difference to the base."""
    lines = []
    for kind in kinds:
        if entry := statistics[kind].get(name):
            mean, interval = with_interval(entry, quantity["unit"], kind == "differences")
            word = change(entry, quantity["better"]) if kind == "differences" else ""
            kind_of_mean = "mean clear" if word else "mean"
            mean = f'<span class="{kind_of_mean}">{mean} {word}</span>'
            lines.append(f'<div>{mean} <span class="ci">{interval}</span></div>')
    return "".join(lines)


def table(corner, heads, rows):
    """heads: what stands above each column, as text; rows [[HTML of the row's head, HTML of each cell]]."""
    heads = [shown(head) for head in heads]
    top = "".join(f'<th scope="col">{head}</th>' for head in (corner, *heads))
    body = ""
    for head, *cells in rows:
        cells = "".join(f'<td data-head="{name}">{cell}</td>' for name, cell in zip(heads, cells, strict=True))
        body += f'<tr><th scope="row">{head}</th>{cells}</tr>'
    box = f'<div class="box" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return SCROLLS + box if len(heads) > 4 else box


def described(quantity):
    unit = "% of responses" if quantity["unit"] == "%" else quantity["unit"]
    return unit + (f", {quantity['better']} is better" if quantity["better"] else "")


def summary_table(report):
    rows = [
        [f'{shown(quantity["label"])}<br /><span class="ci">{shown(described(quantity))}</span>']
        + [cell(policy, name, quantity) for policy in report["policies"]]
        for name, quantity in report["quantities"].items()
    ]
    return table("mean, and difference to the base", [policy["name"] for policy in report["policies"]], rows)


def category_table(report):
    quantities, rows = report["quantities"], []
    for category in report["categories"]:
        for policy in report["policies"]:
            statistics = policy["by_category"][category]
            cells = [cell(statistics, name, quantity, ["estimates"]) for name, quantity in quantities.items()]
            rows.append([f"{shown(category)}<br />{shown(policy['name'])}", *cells])
    return table("category, policy", [quantity["label"] for quantity in quantities.values()], rows)


# -- charts ----------------------------------------------------------------------------------------------------------


def bar_chart(quantity, groups):
    """Bars from zero with whiskers; groups {heading: [(place, policy name, entry)]}.  Under the heading "" each bar has
    its name and number above it."""
    entries, unit = [entry for rows in groups.values() for _, _, entry in rows], quantity["unit"]
    marks = ticks(min(0, *(entry["low"] for entry in entries)), max(0, *(entry["high"] for entry in entries)))
    x, y, drawn, words = scale(marks[0], marks[-1], LEFT, RIGHT), 2, [], []
    for heading, rows in groups.items():
        if heading:
            drawn.append(label(LEFT, y + 14, heading))
            y += 20
        for place, name, entry in rows:
            mean, interval = with_interval(entry, unit)
            words.append(f"{heading} {name} {mean} {interval}".strip())
            if not heading:
                drawn += [label(LEFT, y + 13, name[:24]), label(RIGHT, y + 13, f"{mean} {interval}", "end")]
                y += 18
            thick = 7 if heading else 13
            for value in marks:
                drawn.append(line(x(value), y - 2, x(value), y + thick + 2, "rule" if value else "axis"))
            left, right = sorted((x(0), x(entry["mean"])))
            drawn.append(f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{thick}" ')
            drawn.append(f'fill="currentColor" class="{series(place)[0]}" />')
            low, high, middle = x(entry["low"]), x(entry["high"]), y + thick / 2
            for kind in ("halo", "axis"):  # the whisker stands out on its bar
                drawn.append(line(low, middle, high, middle, kind))
                drawn += [line(end, middle - 3, end, middle + 3, kind) for end in (low, high)]
            y += thick + (3 if heading else 8)
        y += 6 if heading else 0
    drawn += [label(x(value), y + 14, tick(value, unit), "middle", "soft") for value in marks]
    drawn.append(label((LEFT + RIGHT) / 2, y + 31, described(quantity), "middle", "soft"))
    return figure(quantity["label"], y + 37, drawn, f"{quantity['label']}: {'; '.join(words)}")


def quadrant_chart(report):
    """One bar per adapter from all that is safe to all that is not."""
    names, y, drawn, words = report["quadrants"], 2, [], []
    for policy in report["policies"][1:]:
        drawn.append(label(LEFT, y + 13, policy["name"][:40]))
        x, y = LEFT, y + 18
        for place in SAFE_FIRST:
            share = policy["estimates"][names[place]]["mean"]
            width = share * (RIGHT - LEFT)
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{max(0, width - 1):.1f}" height="24" class="q{place}" />')
            if width > 32:
                drawn.append(label(x + width / 2, y + 16, f"{100 * share:.0f} %", "middle", f"q{place}i"))
            words.append(f"{policy['name']} {names[place]} {100 * share:.1f} %")
            x += width
        y += 34
    drawn.append(label((LEFT + RIGHT) / 2, y + 8, "% of responses, safe to the left", "middle", "soft"))
    return figure("Quadrants against the base", y + 16, drawn, "; ".join(words))


# -- sections --------------------------------------------------------------------------------------------------------


def bars(report):
    """Bars of each quantity over all prompts; and by category of those of which more or less is better."""
    overall, by_category = [], []
    for name, quantity in report["quantities"].items():
        if name in report["quadrants"] or name.startswith("harmless_score_"):
            continue
        overall.append(bar_chart(quantity, {"": rows_of_bars(report, name)}))
        groups = {}
        for category in report["categories"] if quantity["better"] else ():
            if rows := rows_of_bars(report, name, category):
                groups[category] = rows
        if groups:
            by_category.append(bar_chart(quantity, groups))
    return grid(overall), grid(by_category)


def rows_of_bars(report, name, category=None):
    """[(place, policy name, entry)] of the policies that have an estimate of the quantity."""
    rows = []
    for place, policy in enumerate(report["policies"]):
        statistics = policy if category is None else policy["by_category"][category]
        if entry := statistics["estimates"].get(name):
            rows.append((place, policy["name"], entry))
    return rows


def legend(report):
    return charts.curve_legend({policy["name"]: place for place, policy in enumerate(report["policies"])})


def curves(report):
    """A chart for each metric that some policy was trained with."""
    drawn, trainings = [], [policy.get("training", {}) for policy in report["policies"]]
    constrained = [training for training in trainings if "lambda" in training]
    for name, unit in report["curves"].items():
        lines = []
        for place, (policy, training) in enumerate(zip(report["policies"], trainings, strict=True)):
            for prefix in ("", "eval_"):
                if prefix + name in training:
                    points, level = training[prefix + name], threshold(name, training)
                    lines.append(Curve(place, policy["name"], bool(prefix), points, level))
        shades = above(constrained[0]) if name == "lambda" and len(constrained) == 1 else ()
        with suppress(ArithmeticError, ValueError, StopIteration):  # numbers too large to plot
            if lines:
                drawn.append(curve_chart(name, unit, lines, shades))
    if not drawn:
        return ""
    words = "Lines with points are of held-out pairs, with 95 % intervals."
    if constrained:
        words += (
            " Lambda rises, shaded where it is of one run, while the expected cost is above its threshold (dotted)."
        )
    return f"{legend(report)}<p>{words}</p>{grid(drawn)}"


def sample(shown_sample):
    """One prompt and what each policy said: an entry of report["samples"]."""
    rows = list(shown_sample["rows"].values())
    parts = [f'<div class="sample"><span class="muted">{shown(shown_sample["why"])}</span>']
    for uri in shown_sample.get("pictures", ()):
        parts.append(f'<img class="picture" src="{shown(uri)}" alt="">')
    parts.append(f'<p class="text prompt" dir="auto">{shown(rows[0]["prompt"])}</p><div class="responses">')
    for place, row in enumerate(rows):
        remarks = [
            f"{words} {number(row[name], digits=2)}" for name, words in SAID.items() if row.get(name) is not None
        ]
        if row["quadrant"]:
            remarks.append(row["quadrant"])
        if not row["finished"]:
            remarks.append(f"cut at {row['tokens']} tokens")
        parts.append(f'<div class="response {series(place)[0]}"><strong class="name">{shown(row["policy"])}</strong>')
        parts.append(f'<p class="text" dir="auto">{shown(row["response"])}</p>')
        parts.append(f'<div class="muted">{shown(", ".join(remarks))}</div></div>')
    return "".join(parts) + "</div></div>"


def samples(report):
    """The samples of each category, of which the first is open."""
    by_category = {}
    for shown_sample in report["samples"]:
        by_category.setdefault(shown_sample["category"], []).append(sample(shown_sample))
    parts = []
    for category, drawn in by_category.items():
        state = "" if parts else OPEN
        parts.append(f"<details{state}><summary>{shown(category)}</summary>{''.join(drawn)}</details>")
    return "".join(parts)


def settings_list(report):
    """What the numbers depend on."""
    settings = report["settings"] | report["versions"]
    settings |= {"base, sha256": report["base_sha256"], "prompts, sha256": report["prompts_sha256"]}
    settings |= {f"{task} reward model": judge for task, judge in report["reward_models"].items()}
    settings |= {policy["name"]: f"{policy['folder']}, sha256 {policy['sha256']}" for policy in report["policies"][1:]}
    parts = []
    for name, value in settings.items():
        words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"<dt>{shown(name)}</dt><dd>{shown(words)}</dd>")
    return f"<dl>{''.join(parts)}</dl>"


def page(report):
    """The whole page."""
    overall, by_category = bars(report)
    names = report["quadrants"]
    swatches = charts.legend(
        [(f'<rect width="34" height="12" class="q{place}" />', names[place]) for place in SAFE_FIRST]
    )
    sections = {
        "Summary": summary_table(report) + f"<ul>{''.join(f'<li>{shown(note)}</li>' for note in report['notes'])}</ul>",
        "Samples": samples(report),
        "Before and after": overall,
        "Quadrants": swatches + quadrant_chart(report) if names[0] in report["quantities"] else "",
        "By category": legend(report) + by_category + category_table(report) if len(report["categories"]) > 1 else "",
        "Training": curves(report),
        "How it was measured": settings_list(report),
    }
    sections = {title: (title.replace(" ", "-"), body) for title, body in sections.items() if body}
    links = "".join(f'<a href="#{anchor}">{title}</a> ' for title, (anchor, _) in sections.items())
    body = "".join(f'<h2 id="{anchor}">{title}</h2>{part}' for title, (anchor, part) in sections.items())
    return charts.document("Alignment report", report["what"], f"<nav>{links}</nav>{body}", STYLE)
