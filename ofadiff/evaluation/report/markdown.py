"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import JOINT, Row


def markdown_page(report: Results, pictures: Sequence[str]) -> str:
    """One table per series, the pictures that lie beside it by file name, and the protocol."""
    series = report.series
    first = [*([report.teacher] if report.teacher else []), *series.pop(JOINT, [])]
    parts = [f"# {_escape(report.title)}", _table(report, first)]
    for name, rows in series.items():
        parts += [f"## {_escape(name[:1].upper() + name[1:])}", _table(report, rows)]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    protocol = "\n".join(f"- {_escape(name)}: {_escape(str(value))}" for name, value in report.protocol.items())
    parts += ["## Protocol", protocol]
    return "\n\n".join(parts) + "\n"


def _table(report: Results, rows: Sequence[Row]) -> str:
    heading = report.heading()
    lines = [heading, ["---:"] * len(heading), *(report.cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(text: str) -> str:
    """Text that is neither a cell's end nor HTML."""
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
