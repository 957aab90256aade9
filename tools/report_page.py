"""What report.json of evaluate_alignment.py holds -> one HTML page, drawn with charts.py: tables, bars with whiskers,
curves of training, samples side by side.  On a narrow screen a table's row becomes a block with a line for each column.
"""

import json

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
    sign, of = "+" if difference and entry["mean"] > 0 else "", " points" if difference else " %"
    return sign + mean + (of if unit == "%" else ""), f"[{low}, {high}]"


def change(entry, better):
    """What a difference to the base amounts to: better, worse, higher, lower, or nothing that is clear."""
    if entry["low"] <= 0 <= entry["high"]:
        return ""
    way = "higher" if entry["mean"] > 0 else "lower"
    return way if not better else "better" if way == better else "worse"


# -- tables ----------------------------------------------------------------------------------------------------------


def cell(found, name, quantity, kinds=("estimates", "differences")):
    """The mean of a quantity in `found` and, where there is one, its difference to the base."""
    lines = []
    for kind in kinds:
        if entry := found[kind].get(name):
            mean, interval = with_interval(entry, quantity["unit"], kind == "differences")
            clear = change(entry, quantity["better"]) if kind == "differences" else ""
            mean = f'<span class="mean{" clear" * bool(clear)}">{mean} {clear}</span>'
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
    return SCROLLS * (len(heads) > 4) + box


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
    quantities = report["quantities"].items()
    rows = [
        [f"{shown(category)}<br />{shown(policy['name'])}"]
        + [cell(policy["by_category"][category], *item, kinds=["estimates"]) for item in quantities]
        for category in report["categories"]
        for policy in report["policies"]
    ]
    return table("category, policy", [quantity["label"] for _, quantity in quantities], rows)


# -- charts ----------------------------------------------------------------------------------------------------------


def bar_chart(quantity, groups):
    """Bars from zero with whiskers; groups {heading: [(place, policy name, entry)]}.  Under the heading "" each bar has
    its name and number above it."""
    entries, unit = [entry for rows in groups.values() for _, _, entry in rows], quantity["unit"]
    at = ticks(min(0, *(entry["low"] for entry in entries)), max(0, *(entry["high"] for entry in entries)))
    x, y, bars, words = scale(at[0], at[-1], LEFT, RIGHT), 2, [], []
    for heading, rows in groups.items():
        if heading:
            bars.append(label(LEFT, y + 14, heading))
            y += 20
        for place, name, entry in rows:
            mean, interval = with_interval(entry, unit)
            words.append(f"{heading} {name} {mean} {interval}".strip())
            if not heading:
                bars += [label(LEFT, y + 13, name[:24]), label(RIGHT, y + 13, f"{mean} {interval}", "end")]
                y += 18
            thick = 7 if heading else 13
            bars += [line(x(value), y - 2, x(value), y + thick + 2, "axis" if not value else "rule") for value in at]
            left, right = sorted((x(0), x(entry["mean"])))
            bars.append(f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{thick}" ')
            bars.append(f'fill="currentColor" class="{series(place)[0]}" />')
            low, high, middle = x(entry["low"]), x(entry["high"]), y + thick / 2
            for kind in ("halo", "axis"):  # the whisker stands out on its bar
                bars.append(line(low, middle, high, middle, kind))
                bars += [line(end, middle - 3, end, middle + 3, kind) for end in (low, high)]
            y += thick + (3 if heading else 8)
        y += 6 * bool(heading)
    below = [label(x(value), y + 14, tick(value, unit), "middle", "soft") for value in at]
    below.append(label((LEFT + RIGHT) / 2, y + 31, described(quantity), "middle", "soft"))
    return figure(quantity["label"], y + 37, bars + below, f"{quantity['label']}: {'; '.join(words)}")


def quadrant_chart(report):
    """One bar per adapter from all that is safe to all that is not."""
    names, y, drawn, words = report["quadrants"], 2, [], []
    for policy in report["policies"][1:]:
        drawn.append(label(LEFT, y + 13, policy["name"][:40]))
        x, y = LEFT, y + 18
        for place in (0, 2, 1, 3):
            share = policy["estimates"][names[place]]["mean"]
            wide = share * (RIGHT - LEFT)
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{max(0, wide - 1):.1f}" height="24" class="q{place}" />')
            if wide > 32:
                drawn.append(label(x + wide / 2, y + 16, f"{100 * share:.0f} %", "middle", f"q{place}i"))
            words.append(f"{policy['name']} {names[place]} {100 * share:.1f} %")
            x += wide
        y += 34
    drawn.append(label((LEFT + RIGHT) / 2, y + 8, "% of responses, safe to the left", "middle", "soft"))
    return figure("Quadrants against the base", y + 16, drawn, "; ".join(words))


# -- sections --------------------------------------------------------------------------------------------------------


def bars(report):
    """Bars of each quantity over all prompts; and by category of those of which more or less is better."""
    places, overall, by_category = list(enumerate(report["policies"])), [], []
    for name, quantity in report["quantities"].items():
        if name in report["quadrants"] or name.startswith("harmless_score_"):
            continue
        parts = {"": [(place, policy["name"], policy["estimates"].get(name)) for place, policy in places]}
        for category in report["categories"] if quantity["better"] else ():
            estimates = [policy["by_category"][category]["estimates"] for policy in report["policies"]]
            parts[category] = [(place, policy["name"], estimates[place].get(name)) for place, policy in places]
        parts = {heading: [row for row in rows if row[2]] for heading, rows in parts.items()}
        overall.append(bar_chart(quantity, {"": parts.pop("")}))
        if parts := {heading: rows for heading, rows in parts.items() if rows}:
            by_category.append(bar_chart(quantity, parts))
    return grid(overall), grid(by_category)


def legend(report):
    return charts.curve_legend({policy["name"]: place for place, policy in enumerate(report["policies"])})


def curves(report):
    drawn = []
    for name, unit in report["curves"].items():
        lines = [
            Curve(place, policy["name"], bool(prefix), training[prefix + name], threshold(name, training))
            for place, policy in enumerate(report["policies"])
            for training in [policy.get("training", {})]
            for prefix in ("", "eval_")
            if prefix + name in training
        ]
        risen = [above(policy["training"]) for policy in report["policies"] if "lambda" in policy.get("training", ())]
        drawn += [curve_chart(name, unit, lines, *risen * (name == "lambda" and len(risen) == 1))] if lines else []
    words = "Lines with points are of held-out pairs, with 95 % intervals."
    if any("lambda" in policy.get("training", ()) for policy in report["policies"]):
        words += (
            " Lambda rises, shaded where it is of one run, while the expected cost is above its threshold (dotted)."
        )
    return drawn and f"{legend(report)}<p>{words}</p>{grid(drawn)}"


def sample(found):
    """One prompt and what each policy said."""
    rows = list(found["rows"].values())
    parts = [f'<div class="sample"><span class="muted">{shown(found["why"])}</span>']
    parts.append(f'<p class="text prompt" dir="auto">{shown(rows[0]["prompt"])}</p><div class="responses">')
    for place, row in enumerate(rows):
        facts = [f"{words} {number(row[name], digits=2)}" for name, words in SAID.items() if row.get(name) is not None]
        facts += [row["quadrant"]] if row["quadrant"] else []
        facts += [] if row["finished"] else [f"cut at {row['tokens']} tokens"]
        parts.append(f'<div class="response {series(place)[0]}"><strong class="name">{shown(row["policy"])}</strong>')
        parts.append(f'<p class="text" dir="auto">{shown(row["response"])}</p>')
        parts.append(f'<div class="muted">{shown(", ".join(facts))}</div></div>')
    return "".join(parts) + "</div></div>"


def samples(report):
    categories = dict.fromkeys(found["category"] for found in report["samples"])
    return "".join(
        f"<details{OPEN * (not place)}><summary>{shown(category)}</summary>"
        + "".join(sample(found) for found in report["samples"] if found["category"] == category)
        + "</details>"
        for place, category in enumerate(categories)
    )


def settings_list(report):
    """What the numbers depend on."""
    facts = report["settings"] | report["versions"]
    facts |= {"base, sha256": report["base_sha256"], "prompts, sha256": report["prompts_sha256"]}
    facts |= {f"{task} reward model": judge for task, judge in report["reward_models"].items()}
    facts |= {policy["name"]: f"{policy['folder']}, sha256 {policy['sha256']}" for policy in report["policies"][1:]}
    words = (
        (name, fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False)) for name, fact in facts.items()
    )
    return f"<dl>{''.join(f'<dt>{shown(name)}</dt><dd>{shown(fact)}</dd>' for name, fact in words)}</dl>"


def page(report):
    """The whole page."""
    overall, by_category = bars(report)
    swatch, names = '<rect width="34" height="12" class="q{}" />', report["quadrants"]
    swatches = charts.legend([(swatch.format(place), names[place]) for place in (0, 2, 1, 3)])
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
