"""What ties the files of a supernet together, and to the groups that the model has.

A permutation, a basis or a width read beside weights of another supernet would cut them wrongly without an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ofadiff.basis.change import BASIS_NAME, PERMUTATION, load_basis
from ofadiff.channels import ChannelGroup, Slice
from ofadiff.reading.json_file import check_object
from ofadiff.reading.tensors import read_metadata
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.files import weight_files
from ofadiff.storage.ofa_config import read_ofa_config

# Under this name each of the files says which structure it belongs to.
STRUCTURE = "ofa_structure"

# What diffusers calls a denoiser's weights, of any variant and shard.
WEIGHTS = "diffusion_pytorch_model"


def fingerprint(group: ChannelGroup) -> dict[str, Any]:
    """What of a group decides how weights are sorted, rotated and cut."""
    return {
        "name": group.name,
        "kind": group.kind,
        "stage": group.stage,
        "width": group.width,
        "channels_per_unit": group.channels_per_unit,
        "slices": [_slice_in_words(group, part) for part in group.slices],
    }


def _slice_in_words(group: ChannelGroup, part: Slice) -> str:
    words = [part.module.removeprefix(f"{group.block}."), part.axis]
    words += [f"{part.start}+{part.repeats}x{part.units}x{part.channels}", *([part.basis] if part.basis else [])]
    return " ".join(words + ["dual"] * part.dual + ["scaled"] * part.keeps_softmax_scale)


def structure_of(values: Mapping[str, Any], basis: Mapping[str, torch.Tensor]) -> str:
    """A digest of order, basis and widths: weights of the same structure fit the same `ofa_config.json`."""
    digest = hashlib.sha256()
    widths = {str(subnet["size"]): subnet["widths"] for subnet in values["subnets"]}
    digest.update(json.dumps(widths, sort_keys=True).encode())
    for name in sorted(basis):
        digest.update(f"{name} {tuple(basis[name].shape)}".encode())
        digest.update(basis[name].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def structure_of_folder(folder: Path) -> str | None:
    """`structure_of` what lies in a denoiser's folder; None if that is no supernet."""
    if not ((folder / CONFIG_NAME).is_file() and (folder / BASIS_NAME).is_file()):
        return None
    values = read_ofa_config(folder)
    return structure_of(values, load_basis(folder))


def check_structure(folder: Path, values: Mapping[str, Any], variant: str | None = None) -> None:
    """Raises ValueError if the files of a supernet were not written together, or changed; older ones do not say.

    Args:
        folder: The denoiser's.
        values: What its `ofa_config.json` says.
        variant: Variant of the weights that are to be read.
    """
    try:
        weights = list(weight_files(folder, variant))
    except FileNotFoundError:  # whoever reads them says so
        weights = []
    for file in (folder / BASIS_NAME, *weights):
        if file.is_file() and read_metadata(file).get(STRUCTURE) != values.get(STRUCTURE):
            raise ValueError(
                f"{file} does not belong to the {CONFIG_NAME} beside it: they were not written together, so sizes cut "
                "from it would be wrong; restore the file that was there, or save the supernet anew"
            )
    basis = load_basis(folder) if (folder / BASIS_NAME).is_file() else {}
    if STRUCTURE in values and structure_of(values, basis) != values[STRUCTURE]:
        raise ValueError(
            f"{folder / CONFIG_NAME} or the {BASIS_NAME} beside it was changed since it was written: their digest is "
            "another one; restore the files that were there, or save the supernet anew"
        )


def check_fingerprints(groups: Sequence[ChannelGroup], saved: list[dict[str, Any]], directory: Path) -> None:
    """Raises ValueError unless a checkpoint was made for these groups; older ones do not say how layers are cut."""
    found = [fingerprint(group) for group in groups]
    for entry in saved:
        check_object(entry, f"a group of {directory / CONFIG_NAME}", {})
    if not all("slices" in entry for entry in saved):
        found = [{name: value for name, value in entry.items() if name != "slices"} for entry in found]
    if found != saved:
        differing = [entry for entry in found if entry not in saved] + [entry for entry in saved if entry not in found]
        raise ValueError(
            f"{directory / CONFIG_NAME} was made for other channel groups than this model has; first difference: "
            f"{differing[0] if differing else 'their order'}"
        )


def check_basis(groups: Sequence[ChannelGroup], basis: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Raises ValueError unless a basis has an order of the units of every group, or matrices of their number."""
    for group in groups:
        order = basis.get(f"{group.name}.{PERMUTATION}")
        if order is not None:
            if sorted(order.flatten().tolist()) != list(range(group.width)):
                raise ValueError(
                    f"{directory / BASIS_NAME} has an order of {group.name} that is none of its {group.width} units"
                )
            continue
        for part in group.slices:
            matrices = basis.get(f"{group.name}.{part.basis}")
            if matrices is None or matrices.ndim != 3 or tuple(matrices.shape[1:]) != (part.units, part.units):
                found = None if matrices is None else tuple(matrices.shape)
                raise ValueError(
                    f"{directory / BASIS_NAME} has {part.basis or 'an order'} of {group.name} of shape {found}; it "
                    f"must be (heads, {part.units}, {part.units})"
                )
