"""A model that is ranked, trained, validated and saved by processes that split it, and what each of them holds."""

import torch
from diffusers.optimization import get_scheduler
from tiny_transformers import tiny, tiny_inputs
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

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
FLUX = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "num_layers": 2, "num_single_layers": 6}
# Configuration, and the classes of blocks that FSDP splits.
MODELS = {
    "FluxTransformer2DModel": (FLUX, ("FluxTransformerBlock", "FluxSingleTransformerBlock")),
    "DiTTransformer2DModel": ({"num_layers": 3}, ("BasicTransformerBlock",)),
}
STEPS = 2


def make(name):
    """A Flux or DiT, scaled down."""
    torch.manual_seed(0)
    return tiny(name, **MODELS[name][0])


class Numbers:
    """Samples that are their seeds."""

    def __len__(self):
        return 16

    def __getitem__(self, key):
        return {"seeds": key[1]}


def prepare_for(name):
    """Makes inputs out of seeds, the same ones of a seed in whichever batch it is."""
    example, drawn = tiny_inputs(name, 1), "hidden_states"

    def prepare(batch):
        seeds = batch["seeds"].tolist()
        arguments = {
            key: value.expand(len(seeds), *value.shape[1:]) if len(value) == 1 else value
            for key, value in example.items()
        }
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
    teacher, prepare = copy_in(model, torch.bfloat16).requires_grad_(False), prepare_for(name)
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
    with LiveMemory(held) as memory:
        save_checkpoint(state, folder, write=accelerator.is_main_process)
    found["checkpoint"] = memory.most
    run.finish()
    with LiveMemory(held) as memory:
        supernet.save_pretrained(folder / "final", is_main_process=accelerator.is_main_process)
    found["save"] = memory.most
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        found["block"] = largest_unit(model)
    return found
