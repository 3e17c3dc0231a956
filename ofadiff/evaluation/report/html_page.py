"""The report as one HTML file that needs nothing else; `page.html.jinja` says how it looks."""

from __future__ import annotations

import base64
import math
import re

import torch

from ofadiff.evaluation.report.quality_plot import DARK, quality_plot
from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import JOINT, TEACHER
from ofadiff.evaluation.report.sample_grid import to_image, to_png

TEMPLATE = "page.html.jinja"

# Images up to this many pixels wide are enlarged without smoothing.
SMALL = 64


def html_page(report: Results) -> str:
    """The whole report; pictures are data URIs, nothing is loaded from elsewhere.

    Raises:
        ImportError: If Jinja is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("the report needs Jinja: pip install ofadiff[eval]") from error

    environment = Environment(loader=PackageLoader("ofadiff.evaluation.report", "."), autoescape=True)
    environment.filters |= {"picture": picture, "unbroken": unbroken}
    light, dark = quality_plot(report), quality_plot(report, DARK)
    plots = None if light is None or dark is None else {"light": data_uri(light), "dark": data_uri(dark)}
    titles = [("size", ""), *((column.title, report.unit(name)) for name, column in report.columns.items())]
    return environment.get_template(TEMPLATE).render(
        report=report, lead=lead(report), figures=figures(report), plots=plots, titles=titles, joint=JOINT, small=SMALL
    )


def lead(report: Results) -> str:
    """What the report is about, in a sentence."""
    rows = report.series.get(JOINT, [])
    if len(rows) < 2:
        return "One denoiser: its quality and what it costs."
    return f"{len(rows)} sizes of one denoiser, from a single set of weights: what each is worth and what it costs."


def figures(report: Results) -> list[tuple[str, str, str]]:
    """The smallest size against the teacher, or against the full size without one: headings, values and notes."""
    rows = [row for row in report.series.get(JOINT, []) if row.values.get("params") is not None]
    if not rows:
        return []
    smallest = min(rows, key=lambda row: row.values["params"] or math.inf)
    full = report.teacher or max(rows, key=lambda row: row.values["params"] or 0)
    name = TEACHER if full is report.teacher else "largest size"
    if smallest is full:
        return []
    found = [("Smallest size", report.text(smallest, "params"), f"parameters; {name} {report.text(full, 'params')}")]
    for key, column in report.columns.items():
        heading = f"{column.title[:1].upper()}{column.title[1:]}"
        small, large = smallest.values.get(key), full.values.get(key)
        if key in ("macs", "latency", "memory") and small and large:
            note = f"{report.text(smallest, key)}; {name} {report.text(full, key)}"
            found.append((heading, f"{small / large - 1:+.0%}".replace("-", "−").replace("%", " %"), note))
        elif column.plotted and small is not None:
            note = f"at the smallest size; {name} {report.text(full, key)}"
            found.append((heading, report.text(smallest, key), note))
    return found


def picture(image: torch.Tensor) -> str:
    """A uint8 image, `(3, H, W)`, as a data URI."""
    return data_uri(to_png(to_image(image)))


def unbroken(text: str) -> str:
    """Text whose numbers stay on one line with their units."""
    return re.sub(r"(?<=\d) (?=\S)", "\N{NO-BREAK SPACE}", text)


def data_uri(png: bytes) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
