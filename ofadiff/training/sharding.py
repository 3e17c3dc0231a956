"""Weights that FSDP has split over processes: each process' shard, and the whole of it.

Where nothing is split, a tensor is its own shard and its own whole. What makes wholes or shards talks to all processes,
so all of them have to call it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ofadiff.supernet import Supernet

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the accelerator splits weights over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, validation_samples: int) -> None:
    """Raises ValueError unless training works with how the accelerator splits weights, and says what would."""
    kind = accelerator.distributed_type
    if kind in REFUSED:
        raise ValueError(
            f"accelerate is configured for {kind.value}, which is not supported: choose multi-GPU "
            "or FSDP with fsdp_version 2; with fsdp_reshard_after_forward off it splits what ZeRO 2 splits"
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


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_like(tensor: Tensor, part: Tensor) -> Tensor:
    """The whole whose shards are the parts of all processes, split as another tensor of its shape is."""
    if not isinstance(tensor, DTensor):
        return part
    layout = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(part.to(tensor.device), tensor.device_mesh, tensor.placements, **layout).full_tensor()


def gather_to_cpu(tensors: Iterable[tuple[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
    """Copies of whole tensors in main memory, by name; nothing in a process that is not to keep them."""
    found = {}
    for name, tensor in tensors:
        whole = gather(tensor)
        if keep:
            found[name] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def without_weights(supernet: Supernet) -> Supernet:
    """A copy of a supernet that is not split yet; its weights take no memory, and are to be loaded."""
    empty = copy.deepcopy(supernet)
    empty.model.to("meta")
    return empty
