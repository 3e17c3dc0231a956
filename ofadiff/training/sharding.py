"""Weights that FSDP has split over processes: each process' shard, and what is split as they are.

Where nothing is split, a tensor is its own shard. What makes shards talks to all processes, so all of them have to call
it. Wholes are made in `ofadiff.storage.split`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from accelerate import Accelerator, DistributedType
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the accelerator splits weights over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, validation_samples: int) -> None:
    """Raises ValueError unless training works with how the accelerator splits weights, and says what would."""
    kind = accelerator.distributed_type
    if kind in REFUSED:
        raise ValueError(
            f"accelerate is configured for {kind.value}, which is not supported, as its engine keeps optimizer and "
            "checkpoints to itself: choose multi-GPU or FSDP with fsdp_version 2; with fsdp_reshard_after_forward off "
            "it splits what ZeRO 2 splits"
        )
    if not is_sharded(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise ValueError("accelerate is configured for FSDP of version 1; choose fsdp_version 2 in `accelerate config`")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed precision fp16 does not work with FSDP: choose bf16")
    if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params is not supported: switch it off in `accelerate config`")
    if validation_samples % accelerator.num_processes:
        raise ValueError(
            f"{validation_samples} validation samples cannot be shared out evenly, as FSDP needs: choose a multiple of "
            f"the {accelerator.num_processes} processes"
        )


def split_alone(accelerator: Accelerator, model: ModelMixin, classes: Sequence[str]) -> None:
    """Makes FSDP split modules of some classes by themselves, beside those that it was asked for or the model names.

    Raises:
        ValueError: If it splits modules by their sizes.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy
    policy = policy.func if isinstance(policy, functools.partial) else policy
    if not classes or policy is None:  # without a policy the model is split as one
        return
    if policy is not transformer_auto_wrap_policy:
        raise ValueError(
            f"fsdp_auto_wrap_policy splits modules by their sizes, but {' and '.join(classes)} of this model must be "
            "split by themselves: choose TRANSFORMER_BASED_WRAP in `accelerate config`"
        )
    known = plugin.transformer_cls_names_to_wrap
    known = (model._no_split_modules or []) if known is None else known
    plugin.transformer_cls_names_to_wrap = list(dict.fromkeys([*known, *classes]))


def shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def forget_gathered(model: nn.Module) -> None:
    """After shards were written to: the next forward puts the weights together anew.

    A forward without a backward leaves some of them whole, for a backward to come.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, split as another of its shape is."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


def part_of(tensor: Tensor, part: Tensor) -> Tensor:
    """What is split as another tensor of its shape is, out of this process' part; see `gather` for its whole."""
    if not isinstance(tensor, DTensor):
        return part
    layout = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(part.to(tensor.device), tensor.device_mesh, tensor.placements, **layout)


def split_like(frozen: nn.Module, model: nn.Module) -> None:
    """Splits a frozen model over processes where another one is split, in place; what it computes stays the same.

    Args:
        frozen: A model without gradients, in any dtype, such as the teacher of `model`.
        model: What the accelerator has prepared. Modules of the same names hold their weights together.
    """
    mesh = next(weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor))
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    modules = dict(frozen.named_modules())
    # From the inside to the outside, which comes first in names.
    for name in reversed(units):
        if name in modules:
            fully_shard(modules[name], mesh=mesh, reshard_after_forward=True)
    frozen.to(mesh.device_type)  # buffers
