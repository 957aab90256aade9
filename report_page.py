"""What report.json of evaluate_alignment.py holds -> one HTML page that needs nothing else: style and pictures stand in
it, no script, no font or file from elsewhere.  Light and dark, narrow and wide; each chart has its numbers in words.

Whatever comes from data (names, prompts, responses) goes through `shown`, which escapes it, and the page's own policy
forbids scripts and loading besides.  The page is also well-formed XML.
"""

import html
import json
import math
import re

WIDTH, LEFT, RIGHT = 340, 18, 322  # of a chart and of what it plots; its text is 12 high
SERIES, DASHES = 4, ("", "", "7 3", "2 3", "9 3 2 3")  # colours of adapters, which take turns; dashes of curves
SAID = {  # below a sample
    "helpful_reward": "helpful reward",
    "harmless_score": "harmless score",
    "helpful": "helpful by the rule",
    "harmful": "harmful by the rule",
    "kl": "KL to the base",
}

STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --panel: #f4f5f7; --ink: #1a1d21; --muted: #555d67; --line: #c5cad2;
  --s0: #69717d; --s1: #0b62a8; --s2: #c05600; --s3: #660011; --s4: #4c00e6;
  --q0: #0b4f8a; --q1: #d0700f; --q2: #4a8cc2; --q3: #8a2a10; --q0i: #fff; --q1i: #000; --q2i: #000; --q3i: #fff; }
@media screen and (prefers-color-scheme: dark) {
  :root { --bg: #14171b; --panel: #1e2228; --ink: #e8eaed; --muted: #a6aeb8; --line: #434b56;
    --s0: #98a1ac; --s1: #62aef0; --s2: #f09a45; --s3: #73ffb9; --s4: #a553ff;
    --q0: #85c5f8; --q1: #f2a65a; --q2: #397ab2; --q3: #cf5a3c; --q0i: #000; --q1i: #000; --q2i: #fff; --q3i: #000; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1560px; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 4rem; background: var(--bg);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei",
  "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.6rem 0; } h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; }
p, ul { max-width: 80ch; margin: 0.5rem 0; } ul { padding-left: 1.2rem; } a { color: var(--s1); }
nav a { margin-right: 1rem; white-space: nowrap; } .muted, .ci { color: var(--muted); }
.lead { font-size: 1.05rem; } .ci { font-size: 0.85em; white-space: nowrap; } .name { overflow-wrap: anywhere; }
.box { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.7rem; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; } thead th { background: var(--panel); } th { font-weight: 600; }
tbody th { font-weight: 500; min-width: 8.3rem; max-width: 17rem; overflow-wrap: anywhere; background: var(--bg);
  position: sticky; left: 0; } th .ci { white-space: normal; }
.mean { white-space: nowrap; } .clear { font-weight: 600; } td > div { margin-bottom: 0.1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 0.2rem; }
svg { display: block; width: 100%; max-width: 460px; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
.soft { fill: var(--muted); } .rule { stroke: var(--line); } .axis { stroke: var(--ink); }
.halo { stroke: var(--bg); stroke-width: 2.6; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; max-width: none; }
.legend svg { display: inline-block; width: 34px; height: 12px; margin-right: 0.4rem; vertical-align: middle; }
.sample { border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem 0.9rem; margin: 0.9rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.2rem 0 0.5rem; max-width: none; }
.prompt { background: var(--panel); border-radius: 4px; padding: 0.4rem 0.6rem; }
.responses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.8rem; }
.response { border-left: 4px solid currentColor; padding-left: 0.7rem; min-width: 0; }
.response > * { color: var(--ink); } .response .muted { color: var(--muted); font-size: 0.85rem; }
summary { cursor: pointer; font-weight: 600; padding: 0.3rem 0; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: 0.1rem 1rem; font-size: 0.88rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { padding: 0; font-size: 10pt; max-width: none; } nav { display: none; } .box { overflow: visible; }
  figure, .response, tr { break-inside: avoid; } h2, .legend { break-after: avoid; } table { font-size: 7pt; }
  .mean, .ci { white-space: normal; } th, td { padding: 0.15rem 0.2rem; } tbody th { min-width: 0; position: static; }
  .charts { grid-template-columns: repeat(3, 1fr); } * { print-color-adjust: exact; } }
"""
STYLE += "".join(f".s{n} {{ color: var(--s{n}); }} " for n in range(SERIES + 1))
STYLE += "".join(f".q{n} {{ fill: var(--q{n}); }} .q{n}i {{ fill: var(--q{n}i); }} " for n in range(4))


# -- words and numbers -----------------------------------------------------------------------------------------------


def shown(text):
    """Text for HTML: escaped, and control characters as their pictures, since a byte-level model may say any."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match.group())), str(text))
    return html.escape(re.sub(r"[\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))


def number(value, unit="", digits=None):
    """A number as a person writes it; of unit % in per cent."""
    value, digits = (100 * value, 1) if unit == "%" else (value, digits_of(value) if digits is None else digits)
    return f"{value:.{digits}f}".replace("-0." + "0" * digits, "0." + "0" * digits).replace("-", "\u2212")


def digits_of(*values):
    largest = max(map(abs, values))
    return 3 if largest < 1 else 2 if largest < 100 else 1


def with_interval(entry, unit, difference=False):
    """(mean, its interval) in words, with as many digits; a difference of shares is in points."""
    digits = digits_of(entry["mean"], entry["low"], entry["high"])
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
    return f"<td>{''.join(lines) or '–'}</td>"


def table(heads, rows):
    heads = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>' for head, *cells in rows)
    return f'<div class="box" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def described(quantity):
    unit = "% of responses" if quantity["unit"] == "%" else quantity["unit"]
    return unit + (f", {quantity['better']} is better" if quantity["better"] else "")


def summary_table(report):
    rows = [
        [f'{shown(quantity["label"])}<br /><span class="ci">{shown(described(quantity))}</span>']
        + [cell(policy, name, quantity) for policy in report["policies"]]
        for name, quantity in report["quantities"].items()
    ]
    names = [f'<span class="name">{shown(policy["name"])}</span>' for policy in report["policies"]]
    return table(["mean, and difference to the base", *names], rows)


def category_table(report):
    quantities = report["quantities"].items()
    rows = [
        [f"{shown(category)}<br />{shown(policy['name'])}"]
        + [cell(policy["by_category"][category], *item, kinds=["estimates"]) for item in quantities]
        for category in report["categories"]
        for policy in report["policies"]
    ]
    return table(["category, policy", *(shown(quantity["label"]) for _, quantity in quantities)], rows)


# -- charts: SVG in units of which text is 12 high ---------------------------------------------------------------------


def ticks(low, high, wanted=4):
    """Evenly spaced round numbers that cover [low, high]."""
    rough = (high - low) / wanted or 0.25
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def tick(value, unit=""):
    return f"{round(value * (100 if unit == '%' else 1), 9):g}".replace("-", "\u2212")


def scale(low, high, start, end):
    """A map of [low, high] to [start, end]."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def label(x, y, text, anchor="start", kind=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{shown(text)}</text>'


def line(x1, y1, x2, y2, kind):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" />'


def figure(caption, height, drawn, words):
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{shown(words)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{shown(caption)}</figcaption>{svg}</figure>"


def series(place):
    """Class and dashes of the policy at a place: the base is grey, the others take turns."""
    return f"s{1 + (place - 1) % SERIES if place else 0}", DASHES[place % len(DASHES)]


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


def curve_chart(name, unit, lines):
    """Values over updates; lines [(place, policy name, is of held-out pairs, [[step, value], ...])]."""
    steps, values = zip(*(point for *_, points in lines for point in points))
    across, up = ticks(0, max(steps)), ticks(min(values), max(values))
    x, y = scale(across[0], across[-1], 48, RIGHT), scale(up[0], up[-1], 170, 22)
    drawn = [line(48, y(value), RIGHT, y(value), "axis" if not value else "rule") for value in up]
    drawn += [label(43, y(value) + 4, tick(value), "end", "soft") for value in up]
    drawn += [label(x(step), 186, tick(step), "middle", "soft") for step in across]
    drawn += [label(LEFT, 12, unit, kind="soft"), label(RIGHT, 203, "updates", "end", "soft")]
    words = []
    for place, policy, held_out, points in lines:
        kind, dashes = series(place)
        way = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        style = f'fill="none" stroke="currentColor" stroke-width="{1 if held_out else 2}" stroke-dasharray="{dashes}"'
        drawn.append(f'<polyline points="{way}" {style} class="{kind}" />')
        for step, value in points if held_out or len(points) == 1 else ():
            drawn.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="4" fill="currentColor" class="{kind}" />')
        first, last = (f"{number(value)} at update {step}" for step, value in (points[0], points[-1]))
        words.append(f"{policy}{' held out' * held_out} from {first} to {last}")
    return figure(name, 210, drawn, f"{name}: {'; '.join(words)}")


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


def legend(entries):
    """entries [(a drawing 34 x 12, words)]."""
    svg = '<svg viewBox="0 0 34 12" aria-hidden="true">'
    items = (f"<li>{svg}{drawing}</svg>{shown(words)}</li>" for drawing, words in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def policy_legend(report):
    def drawing(place):
        kind, dashes = series(place)
        return f'<path d="M0 6H34" stroke="currentColor" stroke-width="5" stroke-dasharray="{dashes}" class="{kind}" />'

    return legend([(drawing(place), policy["name"]) for place, policy in enumerate(report["policies"])])


# -- sections --------------------------------------------------------------------------------------------------------


def grid(drawn):
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


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
        if quantity["better"]:
            by_category.append(bar_chart(quantity, {heading: rows for heading, rows in parts.items() if rows}))
    return grid(overall), grid(by_category)


def curves(report):
    drawn = []
    for name, unit in report["curves"].items():
        lines = [
            (place, policy["name"], bool(prefix), policy["training"][prefix + name])
            for place, policy in enumerate(report["policies"])
            for prefix in ("", "eval_")
            if prefix + name in policy.get("training", ())
        ]
        drawn += [curve_chart(name, unit, lines)] if lines else []
    return drawn and f"{policy_legend(report)}<p>Lines with points are of held-out pairs.</p>{grid(drawn)}"


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
        f'<details open=""><summary>{shown(category)}</summary>'
        + "".join(sample(found) for found in report["samples"] if found["category"] == category)
        + "</details>"
        for category in categories
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
    swatches = legend([(swatch.format(place), names[place]) for place in (0, 2, 1, 3)])
    sections = {
        "Summary": summary_table(report) + f"<ul>{''.join(f'<li>{shown(note)}</li>' for note in report['notes'])}</ul>",
        "Before and after": overall,
        "Quadrants": swatches + quadrant_chart(report) if names[0] in report["quantities"] else "",
        "By category": policy_legend(report) + by_category + category_table(report)
        if len(report["categories"]) > 1
        else "",
        "Training": curves(report),
        "Samples": samples(report),
        "How it was measured": settings_list(report),
    }
    sections = {title: (title.replace(" ", "-"), body) for title, body in sections.items() if body}
    links = "".join(f'<a href="#{anchor}">{title}</a> ' for title, (anchor, _) in sections.items())
    body = "".join(f'<h2 id="{anchor}">{title}</h2>{part}' for title, (anchor, part) in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\" />"
        f"<title>Alignment report</title><style>{STYLE}</style></head><body><main><h1>Alignment report</h1>"
        f'<p class="lead">{shown(report["what"])}</p><nav>{links}</nav>{body}</main></body></html>\n'
    )
