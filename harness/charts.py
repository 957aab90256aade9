"""HTML pages that need nothing else: style and pictures (SVG) stand in the file, no script, no font or file from
elsewhere.  Light and dark, narrow and wide; each chart has its numbers in words.

Whatever comes from data (names, prompts, responses) goes through `shown`, which escapes it, and the page's own policy
forbids scripts and loading besides.  A page is also well-formed XML.
"""

import html
import math
import re
from typing import NamedTuple

WIDTH, LEFT, RIGHT = 340, 18, 322  # of a chart and of what it plots; its text is 12 high
START = 52  # of the updates in a chart of curves, right of its numbers
SERIES, DASHES = 4, ("", "", "7 3", "2 3", "9 3 2 3")  # colours of curves, which take turns; their dashes

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
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.6rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; }
p, ul { max-width: 80ch; margin: 0.5rem 0; } ul { padding-left: 1.2rem; } a { color: var(--s1); }
nav a { margin-right: 1rem; white-space: nowrap; } .muted, .ci { color: var(--muted); }
.lead { font-size: 1.05rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 0.2rem; }
svg { display: block; width: 100%; max-width: 460px; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
.soft { fill: var(--muted); } .rule { stroke: var(--line); } .axis { stroke: var(--ink); }
.shade { fill: var(--panel); } .level { stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 1 3; }
.halo { stroke: var(--bg); stroke-width: 2.6; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; max-width: none; }
.legend svg { display: inline-block; width: 34px; height: 12px; margin-right: 0.4rem; vertical-align: middle; }
figure .legend { font-size: 0.85rem; margin: 0; gap: 0 0.9rem; }
@media print { body { padding: 0; font-size: 10pt; max-width: none; } nav { display: none; }
  figure { break-inside: avoid; } h2, .legend { break-after: avoid; }
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


# -- charts: SVG in units of which text is 12 high ---------------------------------------------------------------------


def ticks(low, high, wanted=4):
    """Evenly spaced round numbers that cover [low, high]."""
    rough = max((high - low) / wanted, 1e-9 * max(abs(low), abs(high))) or 0.25  # finer steps are lost in rounding
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def tick(value, unit=""):
    value = value * 100 if unit == "%" else value
    few = f"{value:.2g}".replace("e-0", "e-") if 0 < abs(value) < 1e-4 else f"{round(value, 9):g}"
    return few.replace("-", "\u2212")


def scale(low, high, start, end):
    """A map of [low, high] to [start, end]."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def label(x, y, text, anchor="start", kind=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{shown(text)}</text>'


def line(x1, y1, x2, y2, kind):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" />'


def figure(caption, height, drawn, words, below=""):
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{shown(words)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{shown(caption)}</figcaption>{below}{svg}</figure>"


def series(place):
    """Class and dashes of a curve by its place: the first is grey (the base's), the others take turns."""
    colour = 1 + (place - 1) % SERIES if place else 0
    return f"s{colour}", DASHES[place % len(DASHES)]


class Curve(NamedTuple):
    place: int  # of its colour and dashes
    name: str
    held_out: bool  # drawn thin, with points
    points: list  # [step, value], or [step, value, half of its 95 % interval]
    level: float | None = None  # a threshold, drawn across


def curve_chart(caption, unit, curves, shades=(), named=False):
    """Values over updates.  shades [(first, last)]: updates to shade; named: the figure brings its own legend."""
    least, most = (0, 1) if unit.startswith("share") else (-math.inf, math.inf)  # an interval ends there
    values, levels = [], dict.fromkeys(number(curve.level) for curve in curves if curve.level is not None)
    for curve in curves:
        if curve.level is not None:
            values.append(curve.level)
        for _, value, *half in curve.points:
            values += [max(least, value - sum(half)), min(most, value + sum(half))]
    across, up = ticks(0, max(curve.points[-1][0] for curve in curves)), ticks(min(values), max(values))
    x, y = scale(across[0], across[-1], START, RIGHT), scale(up[0], up[-1], 170, 22)
    drawn = [
        f'<rect x="{x(first):.1f}" y="22" width="{max(0.5, x(last) - x(first)):.1f}" height="148" class="shade" />'
        for first, last in shades
    ]
    drawn += [line(START, y(value), RIGHT, y(value), "axis" if not value else "rule") for value in up]
    drawn += [label(START - 5, y(value) + 4, tick(value), "end", "soft") for value in up]
    drawn += [label(x(step), 186, tick(step), "middle", "soft") for step in across]
    if levels:
        unit += f"; dotted: threshold {', '.join(levels)}"
    drawn += [label(LEFT, 12, unit, kind="soft"), label(RIGHT, 203, "updates", "end", "soft")]
    words = []
    for place, name, held_out, points, level in curves:
        kind, dashes = series(place)
        corners = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value, *_ in points)
        style = f'fill="none" stroke="currentColor" stroke-width="{1 if held_out else 2}" stroke-dasharray="{dashes}"'
        drawn.append(f'<polyline points="{corners}" {style} class="{kind}" />')
        shows_points = held_out or len(points) == 1
        for step, value, *half in points if shows_points else ():
            if half:  # the whisker of its interval
                low, high = y(max(least, value - half[0])), y(min(most, value + half[0]))
                drawn.append(f'<path d="M{x(step):.1f} {low:.1f}V{high:.1f}" stroke="currentColor" ')
                drawn.append(f'stroke-width="1.5" class="{kind}" />')
            drawn.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="4" fill="currentColor" class="{kind}" />')
        first, last = (f"{number(value)} at update {step}" for step, value, *_ in (points[0], points[-1]))
        words.append(f"{name}{' held out' if held_out else ''} from {first} to {last}")
        if level is not None:
            drawn.append(line(START, y(level), RIGHT, y(level), f"level {kind}"))
            words.append(f"threshold {number(level)}")
    below = curve_legend({curve.name: curve.place for curve in curves}) if named else ""
    return figure(caption, 210, drawn, f"{caption}: {'; '.join(words)}", below)


def legend(entries):
    """entries [(a drawing 34 x 12, words)]."""
    svg = '<svg viewBox="0 0 34 12" aria-hidden="true">'
    items = (f"<li>{svg}{drawing}</svg>{shown(words)}</li>" for drawing, words in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def curve_legend(places):
    """places {name: its place among the curves}."""

    def drawing(place):
        kind, dashes = series(place)
        return f'<path d="M0 6H34" stroke="currentColor" stroke-width="5" stroke-dasharray="{dashes}" class="{kind}" />'

    return legend([(drawing(place), name) for name, place in places.items()])


def grid(drawn):
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a page asks for nothing from anywhere


def document(title, lead, body, style=STYLE):
    """The whole page; `lead` is text, `body` HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}" />'
        f"<title>{shown(title)}</title><style>{style}</style></head><body><main><h1>{shown(title)}</h1>"
        f'<p class="lead">{shown(lead)}</p>{body}</main></body></html>\n'
    )
