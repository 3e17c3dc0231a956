"""FID of schedules of sizes beside that of constant sizes, on the compressed emoji model.

    python benchmarks/emoji.py --output_dir emoji
    python benchmarks/schedule_fid.py --emoji emoji --budgets 0.6 0.75

finds a schedule for every budget of mean MACs that the checkpoint has none for, and keeps it there; then measures these
and every size with the same seeds and prompts. MACs are those of a mean step, as shares of the largest size's.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from emoji import GUIDANCE_SCALE, INFERENCE_STEPS
from emoji_judge import EmojiJudge

from ofadiff import find_schedule
from ofadiff.commands.command import main, script
from ofadiff.values import COUNT

# What schedules are found with: so many calls of so many captions.
CALLS, CAPTIONS = 4, 8


def compare(
    *,
    emoji: str,
    budgets: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.6, 0.75),
    num_samples: Annotated[int, COUNT] = 400,
    seeds: Annotated[int, COUNT] = 1,
    batch_size: Annotated[int, COUNT] = 100,
    threads: Annotated[int, COUNT] = 1,
) -> list[dict[str, Any]]:
    """Compare schedules with constant sizes.

    Args:
        emoji: Folder of `benchmarks/emoji.py`.
        budgets: Mean MACs of a forward, as shares of the largest size's.
        num_samples: Images that are judged.
        seeds: So many times, each with other seeds.
        batch_size: Images a call.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    judge = EmojiJudge(Path(emoji), batch_size)
    find_missing(judge, budgets)
    subnets, schedules = judge.pipeline.subnets, judge.pipeline.schedules
    share = {subnet.size: subnet.macs / subnets.full_macs for subnet in subnets}
    costs = {f"{size:g}": cost for size, cost in share.items()}
    calls: dict[str, dict[str, Any]] = {f"{size:g}": {"size": size, "guidance_scale": GUIDANCE_SCALE} for size in share}
    for name in map("{:g}".format, budgets):
        drawn = schedules[name].over(INFERENCE_STEPS)
        calls[f"schedule {name}"] = {"size": name, "guidance_scale": GUIDANCE_SCALE}
        costs[f"schedule {name}"] = sum(share[size] for size in drawn) / len(drawn)
    runs = [judge.measure(calls, num_samples, seed * num_samples) for seed in range(seeds)]
    rows = []
    for name in sorted(calls, key=costs.__getitem__):
        values = {key: [run[name][key] for run in runs] for key in ("fid", "clip_score")}
        rows.append({"name": name, "macs": costs[name], **values})
    print(json.dumps(rows))
    print("\n" + table(rows))
    return rows


def find_missing(judge: EmojiJudge, budgets: Sequence[float]) -> None:
    """Finds the schedules that the checkpoint does not keep yet."""
    captions, stride = judge.captions, len(judge.captions) / (CALLS * CAPTIONS)
    chosen = [captions[int((index + 0.5) * stride)] for index in range(CALLS * CAPTIONS)]
    calls = [{"prompt": chosen[start::CALLS], "guidance_scale": GUIDANCE_SCALE} for start in range(CALLS)]
    for budget in budgets:
        if f"{budget:g}" not in judge.pipeline.schedules:
            schedule = find_schedule(judge.pipeline, calls, budget, INFERENCE_STEPS)
            judge.pipeline.set_schedule(f"{budget:g}", schedule)
            judge.pipeline.save_pretrained(judge.folder / "ofa")
        schedule = judge.pipeline.schedules[f"{budget:g}"]
        print(f"{budget:g}: {schedule!r} {json.dumps(schedule.measured)}")


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each constant size and schedule, by their cost."""
    lines = [
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        "| size | mean MACs | FID | CLIP score |",
        "|---|---|---|---|",
    ]
    for row in rows:
        fid, clip_score = (" ".join(f"{value:.{digits}f}" for value in row[key]) for key, digits in DIGITS.items())
        lines.append(f"| {row['name']} | {row['macs']:.3f} | {fid} | {clip_score} |")
    return "\n".join(lines)


DIGITS = {"fid": 2, "clip_score": 3}


if __name__ == "__main__":
    main(script(compare, __file__))
