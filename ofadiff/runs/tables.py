"""What a run says on the terminal: its sizes, what they cost, and their losses."""

from __future__ import annotations

from collections.abc import Mapping

from ofadiff.sizes import MISSED_MARK, SizeTable
from ofadiff.training.bundles import TrainingResult


def size_table(subnets: SizeTable) -> str:
    """The sizes, as asked for and as reached."""
    dropping = any(subnet.dropped for subnet in subnets)
    rows = [f"{'size':>6}  {'parameters':>20}  {'MACs':>20}" + "  branches" * dropping]
    for subnet, (params, macs) in zip(subnets, costs(subnets).values(), strict=True):
        branches = f"{len(subnet.widths) - len(subnet.dropped)}/{len(subnet.widths)}"
        row = f"{subnet.size:>6g}  {params:>20}  {macs:>20}" + f"  {branches:>8}" * dropping
        rows.append(row + missed_mark(subnets, subnet.size))
    return "\n".join([*rows, *filter(None, [subnets.note])])


def missed_mark(subnets: SizeTable, size: float) -> str:
    """What stands behind a size that is off what was asked for."""
    return MISSED_MARK if size in subnets.missed else ""


def latency_rows(subnets: SizeTable, measured: Mapping[str, float]) -> str:
    """What sizes take, beside what was predicted when they were chosen."""
    predicted = {
        f"{subnet.size:g}": f"{subnet.latency_ms / subnets.full_latency_ms:.1%}{missed_mark(subnets, subnet.size)}"
        for subnet in subnets
        if subnet.latency_ms is not None and subnets.full_latency_ms is not None
    }
    rows = [f"{'size':>6}  {'latency on ' + (subnets.processor or ''):>20}  {'predicted':>9}"]
    for name, seconds in measured.items():
        latency = f"{seconds * 1e3:.4g} ms ({seconds / measured['full']:.1%})"
        rows.append(f"{name:>6}  {latency:>20}  {predicted.get(name, ''):>9}")
    return "\n".join([*rows, *filter(None, [subnets.note])])


def costs(subnets: SizeTable) -> dict[float, tuple[str, str]]:
    """Parameters and MACs of each size, in words."""
    return {
        subnet.size: (
            f"{readable(subnet.params)} ({subnet.params / subnets.full_params:.1%})",
            "not counted" if subnet.macs is None else f"{readable(subnet.macs)} ({subnets.share_of_macs(subnet):.1%})",
        )
        for subnet in subnets
    }


def readable(number: int) -> str:
    """A count in millions or billions."""
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} G"


def in_words(loss: float) -> str:
    """A loss with four decimals; a small one, as against recorded answers, with three digits."""
    return f"{loss:.4f}" if loss >= 0.01 else f"{loss:.2e}"


def loss_table(result: TrainingResult) -> str:
    """The validation losses before and after training."""
    if not result.history:
        return "No validation images (--validation_fraction 0), so no validation losses"
    first, last = result.history[min(result.history)], result.history[max(result.history)]
    rows = [f"{'size':>7}  {'before':>8}  {'after':>8}   validation loss, {result.steps} steps"]
    rows += [f"{size:>7g}  {in_words(first[size]):>8}  {in_words(last[size]):>8}" for size in last]
    if result.teacher_loss is not None:
        rows.append(f"teacher  {in_words(result.teacher_loss):>8}")
    return "\n".join(rows)
