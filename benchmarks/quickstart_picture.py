"""docs/quickstart.svg: the result of `bash quickstart.sh` as bars, from its report.json.

python benchmarks/quickstart_picture.py outputs/quickstart/report/report.json >docs/quickstart.svg
"""

import html
import json
import sys

PANELS = {
    "rule_helpful": ("helpful answers where help is due", "0 to 1, more is better"),
    "rule_harm_rate": ("harmful answers to harmful prompts", "less is better"),
}
NAMES = {"base": "before", "dpo": "DPO on helpful pairs", "safe_mm_dpo": "Safe-MM-DPO"}
COLOURS = {"base": ("#6e7781", "#8b949e"), "dpo": ("#cf222e", "#ff7b72"), "safe_mm_dpo": ("#0969da", "#58a6ff")}
LABELS, BAR, PANEL, ROW, TOP = 150, 210, 290, 30, 56  # widths of names, of a bar of 1, of a panel; heights


def picture(report):
    """SVG text: a bar with its 95 % interval for each policy, help on the left and harm on the right."""
    theme = "text {{ fill: {0} }} .ci {{ stroke: {0} }} .axis {{ stroke: {1} }} .muted {{ fill: {2} }} "
    theme += ".paper {{ fill: {3} }} "
    light = theme.format("#24292f", "#d0d7de", "#57606a", "#ffffff")
    dark = theme.format("#e6edf3", "#3d444d", "#9198a1", "#0d1117")
    for name, colours in COLOURS.items():
        light, dark = (f"{css}.{name} {{ fill: {c} }} " for css, c in zip((light, dark), colours, strict=True))
    width, height = LABELS + 2 * PANEL, TOP + ROW * len(report["policies"]) + 6
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{html.escape(in_words(report))}</title>",
        f"<style>{light}@media (prefers-color-scheme: dark) {{ {dark}}}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
    ]
    for row, policy in enumerate(report["policies"]):
        svg.append(f'<text x="8" y="{TOP + ROW * row + 17}">{NAMES[policy["name"]]}</text>')
    for panel, (quantity, (title, hint)) in enumerate(PANELS.items()):
        left = LABELS + PANEL * panel
        svg.append(f'<text x="{left}" y="20" font-weight="600">{title}</text>')
        svg.append(f'<text class="muted" x="{left}" y="38" font-size="12">{hint}</text>')
        for row, policy in enumerate(report["policies"]):
            top, entry = TOP + ROW * row, policy["estimates"][quantity]
            low, end, high = (left + BAR * entry[key] for key in ("low", "mean", "high"))
            size = f'width="{end - left:.1f}" height="20"'
            svg.append(f'<rect class="{policy["name"]}" x="{left}" y="{top + 2}" {size}/>')
            svg.append(f'<path class="ci" d="M{low:.1f} {top + 12}H{high:.1f}"/>')
            svg.append(f'<text x="{max(end, high) + 8:.1f}" y="{top + 17}">{value(quantity, entry)}</text>')
        svg.append(f'<path class="axis" d="M{left} {TOP - 4}V{height - 6}"/>')
    return "\n".join([*svg, "</svg>"])


def value(quantity, entry):
    return f"{100 * entry['mean']:.0f} %" if quantity == "rule_harm_rate" else f"{entry['mean']:.2f}"


def in_words(report):
    """What the picture shows, for those who do not see it."""
    said = []
    for quantity, (title, _) in PANELS.items():
        numbers = [f"{NAMES[p['name']]} {value(quantity, p['estimates'][quantity])}" for p in report["policies"]]
        said.append(f"{title}: {', '.join(numbers)}")
    return "; ".join(said)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(picture(json.load(file)))
