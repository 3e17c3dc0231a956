"""What a compression leaves: the pipeline folder with all sizes, its README, and the table of losses."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from huggingface_hub import ModelCardData, create_repo, upload_folder

from ofadiff.runs.data import trained_on
from ofadiff.runs.run import Run
from ofadiff.runs.settings import RunSettings
from ofadiff.runs.tables import costs, in_words, loss_table, missed_mark
from ofadiff.sizes import SizeTable
from ofadiff.storage.around import save_around
from ofadiff.supernet import Supernet
from ofadiff.training.bundles import TrainingResult
from ofadiff.training.interrupts import finished_first


def save(run: Run, supernet: Supernet, result: TrainingResult) -> None:
    """Writes the original pipeline with the supernet in place of its denoiser; uploads it if asked for.

    All processes have to call it, and one writes.

    Args:
        run: What was asked for.
        supernet: As training left it.
        result: What training reported.
    """
    accelerator, original, out = run.accelerator, run.original, run.settings.output.output_dir
    main = accelerator.is_main_process
    with finished_first(f"{out} is written"):
        save_around(original.component, supernet.model, original.folder, Path(out), original.variant, main)
        if main:
            card = model_card(run.settings, supernet.subnets, result)
            (Path(out) / "README.md").write_text(card, encoding="utf-8")
    if main:
        upload(run.settings)
    accelerator.print(loss_table(result))
    accelerator.print(f"{out} holds {len(supernet.sizes)} sizes: OFAPipeline.from_pretrained loads it")
    accelerator.end_training()


def upload(settings: RunSettings) -> None:
    """The output folder without checkpoints and logs, to the hub if asked for."""
    output = settings.output
    if output.push_to_hub:
        name = create_repo(output.hub_model_id or Path(output.output_dir).name, exist_ok=True).repo_id
        logs = ["checkpoint-*", ".checkpoint-*", f"{settings.watching.logging_dir}/*"]
        upload_folder(
            repo_id=name, folder_path=output.output_dir, ignore_patterns=[*logs, *(f"*/{pattern}" for pattern in logs)]
        )


def model_card(settings: RunSettings, subnets: SizeTable, result: TrainingResult) -> str:
    """The README of the output folder: sizes, costs, losses, data, command."""
    teacher = settings.model.pretrained_model_name_or_path
    metadata = ModelCardData(
        library_name="diffusers",
        base_model=None if Path(teacher).exists() else teacher,
        tags=["ofadiff", "pruning", "diffusion"],
    )
    header = ["size", "parameters", "MACs of one step"]
    rows = {size: [f"{size:g}{missed_mark(subnets, size)}", *cost] for size, cost in costs(subnets).items()}
    if result.history:
        original = "" if result.teacher_loss is None else f" (original: {in_words(result.teacher_loss)})"
        header.append(f"validation loss{original}")
        last = result.history[max(result.history)]
        for size, row in rows.items():
            row.append(in_words(last[size]))
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows.values()))
    table += f"\n\n{subnets.note}" if subnets.missed else ""
    return f"""---
{metadata.to_yaml()}
---

# {Path(settings.output.output_dir).name}

{teacher}, compressed to {len(rows)} sizes in one set of weights with ofadiff.

{table}

```python
from ofadiff import OFAPipeline

pipeline = OFAPipeline.from_pretrained("{Path(settings.output.output_dir).name}")
pipeline(..., size={subnets.sizes[0]:g})
pipeline.extract({subnets.sizes[0]:g}).save_pretrained("small")  # a plain diffusers pipeline
```

Trained for {result.steps} steps ({result.seconds / 3600:.1f} h) on {trained_on(settings)}:

```
{shlex.join(sys.argv)}
```
"""
