"""Cuts sizes out of an OFA checkpoint: a plain diffusers pipeline folder for each.

    python recipes/extract.py --checkpoint OFA_DIR --sizes 0.5 0.75 --output_dir OUT

makes `OUT/size-0.5` and `OUT/size-0.75`. Each reads only its own part of the checkpoint, has its size's adapter merged
if there is one, and loads with `DiffusionPipeline.from_pretrained` after `import ofadiff`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ofadiff import OFAPipeline
from ofadiff.adapters.size_adapter import adapter_folder
from ofadiff.profiling.cost import count_parameters
from ofadiff.sizes import SizeTable
from ofadiff.storage.ofa_config import read_ofa_config
from ofadiff.storage.pipeline_folder import find_denoiser

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def extract(args: argparse.Namespace) -> list[Path]:
    """Writes one folder for each size and returns them.

    Raises:
        ValueError: If the checkpoint is none, has no such size, or a folder exists already; before anything is written.
    """
    checkpoint = Path(args.checkpoint)
    denoiser = find_denoiser(checkpoint)
    subnets = SizeTable.from_dict(read_ofa_config(checkpoint / denoiser))
    sizes = [subnets.find(named_or_number(size)).size for size in args.sizes]
    folders = {size: Path(args.output_dir) / f"size-{size:g}" for size in sizes}
    for folder in folders.values():
        if folder.exists():
            raise ValueError(f"{folder} exists already; choose another --output_dir or remove it")
    for size, folder in folders.items():
        dtype = DTYPES[args.dtype]
        pipeline = OFAPipeline.from_pretrained(checkpoint, size=size, variant=args.variant)
        if pipeline.components[denoiser].dtype != dtype:
            pipeline.components[denoiser].to(dtype)
        pipeline.extract(size).save_pretrained(folder, variant=args.save_variant)
        params = count_parameters(pipeline.components[denoiser])
        healed = ", its adapter merged" if adapter_folder(checkpoint / denoiser, size).is_dir() else ""
        print(
            f"{folder}: {params / 1e6:.2f} M parameters, {params / subnets.full_params:.1%} of the full model{healed}"
        )
    return list(folders.values())


def named_or_number(text: str) -> float | str:
    """A size as the command line gives it: a number, `smallest` or `largest`."""
    try:
        return float(text)
    except ValueError:
        return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Cut sizes out of an OFA checkpoint, each as a plain diffusers pipeline folder; a size's adapter "
        "(from finetune_size.py) is merged.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="OFA checkpoint: the pipeline folder that a compress recipe made")
    add("--sizes", nargs="+", required=True, help="sizes of the checkpoint, or smallest, largest")
    add("--output_dir", required=True, help="where the folders size-… are made")
    add("--dtype", choices=DTYPES, default="float32", help="of the extracted denoiser's weights")
    add("--variant", help="variant of the checkpoint's weight files to read, such as fp16")
    add("--save_variant", help="variant to save the weight files as, such as fp16")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        extract(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
