"""Subnets and the table of them, as `ofa_config.json` keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from ofadiff.reading.json_file import shown
from ofadiff.reading.numbers import is_number

CONFIG_NAME = "ofa_config.json"

# How far a size may be off, as a fraction of the full model's budget, and the mark of one that is further.
TOLERANCE = 0.005
MISSED_MARK = " (!)"


@dataclass(frozen=True)
class Subnet:
    """A size, the units that each group keeps at it, and what that costs.

    Attributes:
        size: What was asked for: the fraction of the full model's budget, in (0, 1].
        widths: Units kept, for every channel group by name.
        params: Parameters of the denoiser at this size.
        macs: MACs of one forward at this size, batch of one; None if nothing said what the model is called with.
        latency_ms: Milliseconds of one forward, predicted from those that its groups cost where the sizes were chosen;
            None if they were not measured.
    """

    size: float
    widths: dict[str, int]
    params: int
    macs: int | None = None
    latency_ms: float | None = None

    @property
    def dropped(self) -> tuple[str, ...]:
        """Groups of which nothing is kept."""
        return tuple(name for name, width in self.widths.items() if width == 0)


class SizeTable(Sequence[Subnet]):
    """The subnets of a supernet, from the smallest to the largest; nested.

    Args:
        subnets: In ascending order of size.
        budget: What a size is a fraction of: `"params"`, `"macs"`, `"latency"` or `"channels"`.
        min_keep: Smallest share of its units that a group keeps, in [0, 1]; with 0 groups may be dropped.
        full_params: Parameters of the full denoiser.
        full_macs: MACs of one forward of the full denoiser, batch of one; None if they were not counted.
        full_latency_ms: Milliseconds of such a forward; None if it was not measured.
        processor: What these were measured on.
    """

    def __init__(
        self,
        subnets: Sequence[Subnet],
        budget: str,
        min_keep: float,
        full_params: int,
        full_macs: int | None,
        full_latency_ms: float | None = None,
        processor: str | None = None,
    ) -> None:
        self.subnets = tuple(subnets)
        self.budget = budget
        self.min_keep = min_keep
        self.full_params = full_params
        self.full_macs = full_macs
        self.full_latency_ms = full_latency_ms
        self.processor = processor

    @property
    def sizes(self) -> tuple[float, ...]:
        """The sizes, ascending."""
        return tuple(subnet.size for subnet in self.subnets)

    @property
    def has_whole(self) -> bool:
        """Whether the largest size is the whole denoiser, and not cut too."""
        return self.subnets[-1].params == self.full_params

    def __len__(self) -> int:
        return len(self.subnets)

    def __iter__(self) -> Iterator[Subnet]:
        return iter(self.subnets)

    @overload
    def __getitem__(self, key: int | float | str) -> Subnet: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Subnet, ...]: ...

    def __getitem__(self, key: int | float | str | slice) -> Subnet | tuple[Subnet, ...]:
        """By position, as in any sequence, for an int; by size for a float or a name (see `find`)."""
        return self.subnets[key] if isinstance(key, (int, slice)) else self.find(key)

    def find(self, size: float | str) -> Subnet:
        """The subnet of a size: one of `sizes`, `"smallest"` or `"largest"`.

        Raises:
            ValueError: If there is no such size; lists those there are.
        """
        if isinstance(size, str) and size in ("smallest", "largest"):
            return self.subnets[0 if size == "smallest" else -1]
        for subnet in self.subnets:
            if is_number(size) and subnet.size == size:
                return subnet
        listed = ", ".join(f"{known:g}" for known in self.sizes)
        raise ValueError(f"size is {shown(size)}; it must be one of {listed}, 'smallest' or 'largest'")

    def only(self, size: float | str) -> SizeTable:
        """A table of one of the sizes.

        Raises:
            ValueError: If there is no such size; lists those there are.
        """
        return SizeTable.from_dict({**self.to_dict(), "subnets": [_stored(self.find(size))]})

    def reached(self, subnet: Subnet) -> float | None:
        """The fraction of the full model's budget that a subnet really has; None for `"channels"`, which is no budget.

        For a latency it is that which its groups were measured to take, added up.
        """
        if self.budget == "latency":
            known = subnet.latency_ms is not None and self.full_latency_ms is not None
            return subnet.latency_ms / self.full_latency_ms if known else None  # type: ignore[operator]
        if self.budget not in ("params", "macs"):
            return None
        if self.budget == "params":
            return subnet.params / self.full_params
        return self.share_of_macs(subnet)

    def share_of_macs(self, subnet: Subnet) -> float | None:
        """The fraction of the full model's MACs that a subnet takes; None if they were not counted."""
        return None if subnet.macs is None or self.full_macs is None else subnet.macs / self.full_macs

    @property
    def missed(self) -> dict[float, float]:
        """The sizes that are off by more than `TOLERANCE` of the full model, each with what it has reached."""
        reached = {subnet.size: self.reached(subnet) for subnet in self.subnets}
        return {size: share for size, share in reached.items() if share is not None and abs(share - size) > TOLERANCE}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SizeTable) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        rows = (
            f"{s.size:g}: {s.params / 1e6:.2f} M params ({s.params / self.full_params:.1%}), "
            + ("MACs not counted" if s.macs is None else f"{s.macs / 1e9:.3f} GMACs ({self.share_of_macs(s):.1%})")
            + ("" if s.latency_ms is None else f", {s.latency_ms:.3g} ms on {self.processor}")
            + (MISSED_MARK if s.size in self.missed else "")
            for s in self.subnets
        )
        note = f"; {self.note}" if self.missed else ""
        return f"SizeTable(budget={self.budget!r}, min_keep={self.min_keep:g}; {'; '.join(rows)}{note})"

    @property
    def note(self) -> str:
        """What a mark in a table of these sizes means; nothing where no size is missed."""
        if not self.missed:
            return ""
        off = f"more than {TOLERANCE:.1%} of the full model's {self.budget} off"
        return f"{MISSED_MARK.strip()} {off}: {self.reached_in_words()}"

    def reached_in_words(self) -> str:
        """What the sizes that are missed have reached."""
        return ", ".join(f"{size:g} has {share:.1%}" for size, share in self.missed.items())

    def to_dict(self) -> dict[str, Any]:
        """What `ofa_config.json` keeps."""
        latency = {"full_latency_ms": self.full_latency_ms, "processor": self.processor}
        return {
            "budget": self.budget,
            "min_keep": self.min_keep,
            "full_params": self.full_params,
            "full_macs": self.full_macs,
            **(latency if self.processor else {}),
            "subnets": [_stored(subnet) for subnet in self.subnets],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SizeTable:
        """The table that `to_dict` described."""
        names = ("budget", "min_keep", "full_params", "full_macs", "full_latency_ms", "processor")
        subnets = [Subnet(**subnet) for subnet in values["subnets"]]
        return cls(subnets, **{name: values[name] for name in names if name in values})


def _stored(subnet: Subnet) -> dict[str, Any]:
    return {name: value for name, value in asdict(subnet).items() if value is not None}
