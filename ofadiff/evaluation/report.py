"""The report: one row per model, written as JSON, Markdown, HTML and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ofadiff.sizes import MISSED_MARK, TOLERANCE

# What a mark at a size means.
MISSED_NOTE = f"{MISSED_MARK.strip()} off by more than {TOLERANCE:.1%} of the full model"

TEACHER = "teacher"
# The name of the series that a report is about; others are baselines.
JOINT = "OFA"

# Units by kind of value, from the largest down; a column takes the largest that its largest value reaches.
UNITS: dict[str, list[tuple[float, str]]] = {
    "number": [(1, "")],
    "share": [(0.01, "%")],
    "count": [(1e9, "G"), (1e6, "M"), (1e3, "K"), (1, "")],
    "seconds": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")],
    "bytes": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")],
}


@dataclass(frozen=True)
class Column:
    """How a value is shown.

    Attributes:
        title: Its heading.
        kind: What the values are: `"number"`, `"share"` (of 1), `"count"`, `"seconds"` or `"bytes"`.
        digits: Digits after the point.
        better: `"lower"`, `"higher"`, or nothing.
        spread: Name of the value that stands behind a ±.
        plotted: Whether it gets a panel in the plot of quality against size.
    """

    title: str
    kind: str = "number"
    digits: int = 2
    better: str = ""
    spread: str = ""
    plotted: bool = False

    def unit(self, values: list[float]) -> tuple[float, str]:
        """Factor and name of the unit that these values are shown in."""
        largest = max((abs(value) for value in values), default=0.0)
        units = UNITS[self.kind]
        return next((unit for unit in units if largest >= unit[0]), units[-1])


REACHED = Column("reached", "share", digits=1)
PARAMETERS = Column("parameters", "count", better="lower")
VALIDATION_LOSS = Column("validation loss", digits=4, better="lower", plotted=True)


@dataclass
class Row:
    """One model.

    Attributes:
        label: What to call it: `"teacher"`, or its size.
        series: `"OFA"`, `"teacher"`, or the name of a baseline.
        size: The size that was asked for; None where there is no such thing.
        values: Numbers by column; None where there is none.
    """

    label: str
    series: str = JOINT
    size: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The label, in words."""
        return self.label if self.size is None else f"size {self.label}"

    @property
    def key(self) -> str:
        """A name of its own in the report: `"teacher"`, `"0.5"`, and of another series `"not trained/0.5"`."""
        return self.label if self.series in (JOINT, TEACHER) else f"{self.series}/{self.label}"


@dataclass
class Report:
    """What every size is worth, and how that was measured.

    Attributes:
        title: Its heading.
        columns: What is shown of the values, in order.
        rows: The teacher, the sizes from the largest down, then baselines.
        protocol: How the numbers were made.
        images: uint8 images `(K, 3, H, W)` by the key of their row, from the same K seeds. They go into the written
            report, but not into the JSON.
    """

    title: str
    columns: dict[str, Column] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    protocol: dict[str, str | int | float] = field(default_factory=dict)
    images: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def teacher(self) -> Row | None:
        """The teacher's row."""
        return next((row for row in self.rows if row.series == TEACHER), None)

    @property
    def series(self) -> dict[str, list[Row]]:
        """Rows by series, in order, without the teacher's."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.series != TEACHER:
                found.setdefault(row.series, []).append(row)
        return found

    @property
    def pictured(self) -> list[tuple[Row, torch.Tensor]]:
        """The rows that there are images of, with these."""
        return [(row, self.images[row.key]) for row in self.rows if row.key in self.images]

    def subtitle(self, row: Row) -> str:
        """What a picture says under a row's name: its parameters, or which other series it is of."""
        return f"{self.text(row, 'params')} parameters" if row.series in (JOINT, TEACHER) else row.series

    def add_row(self, row: Row, images: torch.Tensor | None = None) -> None:
        """Adds a model, with or without images of it. Values that are not finite are kept as None."""
        row.values = {name: _finite(value) for name, value in row.values.items()}
        self.rows.append(row)
        if images is not None and len(images):
            self.images[row.key] = images

    def add_column(self, name: str, column: Column, values: Mapping[float | str, float], series: str = JOINT) -> None:
        """Adds a value that was measured elsewhere.

        Args:
            name: Name of the column, such as `"validation_loss"`.
            column: How to show it, such as `VALIDATION_LOSS`.
            values: Numbers by size; that of `"teacher"` is the teacher's.
            series: Which series' sizes.

        Raises:
            ValueError: If there is no row of such a size.

        Example:
            >>> report.add_column("validation_loss", VALIDATION_LOSS, {"teacher": 0.017, 0.5: 0.018, 1.0: 0.017})
        """
        rows = {
            TEACHER if row.series == TEACHER else row.size: row for row in self.rows if row.series in (series, TEACHER)
        }
        for size, value in values.items():
            if size not in rows:
                known = ", ".join(f"{key}" for key in rows)
                raise ValueError(f"the report has no row {size!r} of {series!r}; its rows: {known}")
            rows[size].values[name] = _finite(value)
        self.columns[name] = column

    def heading(self) -> list[str]:
        """Titles of the shown columns with their units, the row's label first."""
        units = {name: self.unit(name) for name in self.columns}
        return ["size"] + [f"{c.title}, {units[name]}" if units[name] else c.title for name, c in self.columns.items()]

    def unit(self, name: str) -> str:
        """The unit of a column's cells; nothing where the cells say it themselves, as percentages do."""
        unit = self.columns[name].unit(self._values(name))[1]
        return "" if unit == "%" else unit

    def cells(self, row: Row) -> list[str]:
        """A row as text, in the order of `heading`."""
        return [row.label] + [self.cell(row, name) for name in self.columns]

    def cell(self, row: Row, name: str) -> str:
        """One value as text, in its column's unit; a dash where there is none."""
        column, value = self.columns[name], row.values.get(name)
        if value is None:
            return "–"
        factor, unit = column.unit(self._values(name))
        text = f"{value / factor:.{column.digits}f}" + (" %" if unit == "%" else "")
        text += MISSED_MARK if name == "reached" and self.missed(row) else ""
        spread = row.values.get(column.spread)
        return text if spread is None else f"{text} ± {spread / factor:.{column.digits}f}"

    def missed(self, row: Row) -> bool:
        """Whether a row's size is further off its budget than sizes may be."""
        reached, budget = row.values.get("reached"), self.protocol.get("budget")
        if row.size is None or reached is None or budget not in ("params", "macs"):
            return False
        return abs(reached - row.size) > TOLERANCE

    def text(self, row: Row, name: str) -> str:
        """One value as text, with its unit."""
        return f"{self.cell(row, name)} {self.unit(name)}".rstrip()

    def _values(self, name: str) -> list[float]:
        values = [row.values.get(name) for row in self.rows]
        return [value for value in values if value is not None]

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
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                content["title"],
                {name: Column(**column) for name, column in content["columns"].items()},
                [Row(**row) for row in content["rows"]],
                content["protocol"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no report of ofadiff: {error!r}") from error

    def write(self, output_dir: str | Path) -> None:
        """Writes `report.json`, `report.md`, `report.html`, and as far as there is something to draw `samples.png`
        and `quality_vs_size.png`; replaces those that are there.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        # They draw reports, so they come after them.
        from ofadiff.evaluation.html_page import html_page
        from ofadiff.evaluation.markdown import markdown_page
        from ofadiff.evaluation.quality_plot import quality_plot
        from ofadiff.evaluation.sample_grid import sample_grid

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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
