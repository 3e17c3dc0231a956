"""What every size is worth, and how its values read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ofadiff.evaluation.report.rows import JOINT, TEACHER, Column, Row
from ofadiff.sizes import MISSED_MARK, TOLERANCE


@dataclass
class Results:
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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
