"""The rows and columns of a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from ofadiff.sizes import MISSED_MARK, TOLERANCE

# What a mark at a size means.
MISSED_NOTE = f"{MISSED_MARK.strip()} off by more than {TOLERANCE:.1%} of the full model"
TEACHER = "teacher"

# The name of the series that a report is about; others are baselines.
JOINT = "OFA"

# That of calls of the supernet itself, with a schedule of sizes or a size for guidance.
VARIANTS = "all sizes"

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
