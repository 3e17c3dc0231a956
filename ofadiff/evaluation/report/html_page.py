"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import math
import re
from html import escape
from string import Template

from ofadiff.evaluation.report.quality_plot import DARK, quality_plot
from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import JOINT, TEACHER, Row
from ofadiff.evaluation.report.sample_grid import to_image, to_png

# Images up to this many pixels wide are enlarged without smoothing.
SMALL = 64

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ground: #f4f6f9; --paper: #ffffff; --ink: #1c2430; --soft: #5d6979; --line: #e4e8ee; --accent: #2f5fd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1217; --paper: #171b22; --ink: #e3e8ef; --soft: #93a0b1; --line: #2b323d; --accent: #7ea6ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1100px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { margin: 0 0 6px; font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; text-wrap: balance; }
.lead { margin: 0 0 30px; color: var(--soft); font-size: 17px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.figures div, section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
.figures div { padding: 14px 16px; }
.figures dt { color: var(--soft); font-size: 13px; }
.figures dd { margin: 0; }
.figures .value { font-size: 25px; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.figures .note { color: var(--soft); font-size: 13px; line-height: 1.4; }
dl { margin: 0; }
section { margin-top: 20px; padding: 22px 24px 24px; }
h2 { margin: 0 0 14px; font-size: 17px; letter-spacing: -0.01em; }
.hint { margin: -10px 0 16px; color: var(--soft); font-size: 14px; }
.wide { overflow-x: auto; }
.samples { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 20px; align-items: center; }
.samples .name { font-weight: 600; line-height: 1.25; }
.samples .name small { display: block; color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums; }
.samples .strip { display: grid; gap: 5px; }
.samples img { display: block; width: 100%; border-radius: 3px; }
.pixels img { image-rendering: pixelated; }
.plot img { display: block; max-width: 100%; margin: 0 auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 8px 0 8px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-size: 13px; font-weight: 500; vertical-align: top; line-height: 1.3; }
thead small { display: block; font-size: 12px; font-weight: 400; }
tbody th { font-weight: 600; }
th:first-child { padding-left: 0; text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
tr.teacher > * { color: var(--soft); }
tr.series th { padding-top: 20px; color: var(--accent); font-size: 13px; }
.protocol { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 5px 24px; font-size: 14.5px; }
.protocol dt { color: var(--soft); }
.protocol dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 640px) {
  main { padding: 28px 14px 40px; }
  section { padding: 18px 16px; }
  .samples, .protocol { grid-template-columns: 1fr; }
  .protocol dd { margin-bottom: 6px; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
$figures
$samples
$plot
$table
$protocol
</main>
</body>
</html>
""")


def html_page(report: Results) -> str:
    """The whole report; pictures are data URIs, nothing is loaded from elsewhere."""
    return PAGE.substitute(
        title=escape(report.title),
        lead=escape(_lead(report)),
        figures=_figures(report),
        samples=_samples(report),
        plot=_plot(report),
        table=_table(report),
        protocol=_protocol(report),
    )


def _lead(report: Results) -> str:
    rows = report.series.get(JOINT, [])
    if len(rows) < 2:
        return "One denoiser: its quality and what it costs."
    return f"{len(rows)} sizes of one denoiser, from a single set of weights: what each is worth and what it costs."


def _figures(report: Results) -> str:
    """The smallest size against the teacher, or against the full size where there is no teacher."""
    rows = [row for row in report.series.get(JOINT, []) if row.values.get("params") is not None]
    if not rows:
        return ""
    smallest = min(rows, key=lambda row: row.values["params"] or math.inf)
    full = report.teacher or max(rows, key=lambda row: row.values["params"] or 0)
    name = TEACHER if full is report.teacher else "largest size"
    if smallest is full:
        return ""
    figures = [("Smallest size", report.text(smallest, "params"), f"parameters; {name} {report.text(full, 'params')}")]
    for key, column in report.columns.items():
        heading = f"{column.title[:1].upper()}{column.title[1:]}"
        small, large = smallest.values.get(key), full.values.get(key)
        if key in ("macs", "latency", "memory") and small and large:
            note = f"{report.text(smallest, key)}; {name} {report.text(full, key)}"
            figures.append((heading, f"{small / large - 1:+.0%}".replace("-", "−").replace("%", " %"), note))
        elif column.plotted and small is not None:
            figures.append(
                (heading, report.text(smallest, key), f"at the smallest size; {name} {report.text(full, key)}")
            )
    items = [
        f"<div><dt>{escape(heading)}</dt>"
        f'<dd class="value">{escape(value)}</dd><dd class="note">{_unbroken(note)}</dd></div>'
        for heading, value, note in figures
    ]
    return f'<dl class="figures">{"".join(items)}</dl>'


def _samples(report: Results) -> str:
    if not report.pictured:
        return ""
    parts = []
    for row, images in report.pictured:
        tiles = "".join(
            f'<img alt="{escape(row.name)}, image {number}" src="{_data_uri(to_png(to_image(image)))}">'
            for number, image in enumerate(images, start=1)
        )
        kind = "strip pixels" if images.shape[-1] <= SMALL else "strip"
        parts.append(
            f'<div class="name">{escape(row.name)}<small>{escape(report.subtitle(row))}</small></div>'
            f'<div class="{kind}" style="grid-template-columns: repeat({len(images)}, 1fr)">{tiles}</div>'
        )
    hint = "A column is a seed: the same noise for every size."
    return f'<section><h2>Samples</h2><p class="hint">{hint}</p><div class="samples">{"".join(parts)}</div></section>'


def _plot(report: Results) -> str:
    light, dark = quality_plot(report), quality_plot(report, DARK)
    if light is None or dark is None:
        return ""
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img alt="Quality against parameters" src="{_data_uri(light)}"></picture>'
    )
    return f'<section class="plot"><h2>Quality against size</h2>{picture}</section>'


def _table(report: Results) -> str:
    titles = [(column.title, report.unit(name)) for name, column in report.columns.items()]
    heading = "".join(
        f"<th>{escape(title)}<small>{escape(unit)}</small></th>" for title, unit in [("size", ""), *titles]
    )
    lines = [] if report.teacher is None else [_line(report, report.teacher, ' class="teacher"')]
    for series, rows in report.series.items():
        if series != JOINT:
            lines.append(f'<tr class="series"><th colspan="{len(report.columns) + 1}">{escape(series)}</th></tr>')
        lines += [_line(report, row) for row in rows]
    table = f"<table><thead><tr>{heading}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<section><h2>Every size</h2><div class="wide">{table}</div></section>'


def _line(report: Results, row: Row, attributes: str = "") -> str:
    label, *cells = report.cells(row)
    return f"<tr{attributes}><th>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _protocol(report: Results) -> str:
    entries = [
        (name, f"<code>{escape(str(value))}</code>" if name == "command" else escape(str(value)))
        for name, value in report.protocol.items()
    ]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in entries)
    return f'<section><h2>Protocol</h2><dl class="protocol">{items}</dl></section>' if items else ""


def _unbroken(text: str) -> str:
    """Text whose numbers stay on one line with their units."""
    return re.sub(r"(?<=\d) (?=\S)", "&nbsp;", escape(text))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
