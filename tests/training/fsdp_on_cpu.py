"""FSDP on CPUs, for tests: accelerate turns it on for GPUs only, but all that it does then works on both."""

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState


def make_sharded_accelerator(reshard_after_forward=True, blocks=("ResnetBlock2D", "Attention"), **options):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=reshard_after_forward,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(blocks),
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    # In both places, as accelerate does: it copies the one to the other whenever a state is asked for.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    return accelerator
