"""Mean and covariance of features: all that FID looks at."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ofadiff.reading.tensors import open_tensors

SUFFIXES = (".safetensors", ".npz")

# Features that an extractor may have; what is compressed may claim any number.
MOST_FEATURES = 2**14


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of the features of a set of images, in float64.

    Attributes:
        mean: `(D,)`.
        covariance: `(D, D)`, unbiased.
        count: How many images; None where the file doesn't say.
        extractor: torch-fidelity's name of the extractor; None where the file doesn't say.
        resize: How the images came to the resolution of the samples.
        resolution: That resolution, such as `"256x256"`; None where the file doesn't say.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None = None
    extractor: str | None = None
    resize: str | None = None
    resolution: str | None = None

    @classmethod
    def of(cls, features: torch.Tensor, **described: str) -> FeatureStatistics:
        """Statistics of features `(N, D)`.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        if len(features) < 2:
            raise ValueError(f"there are {len(features)} samples; a covariance takes at least 2")
        features = features.double()
        return cls(features.mean(dim=0), features.T.cov().reshape(2 * features.shape[1:]), len(features), **described)

    def check_extractor(self, extractor: str) -> None:
        """Raises ValueError if these are statistics of another extractor's features, by torch-fidelity's names."""
        if self.extractor not in (None, extractor):
            raise ValueError(
                f"the reference statistics are those of the extractor {self.extractor!r}, not {extractor!r}"
            )

    def check_shape(self, features: int, resolution: str) -> None:
        """Raises ValueError unless they fit an extractor of so many features, and images of such a resolution."""
        if len(self.mean) != features:
            raise ValueError(f"the reference statistics are of {len(self.mean)} features, the extractor has {features}")
        if self.resolution not in (None, resolution):
            raise ValueError(
                f"the reference statistics are of images of {self.resolution} pixels, and the samples have {resolution}"
            )

    def save(self, file: str | Path) -> None:
        """Writes a `.safetensors` with the extractor, the resize filter and the count in its metadata."""
        described = {
            "count": self.count,
            "extractor": self.extractor,
            "resize": self.resize,
            "resolution": self.resolution,
        }
        metadata = {name: str(value) for name, value in described.items() if value is not None}
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(file).with_suffix(".tmp")
        save_file(tensors, unfinished, metadata)
        unfinished.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> FeatureStatistics:
        """Statistics of a `.safetensors` written by `save`, or of an `.npz` with `mu` and `sigma` as pytorch-fid and
        clean-fid write it; the latter doesn't say how many images, nor which extractor.

        Raises:
            ValueError: If the file is neither.
        """
        file = Path(file)
        if not file.is_file() or file.suffix not in SUFFIXES:
            raise ValueError(f"{file} is no file of reference statistics, a {' or '.join(SUFFIXES)}")
        try:
            found = _load_npz(file) if file.suffix == ".npz" else _load_safetensors(file)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            expected = "mu and sigma" if file.suffix == ".npz" else "mean and covariance"
            raise ValueError(f"{file} holds no reference statistics ({expected}): {error}") from error
        if found.mean.ndim != 1 or found.covariance.shape != 2 * found.mean.shape:
            raise ValueError(
                f"the mean in {file} has shape {tuple(found.mean.shape)} and the covariance "
                f"{tuple(found.covariance.shape)}; they must be (D,) and (D, D)"
            )
        return found


def _load_npz(file: Path) -> FeatureStatistics:
    with zipfile.ZipFile(file) as archive:
        for name in ("mu", "sigma"):
            with archive.open(f"{name}.npy") as member:
                _check_array(member, name)
    with np.load(file, allow_pickle=False) as arrays:
        mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    return FeatureStatistics(mean, covariance)


def _check_array(member: Any, name: str) -> None:
    """Raises ValueError if an array in a file claims to have more features than there are, before it is made."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its {name} is of the format version {version}; 1.0 and 2.0 are read")
    shape, _, dtype = read(member)
    if dtype.kind not in "fiu" or len(shape) > 2 or max(shape, default=0) > MOST_FEATURES:
        raise ValueError(f"its {name} claims the shape {shape} and {dtype}; it may have up to {MOST_FEATURES} features")


def _load_safetensors(file: Path) -> FeatureStatistics:
    with open_tensors(file) as tensors:
        metadata = tensors.metadata() or {}
        return FeatureStatistics(
            tensors.get_tensor("mean"),
            tensors.get_tensor("covariance"),
            int(metadata["count"]),
            metadata["extractor"],
            metadata["resize"],
            metadata["resolution"],
        )
