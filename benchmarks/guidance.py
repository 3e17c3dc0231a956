"""Guidance with a small size on the emoji text-to-image model: quality and time, each with a scale of its own.

    python benchmarks/emoji.py --output_dir emoji
    python benchmarks/guidance.py --emoji emoji

samples the largest size with its unconditional half at every size, and with autoguidance by every smaller size. Every
row's scale is the one with the lowest FID on images of other seeds than those that are judged. Times are of one call
each, taken in turns; MACs are those of the denoiser's forwards.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from emoji import INFERENCE_STEPS
from emoji_judge import EmojiJudge

from ofadiff.commands.command import main, script
from ofadiff.profiling.timing import seconds_of
from ofadiff.values import COUNT

JUDGING, TUNING = 0, 100_000  # first seeds
ROUNDS = 5
Calls = dict[str, Any]


def compare(
    *,
    emoji: str,
    scales: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (1.5, 2.0, 3.0, 4.0, 6.0),
    autoguidance_scales: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (1.25, 1.5, 2.0, 3.0),
    tuning_samples: Annotated[int, COUNT] = 200,
    num_samples: Annotated[int, COUNT] = 400,
    batch_size: Annotated[int, COUNT] = 100,
    timed_images: Annotated[int, COUNT] = 4,
    threads: Annotated[int, COUNT] = 1,
) -> list[dict[str, Any]]:
    """Compare guidance by every size.

    Args:
        emoji: Folder of `benchmarks/emoji.py`.
        scales: Of classifier-free guidance, to choose from.
        autoguidance_scales: Of autoguidance.
        tuning_samples: Images that a scale is chosen by.
        num_samples: Images that are judged.
        batch_size: Images a call.
        timed_images: Images of the call that is timed.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    judge = EmojiJudge(Path(emoji), batch_size)
    pipeline = judge.pipeline
    *smaller, largest = pipeline.sizes
    rows: list[dict[str, Any]] = []
    for size in (largest, *reversed(smaller)):
        rows.append({"kind": "halves", "guidance_size": size})
        rows[-1]["calls"] = [{"guidance_size": size, "guidance_scale": scale} for scale in scales]
    for size in reversed(smaller):
        rows.append({"kind": "autoguidance", "guidance_size": size})
        told = {"guidance_size": size, "guidance_scale": 1.0}
        rows[-1]["calls"] = [{**told, "autoguidance_scale": scale} for scale in autoguidance_scales]
    rows.append({"kind": "none", "guidance_size": largest, "calls": [{"guidance_scale": 1.0}]})
    macs = {subnet.size: subnet.macs / pipeline.subnets.full_macs for subnet in pipeline.subnets}
    named = {f"{number}.{trial}": call for number, row in enumerate(rows) for trial, call in enumerate(row["calls"])}
    tuned = judge.measure(named, tuning_samples, TUNING)
    for number, row in enumerate(rows):
        row["trials"] = [tuned[f"{number}.{trial}"]["fid"] for trial, _ in enumerate(row["calls"])]
        row["call"] = row["calls"][row["trials"].index(min(row["trials"]))]
        row["macs"] = macs[largest] + (0 if row["kind"] == "none" else macs[row["guidance_size"]])
    judged = judge.measure({str(number): row["call"] for number, row in enumerate(rows)}, num_samples, JUDGING)
    for number, row in enumerate(rows):
        row |= {name: judged[str(number)][name] for name in ("fid", "clip_score")}
        print(json.dumps({key: row[key] for key in ("kind", "call", "trials", "fid", "clip_score")}), flush=True)
    time_calls(pipeline, rows, judge.captions[:timed_images])
    print("\n" + table(rows))
    return rows


def time_calls(pipeline: Any, rows: Sequence[dict[str, Any]], prompts: list[str]) -> None:
    """Gives each row its seconds, and their ratio to those of the first."""
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for row, seconds in zip(rows, times, strict=True):
            call = {"prompt": prompts, "num_inference_steps": INFERENCE_STEPS, **row["call"]}
            seconds.append(seconds_of(lambda call=call: pipeline(**call), pipeline.device))
    for row, seconds in zip(rows, times, strict=True):
        row["seconds"] = statistics.median(seconds)
        row["ratio"] = statistics.median(one / first for one, first in zip(seconds, times[0], strict=True))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each kind of guidance and size."""
    lines = [
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        "| guidance | its size | scale | FID | CLIP score | MACs of a step | time of a call | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"halves": "unconditional half", "autoguidance": "autoguidance", "none": "none"}
    for row in rows:
        scale = row["call"].get("autoguidance_scale", row["call"]["guidance_scale"])
        size = "–" if row["kind"] == "none" else f"{row['guidance_size']:g}"
        lines.append(
            f"| {names[row['kind']]} | {size} | {scale:g} | {row['fid']:.2f} | {row['clip_score']:.3f} | "
            f"{row['macs']:.2f} | {row['seconds']:.2f} s | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(script(compare, __file__))
