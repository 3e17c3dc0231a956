"""A model that is ranked, trained, validated and saved by processes that split it, and what each of them holds."""

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from tiny_transformers import tiny, tiny_inputs
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.denoisers.copies import copy_in
from ofadiff.denoisers.prepare import DenoiserInputs
from ofadiff.training.bundles import Objective, Schedule, Watching
from ofadiff.training.checkpoint import save_checkpoint
from ofadiff.training.interrupts import Interrupts
from ofadiff.training.layer_by_layer import on_device
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.training.train import _Run
from training.live_memory import LiveMemory, bytes_of

# Wide blocks and few tokens: nearly all memory is weights.
FLUX = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "num_layers": 2, "num_single_layers": 4}
SDXL = {
    "sample_size": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
# Configuration, and the classes of blocks that FSDP splits.
MODELS = {
    "FluxTransformer2DModel": (FLUX, ("FluxTransformerBlock", "FluxSingleTransformerBlock")),
    "DiTTransformer2DModel": ({"num_layers": 3}, ("BasicTransformerBlock",)),
    # Its table of positions is a buffer that is in no file.
    "PixArtTransformer2DModel": ({}, PixArtTransformer2DModel._no_split_modules),
    "UNet2DConditionModel": (SDXL, UNet2DConditionModel._no_split_modules),
}
STEPS = 2


def make(name):
    """A Flux, DiT, PixArt or SDXL, scaled down."""
    torch.manual_seed(0)
    if name == "UNet2DConditionModel":
        return UNet2DConditionModel(**SDXL).eval()
    return tiny(name, **MODELS[name][0])


def make_inputs(name):
    """Arguments of a forward of one sample; its noise comes first."""
    if name != "UNet2DConditionModel":
        return tiny_inputs(name, 1)
    torch.manual_seed(0)
    return {
        "sample": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)},
    }


class Numbers:
    """Samples that are their seeds."""

    def __len__(self):
        return 16

    def __getitem__(self, key):
        return {"seeds": key[1]}


def prepare_for(name):
    """Makes inputs out of seeds, the same ones of a seed in whichever batch it is."""
    example = make_inputs(name)
    drawn = next(iter(example))

    def prepare(batch):
        seeds = batch["seeds"].tolist()
        arguments = tree_map(lambda each: each.expand(len(seeds), *each.shape[1:]) if len(each) == 1 else each, example)
        shape = example[drawn].shape[1:]
        arguments[drawn] = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return DenoiserInputs(arguments, arguments[drawn].roll(1, 1), torch.ones(len(seeds)))

    return prepare


def largest_unit(model):
    """Bytes of the weights that FSDP puts together at once."""
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    sizes = dict.fromkeys(units, 0)
    for name, weight in model.named_parameters():
        holder = max((unit for unit in units if f"{name}.".startswith(f"{unit}." if unit else "")), key=len)
        sizes[holder] += weight.numel() * weight.element_size()
    return max(sizes.values())


def go_through(accelerator, name, folder, batch_size=1):
    """All phases of a run; the bytes that this process held at most in each, and of what."""
    model = make(name)
    # In bfloat16 its answers would depend on the batch, which the processes share out, by more than weights may differ.
    teacher, prepare = copy_in(model, torch.float32).requires_grad_(False), prepare_for(name)
    groups, weights = find_channel_groups(model), [*model.parameters()]
    found = {"whole": bytes_of(weights), "whole teacher": bytes_of(teacher.parameters())}
    found["largest tensor"] = max(bytes_of([weight]) for weight in weights)
    found["largest layer"] = max(bytes_of(module.parameters(recurse=False)) for module in model.modules())

    def loss(model, batch):
        inputs = prepare(batch)
        return prediction_loss(predict(model, inputs), inputs)

    with LiveMemory(beside=[*weights, *model.buffers()]) as memory, on_device(accelerator, model):
        scores = score_channels(model, groups, [{"seeds": torch.tensor([1, 2])}], loss)
    found["score"] = memory.most

    supernet = Supernet(model, groups, scores, allocate(model, groups, scores, (0.7, 1.0)))
    # Adam divides by the gradient's size; the epsilon keeps rounding from counting where there is next to no gradient.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    del model, weights
    run = _Run(
        supernet,
        Numbers(),
        Objective(prepare, teacher, 1.0, 0.1),
        optimizer,
        get_scheduler("constant", optimizer),
        accelerator,
        folder,
        Schedule(STEPS, batch_size),
        Watching(validation_samples=4),
        None,
        Interrupts(),
    )
    state, model = run.state, supernet.model
    run.begin_validation(Numbers())
    batches = run.batches(range(STEPS))
    held = [*model.parameters(), *model.buffers(), *teacher.parameters(), *teacher.buffers(), *state.ema.shadow_params]
    with LiveMemory(held) as memory:
        for step in range(STEPS):
            run.step(step, batches)
    found["train"] = memory.most
    moments = [value for each in state.optimizer.state.values() for value in each.values()]
    held += moments
    found["share"] = {
        "weights": bytes_of(model.parameters()),
        "teacher": bytes_of(teacher.parameters()),
        "EMA": bytes_of(state.ema.shadow_params),
        "moments": bytes_of(moments),
        "all": bytes_of(held),
    }
    with LiveMemory(held) as memory:
        run.validate(STEPS)
    found["validate"] = memory.most
    with LiveMemory(held, patient=True) as memory:
        save_checkpoint(state, folder, write=accelerator.is_main_process)
    found["checkpoint"] = memory.most
    run.finish()
    with LiveMemory(held, patient=True) as memory:
        supernet.save_pretrained(folder / "final", is_main_process=accelerator.is_main_process)
    found["save"] = memory.most
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        found["block"] = largest_unit(model)
    return found
