"""FID and CLIP scores of any calls of the compressed emoji model, for the benchmarks of what a call may say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from emoji import EXTRACTOR, INFERENCE_STEPS, read_images
from emoji_models import ImageTower
from transformers import CLIPModel

from ofadiff import OFAPipeline, evaluate
from ofadiff.evaluation import register_extractor


class EmojiJudge:
    """Measures calls of the compressed model in a folder of `benchmarks/emoji.py`.

    Args:
        folder: That folder.
        batch_size: Images a call.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        lines = (folder / "emoji" / "metadata.jsonl").read_text().splitlines()
        self.captions = [json.loads(line)["text"] for line in lines]
        self.folder, self.batch_size = folder, batch_size
        self.reference = (read_images(folder / "emoji", len(self.captions)) * 255).round().to(torch.uint8)
        register_extractor(EXTRACTOR, ImageTower(CLIPModel.from_pretrained(folder / "clip")))
        self.pipeline = OFAPipeline.from_pretrained(folder / "ofa")
        self.pipeline.set_progress_bar_config(disable=True)

    def measure(self, calls: Mapping[str, Mapping[str, Any]], samples: int, seed: int) -> dict[str, dict[str, Any]]:
        """FID and CLIP score of so many images of each call, by its name; a call is what it says beside its prompt."""
        stride = len(self.captions) / samples
        report = evaluate(
            self.pipeline,
            reference=self.reference,
            sizes=self.pipeline.sizes[:1],
            variants=calls,
            metrics=("fid", "clip_score"),
            num_samples=samples,
            batch_size=self.batch_size,
            seed=seed,
            num_inference_steps=INFERENCE_STEPS,
            arguments={"prompt": [self.captions[int(index * stride)] for index in range(samples)]},
            extractor=EXTRACTOR,
            clip_model=self.folder / "clip",
        )
        return {row.label: row.values for row in report.rows}
