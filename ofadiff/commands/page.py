"""`ofadiff app`: a page to play with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Group, Parameter

from ofadiff.dtypes import DTYPES
from ofadiff.evaluation.checkpoints import open_pipeline, pipeline_folder
from ofadiff.page.blocks import check_gradio, make_page
from ofadiff.page.form import Form
from ofadiff.page.playground import Playground
from ofadiff.page.server import check_address, serve, until_interrupted
from ofadiff.storage.pipeline_folder import find_denoisers
from ofadiff.storage.strangers import check_no_code
from ofadiff.values import PORT, Bundle, one_of

# Devices that pictures can be drawn on, and whether they are there.
DEVICES: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "xpu": torch.xpu.is_available,
    "mps": torch.backends.mps.is_available,
    "cpu": lambda: True,
}


@Parameter(name="*", group=Group.create_ordered("page"))
@dataclass(frozen=True, kw_only=True)
class Served(Bundle):
    """What the page draws with, and where it is."""

    original: str | None = None
    """pipeline of the original model, for the picture on the left; the largest size by default"""
    device: str | None = None
    """such as cpu, cuda or cuda:1; by default the best that there is"""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """of the models: float32, float16 or bfloat16"""
    host: str = "127.0.0.1"
    """address to listen at; this one is seen by this machine alone"""
    port: Annotated[int, PORT] = 7860
    """port to listen at"""
    share: Annotated[bool, Parameter(negative="--no-share")] = False
    """make a public address for the page, over the servers of Gradio's makers"""


def open_page(checkpoint: str, *, served: Served = Served()) -> None:
    """Open a page to play with an OFA checkpoint in a browser: any size beside the original, with their costs.

    It is there until Ctrl-C. Nobody but this machine sees it, unless `--host` or `--share` says otherwise.

    Args:
        checkpoint: OFA checkpoint: a folder or a hub name

    Raises:
        ImportError: If Gradio is not installed.
        ValueError: If the checkpoint is none, its pipeline's call cannot be made from a page, the device is not there,
            or the address cannot be had; before the server starts.
    """
    check_gradio()
    device = device_of(served.device)
    check_address(served.host, served.port)
    folder = pipeline_folder(checkpoint)
    find_denoisers(folder)
    original_folder = None if served.original is None else pipeline_folder(served.original)
    for each in (folder, original_folder):
        if each is not None:
            check_no_code(each)
    on = DTYPES[served.dtype], device
    pipeline = open_pipeline(folder, *on)
    Form.of(pipeline)  # before the original is loaded too
    original = None if original_folder is None else open_pipeline(original_folder, *on)
    playground = Playground(pipeline, original)
    page = make_page(playground, Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint)
    address = serve(page, served.host, served.port, served.share)
    print(f"{address} shows {checkpoint}; Ctrl-C ends it", flush=True)
    until_interrupted(page)


def device_of(name: str | None) -> torch.device:
    """The device of a name, or the best that there is.

    Raises:
        ValueError: If there is none of that name.
    """
    there = [kind for kind, is_there in DEVICES.items() if is_there()]
    if name is None:
        return torch.device(there[0])
    kind, colon, index = name.partition(":")
    known = [str(number) for number in range(torch.get_device_module(kind).device_count())] if kind in there else []
    if kind in there and (not colon or index in known):
        return torch.device(name)
    raise ValueError(f"--device {name} is not there; this machine has {' and '.join(there)}")
