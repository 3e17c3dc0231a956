"""Schedules of sizes beside constant sizes of the same cost: distance of the images to the largest size's.

    python benchmarks/schedules.py --checkpoint demo/ofa --budgets 0.5 0.6 0.7 0.8 --call batch_size=16 --calls 4

finds a schedule for every budget of mean MACs, and judges it on noise that it was not found with: `ratio` is its mean
squared distance by that of the constant size of the same cost, interpolated between the two nearest sizes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from ofadiff import OFAPipeline, SizeSchedule, find_schedule
from ofadiff.commands.command import main, script
from ofadiff.pipelines.calls import parsed_value, read_located_calls
from ofadiff.values import COUNT


def compare(
    *,
    checkpoint: str,
    budgets: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.5, 0.6, 0.7, 0.8),
    num_inference_steps: Annotated[int, COUNT] = 15,
    call: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    calls: Annotated[int, COUNT] = 4,
    calls_file: str | None = None,
    seed: int = 0,
    save: bool = False,
    threads: Annotated[int, COUNT] = 1,
) -> list[dict[str, Any]]:
    """Find schedules and judge them beside constant sizes.

    Args:
        checkpoint: An OFA checkpoint's folder.
        budgets: Mean MACs of a forward, as shares of the largest size's.
        num_inference_steps: Steps of a call.
        call: Arguments of every call: NAME=VALUE.
        calls: So many of them, each with other noise.
        calls_file: Calls of their own, in place of these.
        seed: Of the noise.
        save: Keep the schedules in the checkpoint, named by their budgets.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    arguments = {name: parsed_value(value) for name, _, value in (word.partition("=") for word in call)}
    made = read_located_calls(Path(calls_file)) if calls_file else [arguments] * calls
    rows = []
    for budget in budgets:
        schedule = find_schedule(pipeline, made, budget, num_inference_steps, seed=seed)
        rows.append({"sizes": list(schedule), **schedule.measured})
        pipeline.set_schedule(f"{budget:g}", schedule)
        print(f"{budget:g}: {schedule!r}")
    if save:
        pipeline.save_pretrained(checkpoint)
    print("\n" + table(rows))
    print("\n" + json.dumps(rows))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per budget."""
    lines = [
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        "| budget | schedule | mean MACs | distance | constant size | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        schedule = repr(SizeSchedule(row["sizes"])).removeprefix("SizeSchedule(").removesuffix(")")
        lines.append(
            f"| {row['budget']:g} | {schedule} | {row['cost']:.3f} | {row['distance']:.3g} | "
            f"{row['constant_distance']:.3g} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(script(compare, __file__))
