"""Loading one size out of a supernet's folder, against loading the whole supernet and extracting that size.

    python benchmarks/loading.py

Memory is the most that is resident while loading, mapped pages of files included, in a new process (Linux). Read are
the tensors and parts of tensors that are copied out of the files. How much more the disk delivers to an emptied cache
is up to the system, which reads ahead in blocks (its own row, without a bound; none where files live in memory).
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from denoisers import SHAPES, make_denoiser, make_supernet
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from side_by_side import Comparison, main
from torch import nn

from ofadiff import Supernet
from ofadiff.extraction import reader
from ofadiff.extraction.reader import load_extracted
from ofadiff.sizes import SizeTable, Subnet
from ofadiff.storage.ofa_config import denoiser_class, read_ofa_config

SIZES = (0.4, 0.7, 1.0)
MAX_RATIO = 1.1


def compare(comparison: Comparison) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_supernet(UNet2DConditionModel(**SHAPES["quick"]), SIZES).save_pretrained(folder / "tiny")
        supernet = make_supernet(make_denoiser(comparison), SIZES)
        supernet.save_pretrained(folder / "whole")
        subnets = supernet.subnets
        del supernet
        for subnet in list(subnets)[: 1 if comparison.quick else -1]:
            compare_size(comparison, folder, subnet)


def compare_size(comparison: Comparison, folder: Path, subnet: Subnet) -> None:
    what = f"size {subnet.size:g}"
    weights = [load(folder / "whole", subnet.size).state_dict() for load in LOADS.values()]
    differing = sum(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    comparison.add_error(f"{what}: weights that differ", differing, 1e-9)
    weights.clear()  # mapped files cannot leave the cache
    steps = {name: partial(load, folder / "whole", subnet.size) for name, load in LOADS.items()}
    times = comparison.time_in_turn(steps)
    comparison.add_times(f"{what}, time: loaded alone, all loaded and extracted", times["alone"], times["all"])
    own = subnet.params * torch.float32.itemsize
    # A process for each, so that no load finds memory that another one left. A trial needs none.
    alone, everything = (
        measure(name, folder, subnet.size) if comparison.quick else in_new_process(name, folder, subnet.size)
        for name in LOADS
    )
    comparison.add_memory(f"{what}, peak memory: loaded alone, its weights", alone[0], own, MAX_RATIO)
    comparison.add_memory(f"{what}, peak memory: loaded alone, all loaded", alone[0], everything[0])
    comparison.add_memory(f"{what}, read: loaded alone, its weights", bytes_read(steps["alone"]), own, MAX_RATIO)
    if everything[1]:
        comparison.add_memory(f"{what}, delivered by the disk: loaded alone, all loaded", alone[1], everything[1])


def load_alone(folder: Path, size: float) -> nn.Module:
    """What `OFAPipeline.from_pretrained(…, size=size)` does for its denoiser."""
    subnets = SizeTable.from_dict(read_ofa_config(folder))
    return load_extracted(folder, denoiser_class(folder), subnets.find(size))


def load_all(folder: Path, size: float) -> nn.Module:
    return Supernet.from_pretrained(folder).extract(size)


LOADS: dict[str, Callable[[Path, float], nn.Module]] = {"alone": load_alone, "all": load_all}


class CountedFile:
    """`safe_open`, counting the bytes that it gives."""

    given = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = safe_open(*args, framework="pt", **kwargs)

    def __enter__(self) -> CountedFile:
        self.file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.__exit__(*exception)

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_tensor(self, key: str) -> torch.Tensor:
        return self.counted(self.file.get_tensor(key))

    def get_slice(self, key: str) -> CountedSlice:
        return CountedSlice(self.file.get_slice(key))

    @classmethod
    def counted(cls, tensor: torch.Tensor) -> torch.Tensor:
        cls.given += tensor.nbytes
        return tensor


class CountedSlice:
    """What `get_slice` gives, counting too."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return CountedFile.counted(self.stored[index])


def bytes_read(load: Callable[[], nn.Module]) -> int:
    CountedFile.given = 0
    with mock.patch.object(reader, "open_tensors", CountedFile):
        load()
    return CountedFile.given


def in_new_process(name: str, folder: Path, size: float) -> tuple[int, int]:
    """`measure` where nothing was loaded before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, name, folder, size).result()


def measure(name: str, folder: Path, size: float) -> tuple[int, int]:
    """Bytes that a load makes resident at most, and that the disk delivers for it when nothing is cached."""
    LOADS[name](folder / "tiny", size)  # imports what a load imports
    gc.collect()
    for file in (folder / "whole").glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    resident, read = process_value("status", "VmRSS"), process_value("io", "read_bytes")
    loaded = LOADS[name](folder / "whole", size)
    for tensor in loaded.state_dict().values():
        tensor.sum()  # what is only mapped is read when it is used
    peak = process_value("status", "VmHWM")
    return (peak - resident) * 1024, process_value("io", "read_bytes") - read


def process_value(file: str, name: str) -> int:
    """A number that the kernel keeps of this process."""
    lines = Path(f"/proc/self/{file}").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(main(compare, __doc__, devices=("cpu",)))
