"""The report: one row per model, written as JSON, Markdown, HTML and pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ofadiff.evaluation.report.html_page import html_page
from ofadiff.evaluation.report.markdown import markdown_page
from ofadiff.evaluation.report.quality_plot import quality_plot
from ofadiff.evaluation.report.results import Results
from ofadiff.evaluation.report.rows import JOINT, MISSED_NOTE, Column, Row
from ofadiff.evaluation.report.sample_grid import sample_grid
from ofadiff.reading.json_file import read_json


class Report(Results):
    """Results, and the files that show them.

    Its arguments are those of `Results`.
    """

    def table(self) -> str:
        """The rows as plain text, for a terminal."""
        lines = [self.heading(), *([] if self.teacher is None else [self.cells(self.teacher)])]
        groups: dict[int, str] = {}
        for series, rows in self.series.items():
            if series != JOINT:
                groups[len(lines)] = series
            lines += [self.cells(row) for row in rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = []
        for number, line in enumerate(lines):
            if number in groups:
                text += ["", groups[number]]
            text.append("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
            if number == 0:
                text.append("  ".join("─" * width for width in widths))
        if any(map(self.missed, self.rows)):
            text.append(MISSED_NOTE)
        return "\n".join(text)

    def to_json(self) -> str:
        """Everything but the images, as strict JSON."""
        content = {
            "title": self.title,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "rows": [asdict(row) for row in self.rows],
            "protocol": self.protocol,
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """The report of a `report.json`, without images.

        Raises:
            ValueError: If the file is no such report.
        """
        try:
            content = read_json(path)
            return cls(
                content["title"],
                {name: Column(**column) for name, column in content["columns"].items()},
                [Row(**row) for row in content["rows"]],
                content["protocol"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no report of ofadiff: {error!r}") from error

    def write(self, output_dir: str | Path) -> None:
        """Writes `report.json`, `report.md`, `report.html`, and as far as there is something to draw `samples.png`
        and `quality_vs_size.png`; replaces those that are there.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        pictures = {"samples.png": sample_grid(self), "quality_vs_size.png": quality_plot(self)}
        for name, picture in pictures.items():
            (output_dir / name).unlink(missing_ok=True)
            if picture is not None:
                (output_dir / name).write_bytes(picture)
        drawn = [name for name, picture in pictures.items() if picture is not None]
        (output_dir / "report.json").write_text(self.to_json(), encoding="utf-8")
        (output_dir / "report.md").write_text(markdown_page(self, drawn), encoding="utf-8")
        (output_dir / "report.html").write_text(html_page(self), encoding="utf-8")
