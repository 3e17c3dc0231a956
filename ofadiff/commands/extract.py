"""`ofadiff extract`: sizes of a checkpoint as plain pipelines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ofadiff.adapters.size_adapter import adapter_folder
from ofadiff.dtypes import DTYPES
from ofadiff.pipelines import OFAPipeline
from ofadiff.profiling.cost import count_parameters
from ofadiff.reading.names import check_variant
from ofadiff.sizes import SizeTable
from ofadiff.storage.finite import check_finite_pipeline
from ofadiff.storage.ofa_config import read_ofa_config
from ofadiff.storage.output import check_folder
from ofadiff.storage.pipeline_folder import find_denoisers
from ofadiff.values import SIZES, Bundle, SizeOrName, one_of


@Parameter(name="*", group="extraction")
@dataclass(frozen=True, kw_only=True)
class Extraction(Bundle):
    """What is cut out, and where it goes."""

    checkpoint: str
    """OFA checkpoint: the pipeline folder that a compression made"""
    sizes: Annotated[tuple[SizeOrName, ...], SIZES]
    """sizes of the checkpoint, or smallest, largest"""
    output_dir: str
    """where the folders size-… are made"""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """of the extracted denoiser's weights: float32, float16 or bfloat16"""
    variant: str | None = None
    """variant of the checkpoint's weight files to read, such as fp16"""
    save_variant: str | None = None
    """variant to save the weight files as, such as fp16"""


def extract(*, extraction: Extraction) -> list[Path]:
    """Cut sizes out of an OFA checkpoint, each as a plain diffusers pipeline folder; a size's adapter is merged.

    Each reads only its own part of the checkpoint, and loads with `DiffusionPipeline.from_pretrained` after
    `import ofadiff`.

    Raises:
        ValueError: If the checkpoint is none, has no such size, or a folder exists already; before anything is written.
            If a size's weights are not finite, or too large for float16; before that size is written.
    """
    checkpoint, dtype = Path(extraction.checkpoint), DTYPES[extraction.dtype]
    denoiser, *others = find_denoisers(checkpoint)
    subnets = SizeTable.from_dict(read_ofa_config(checkpoint / denoiser))
    sizes = [subnets.find(size).size for size in extraction.sizes]
    folders = {size: Path(extraction.output_dir) / f"size-{size:g}" for size in sizes}
    check_folder("--output_dir", extraction.output_dir)
    for variant in (extraction.variant, extraction.save_variant):
        check_variant(variant)
    for folder in folders.values():
        if os.path.lexists(folder):
            raise ValueError(f"{folder} exists already; choose another --output_dir or remove it")
    for size, folder in folders.items():
        pipeline = OFAPipeline.from_pretrained(checkpoint, size=size, variant=extraction.variant)
        for each in (denoiser, *others):
            if pipeline.components[each].dtype != dtype:
                pipeline.components[each].to(dtype)
        extracted = pipeline.extract(size)
        check_finite_pipeline(extracted, f"size {size:g} in {extraction.dtype}")
        extracted.save_pretrained(folder, variant=extraction.save_variant)
        params = count_parameters(pipeline.components[denoiser])
        healed = ", its adapter merged" if adapter_folder(checkpoint / denoiser, size).is_dir() else ""
        print(
            f"{folder}: {params / 1e6:.2f} M parameters, {params / subnets.full_params:.1%} of the full model{healed}"
        )
    return list(folders.values())
