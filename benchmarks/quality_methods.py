"""The methods that `quality.py` compares: what each makes of a study's teacher, and how its models are kept.

`METHODS` is the table of all; a variant of the library is one line in `VARIANTS`. A method fills its job's folder: with
the library's own pipeline folder (`supernet/`), or with a file of weights for each size.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from quality_data import BATCH_SIZE, DEVICE, EMA_DECAY, Place, fit, mean_loss, warmup_steps
from quality_paper import IMPORTANCE_SAMPLES, train_paper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ofadiff import OFAPipeline, find_channel_groups, runs
from ofadiff.commands.compress import make_supernet
from ofadiff.data.order import fixed_batches
from ofadiff.noise.draws import Batch
from ofadiff.profiling.cost import count_parameters
from ofadiff.runs.healing import make_single_size, save_healed, start_healing
from ofadiff.sizes import TOLERANCE
from ofadiff.supernet import Supernet
from ofadiff.training.distill import block_outputs, distillation_loss
from ofadiff.training.losses import denoising_loss, parts_of, predict, prediction_loss

LEARNING_RATE = 5e-4

# Of Muon, with which the library trains all sizes.
JOINT_LEARNING_RATE = 2e-3
# Of the LoRA that the largest size gets after a joint run, for a fifth of its steps.
HEALED = "ofadiff_healed"
HEALING_RANK, HEALING_LEARNING_RATE = 16, 3e-3
NEVER = 10**6
# Weight of the relative distance of block outputs where whole blocks are removed.
FEATURE_WEIGHT = 0.1
# Noisy images that show what a block is worth.
BLOCK_SAMPLES = 256
# Share of a layer that torch-pruning takes at most; the others have the same floor.
LARGEST_RATIO = 0.75
METADATA = "quality"


@dataclass(frozen=True)
class Job:
    """One training: of all sizes, or of one.

    Attributes:
        place: The study.
        method: Name in `METHODS`.
        seed: Of everything random in the compression.
        sizes: What it makes.
        joint_steps: Optimizer steps of a joint run.
        folder: What it fills.
    """

    place: Place
    method: str
    seed: int
    sizes: tuple[float, ...]
    joint_steps: int
    folder: Path

    @property
    def steps(self) -> int:
        """Optimizer steps of this training: of shares what a joint run has for each size."""
        share = METHODS[self.method].share
        if share == "size":
            return max(1, self.joint_steps // len(self.place.study.sizes))
        return 0 if share == "none" else self.joint_steps


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        train: Fills the job's folder; returns what else there is to say.
        each_size: Whether each size is a training of its own.
        share: Steps of one training: `"all"` that a joint run has, a `"size"`'s share of them, or `"none"`.
    """

    train: Callable[[Job], Mapping[str, Any]]
    each_size: bool
    share: str = "all"


# Models on disk.


def save_model(model: nn.Module, file: Path, skipped: tuple[str, ...] = ()) -> None:
    """The weights of a smaller version of the teacher, with what their shapes do not say."""
    modules = dict(model.named_modules())
    values = {
        "skipped": skipped,
        "norm_groups": {name: each.num_groups for name, each in modules.items() if isinstance(each, nn.GroupNorm)},
        "heads": {name: each.heads for name, each in modules.items() if isinstance(each, Attention)},
    }
    weights = {name: weight.detach().cpu().contiguous().clone() for name, weight in model.state_dict().items()}
    save_file(weights, file, {METADATA: json.dumps(values)})


def load_model(file: Path, teacher: nn.Module) -> nn.Module:
    """What `save_model` wrote."""
    with safe_open(file, "pt") as stored:
        values = json.loads(stored.metadata()[METADATA])
    model = copy.deepcopy(teacher)
    for name in values["skipped"]:
        skip(model, name)
    for key, weight in load_file(file).items():
        module, _, own = key.rpartition(".")
        owner = model.get_submodule(module)
        if own in owner._parameters:
            setattr(owner, own, nn.Parameter(weight))
        else:
            owner.register_buffer(own, weight)
    for name, heads in values["heads"].items():
        model.get_submodule(name).heads = heads
    for name, count in values["norm_groups"].items():
        model.get_submodule(name).num_groups = count
    fit_attributes(model)
    return model.to(DEVICE).eval()


def fit_attributes(model: nn.Module) -> None:
    """Gives blocks the widths that their weights have."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.inner_dim = module.inner_kv_dim = module.to_q.weight.shape[0]
            if module.scale_qk:
                module.scale = (module.inner_dim // module.heads) ** -0.5
        elif isinstance(module, Upsample2D | Downsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels = module.conv.weight.shape[1]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = len(module.weight)


def model_file(job: Job, size: float) -> Path:
    """Where a job keeps the weights of a size."""
    return job.folder / f"{size:g}.safetensors"


def load_size(job: Job, size: float, teacher: nn.Module) -> nn.Module:
    """A size as the job made it, a model that stands alone."""
    file = model_file(job, size)
    if file.exists():
        return load_model(file, teacher)
    return OFAPipeline.from_pretrained(job.folder / "supernet").extract(size).unet.to(DEVICE).eval()


# The library, its variants, and the same one size at a time.


@dataclass(frozen=True)
class Variant:
    """What is asked for beside the defaults: fields of the run's bundles."""

    compression: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] = field(default_factory=dict)
    optimization: Mapping[str, Any] = field(default_factory=dict)


PLAIN = {"correction_samples": 0}
# What one model alone is fine-tuned with; the library's own for all sizes before, with sizes drawn at random.
COSINE = {"lr_scheduler": "cosine", "ema_decay": EMA_DECAY}
INDEPENDENT = {"stratify_timesteps": False}
ADAMW = {"optimizer": "adamw", "learning_rate": LEARNING_RATE, **COSINE}

VARIANTS = {
    "ofadiff": Variant(),
    "ofadiff-cosine": Variant({"reweight": "linear"}, INDEPENDENT, COSINE),
    "ofadiff-independent": Variant(losses=INDEPENDENT),
    "ofadiff-adamw": Variant(optimization=ADAMW),
    "ofadiff-uncorrected": Variant(compression=PLAIN),
    "ofadiff-adamw-uncorrected": Variant(compression=PLAIN, optimization=ADAMW),
    "ofadiff-distill1": Variant(losses={"distill_weight": 1.0}),
    "ofadiff-distill4": Variant(losses={"distill_weight": 4.0}),
    "ofadiff-features": Variant(losses={"feature_distill_weight": 0.1}),
    "ofadiff-no-distill": Variant(losses={"distill_weight": 0.0}),
    "ofadiff-uniform": Variant(compression={"reweight": "uniform"}),
    "ofadiff-no-rotate": Variant(compression={"rotate": False}),
    "ofadiff-lr1e-3": Variant(optimization={"learning_rate": 1e-3}),
    "ofadiff-lr4e-3": Variant(optimization={"learning_rate": 4e-3}),
    "ofadiff-drop": Variant(compression={"min_keep": 0.0}),
}

# Before any training: our cut alone, its readers fitted for all sizes together, and with what each size owns.
CUTS = {"cut_ofadiff": PLAIN, "cut_corrected": {}, "cut_corrected_own": {"correction_rank": 8}}


def run_settings(job: Job, variant: Variant, output: str) -> runs.RunSettings:
    """What a run of the library is asked for."""
    place = job.place
    compression = runs.Compression(sizes=job.sizes, importance_samples=IMPORTANCE_SAMPLES)
    optimization = runs.Optimization(
        max_train_steps=job.steps,
        train_batch_size=BATCH_SIZE,
        learning_rate=JOINT_LEARNING_RATE,
        lr_warmup_steps=warmup_steps(job.steps),
        seed=job.seed,
    )
    return runs.RunSettings(
        runs.Model(pretrained_model_name_or_path=str(place.teacher_folder)),
        runs.Data(
            train_data_dir=str(place.images_folder("training")),
            validation_fraction=0.0,
            random_flip=place.study.random_flip,
        ),
        runs.Output(output_dir=output),
        compression=replace(compression, **variant.compression),
        losses=replace(runs.Losses(), **variant.losses),
        optimization=replace(optimization, **variant.optimization),
        watching=runs.Watching(checkpointing_steps=NEVER, validation_steps=NEVER, num_validation_images=0),
    )


def train_library(job: Job, variant: Variant) -> Mapping[str, Any]:
    """A joint run of the library as a user starts it."""
    run = runs.start(run_settings(job, variant, str(job.folder / "supernet")))
    supernet = make_supernet(run)
    runs.save(run, supernet, runs.train_jointly(run, supernet))
    return {}


def train_healed(job: Job) -> Mapping[str, Any]:
    """The joint run of the method `ofadiff`, and a LoRA that the largest size alone has, taught by the teacher."""
    joint = job.folder.with_name(job.folder.name.replace(HEALED, "ofadiff")) / "supernet"
    if not joint.exists():
        raise ValueError(
            f"{joint} is not there: the method {HEALED} heals what the method ofadiff has made; run that first"
        )
    steps = max(1, job.steps // len(job.sizes))
    settings = run_settings(job, Variant(), str(job.folder / "supernet"))
    run = start_healing(
        replace(
            settings,
            model=runs.Model(pretrained_model_name_or_path=str(joint)),
            one_size=runs.OneSize(
                size="largest", lora_rank=HEALING_RANK, teacher_model_name_or_path=str(job.place.teacher_folder)
            ),
            compression=runs.Compression(),
            optimization=runs.Optimization(
                max_train_steps=steps,
                train_batch_size=BATCH_SIZE,
                learning_rate=HEALING_LEARNING_RATE,
                lr_warmup_steps=warmup_steps(steps),
                seed=job.seed,
            ),
        )
    )
    single = make_single_size(run)
    save_healed(run, single, runs.train_jointly(run, single), job.folder / "supernet")
    return {"healing_steps": steps}


def cut_alone(job: Job) -> Supernet:
    """The library's own cut of the job's sizes, without any training."""
    return make_supernet(runs.start(run_settings(job, Variant(compression=PLAIN), str(job.folder / "supernet"))))


def train_scratch(job: Job) -> Mapping[str, Any]:
    """The architecture of a size with new weights, trained as the teacher was."""
    place, (size,) = job.place, job.sizes
    model = cut_alone(job).extract(size).to(DEVICE)
    torch.manual_seed(job.seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    prepare = place.prepare(model, place.scheduler(), training=True)

    def loss(step: int, batch: Batch) -> Tensor:
        return denoising_loss(model, batch, prepare)

    train_alone(job, model, loss, place.study.learning_rate)
    save_model(model, model_file(job, size))
    return {}


def train_alone(
    job: Job, model: nn.Module, loss: Callable[[int, Batch], Tensor], learning_rate: float = LEARNING_RATE
) -> None:
    """Trains one model, in place; it is in eval mode afterwards."""
    if job.place.study.kind.begin_training is not None:
        job.place.study.kind.begin_training(model)
    model.train().requires_grad_(True)
    data = job.place.data("training", model)
    steps = {"steps": job.steps, "learning_rate": learning_rate, "seed": job.seed}
    fit(list(model.parameters()), loss, data, **steps, name=f"{job.method} {job.sizes[0]:g}")
    model.eval()


# The paper.


def train_printed(job: Job) -> Mapping[str, Any]:
    """OFA-Diffusion as printed."""
    models, rates = train_paper(job.place, job.seed, job.steps)
    for size, model in models.items():
        save_model(model, model_file(job, size))
    return {"retention_rates": {f"{size:g}": rate for size, rate in rates.items()}}


# Whole blocks.


class Skipped(nn.Module):
    """What is left of a removed block: its input, through the shortcut's convolution where channels change.

    Args:
        shortcut: That convolution, or None.
    """

    def __init__(self, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv_shortcut = shortcut

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's input; times, labels and texts are not looked at."""
        return hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)


def skip(model: nn.Module, name: str) -> None:
    """Removes a block, in place."""
    owner, _, own = name.rpartition(".")
    shortcut = getattr(model.get_submodule(name), "conv_shortcut", None)
    setattr(model.get_submodule(owner), own, Skipped(shortcut))


def removable_blocks(model: ModelMixin) -> list[str]:
    """Residual blocks and attentions of a UNet; of a transformer its blocks but the first, whose time embedding is the
    model's.
    """
    if hasattr(model, "transformer_blocks"):
        return [f"transformer_blocks.{index}" for index in range(1, len(model.transformer_blocks))]
    return [name for name, module in model.named_modules() if isinstance(module, ResnetBlock2D | Attention)]


def block_effects(job: Job, teacher: ModelMixin) -> dict[str, float]:
    """The loss without each block alone; of all sizes of a seed the same, so it is found once."""
    file = job.folder.parent / "effects.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    prepare = job.place.prepare(teacher, job.place.scheduler(), training=False)
    batches = list(fixed_batches(job.place.data("training", teacher), BLOCK_SAMPLES, 128, job.seed, "blocks"))
    effects = {}
    for name in removable_blocks(teacher):
        without = copy.deepcopy(teacher)
        skip(without, name)
        effects[name] = mean_loss(without, batches, prepare)
    file.write_text(json.dumps(effects, indent=1) + "\n", encoding="utf-8")
    return effects


def choose_blocks(job: Job, teacher: ModelMixin) -> list[str]:
    """Blocks without which the model comes as close to a size as it can, those of the smallest effect first."""
    (size,), full = job.sizes, count_parameters(teacher)
    effects = block_effects(job, teacher)
    smaller, removed = copy.deepcopy(teacher), []
    for name in sorted(effects, key=effects.__getitem__):
        without = copy.deepcopy(smaller)
        skip(without, name)
        if abs(count_parameters(without) - size * full) < abs(count_parameters(smaller) - size * full):
            smaller, removed = without, [*removed, name]
    return removed


def train_blocks(job: Job) -> Mapping[str, Any]:
    """Fewer blocks, fine-tuned with the teacher's predictions and block outputs."""
    place, (size,), teacher = job.place, job.sizes, job.place.teacher()
    removed = choose_blocks(job, teacher)
    model = copy.deepcopy(teacher)
    for name in removed:
        skip(model, name)
    prepare = place.prepare(model, place.scheduler(), training=True)
    stages = tuple(dict.fromkeys(group.stage for group in find_channel_groups(teacher)))

    def loss(step: int, batch: Batch) -> Tensor:
        losses = []
        for inputs in parts_of(prepare(batch)):
            with block_outputs(model, stages) as features:
                prediction = predict(model, inputs)
            taught = distillation_loss(teacher, inputs, prediction, features, 1.0, FEATURE_WEIGHT)
            losses.append(prediction_loss(prediction, inputs) + taught)
        return torch.cat(losses)

    train_alone(job, model, loss)
    save_model(model, model_file(job, size), tuple(removed))
    return {"removed": removed}


# torch-pruning.


def prune(job: Job, teacher: ModelMixin, ratio: float) -> nn.Module:
    """The teacher cut by torch-pruning: a share of all channels, those of the residual stream too, by its first-order
    Taylor importance on 128 noisy training images.

    Raises:
        ImportError: If torch-pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("the method torch_pruning needs the package: pip install torch-pruning") from error
    place = job.place
    model = copy.deepcopy(teacher).requires_grad_(True)
    prepare = place.prepare(model, place.scheduler(), training=False)
    batches = fixed_batches(place.data("training", model), 128, BATCH_SIZE, job.seed, "importance")
    batches = [send_to_device(batch, DEVICE) for batch in batches]
    example = {name: value[:2] for name, value in parts_of(prepare(batches[0]))[0].arguments.items()}
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    heads = {layer: each.heads for each in attentions for layer in (each.to_q, each.to_k, each.to_v)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        max_pruning_ratio=LARGEST_RATIO,
        # One ratio for every layer makes steps of a sixth of the parameters where GroupNorm's groups stay whole.
        global_pruning=True,
        num_heads=heads,
        ignored_layers=output_layers(model),
    )
    for batch in batches:
        denoising_loss(model, batch, prepare).mean().backward()
    pruner.step()
    model.zero_grad()
    fit_attributes(model)
    return model


def output_layers(model: ModelMixin) -> list[nn.Module]:
    """What makes the prediction, whose channels stay; of a transformer also what is chunked or has a fixed table."""
    if not hasattr(model, "transformer_blocks"):
        return [model.conv_out]
    adaptive = [block.norm1.linear for block in model.transformer_blocks]
    streams = [each for block in model.transformer_blocks for each in (block.attn1.to_out[0], block.ff.net[2])]
    return [model.pos_embed.proj, model.proj_out_1, model.proj_out_2, *adaptive, *streams]


def train_torch_pruning(job: Job) -> Mapping[str, Any]:
    """The teacher cut by torch-pruning to the size's parameters, and fine-tuned."""
    place, (size,), teacher = job.place, job.sizes, job.place.teacher()
    full = count_parameters(teacher)
    low, high, best = 0.0, LARGEST_RATIO, copy.deepcopy(teacher)
    while abs(count_parameters(best) / full - size) > TOLERANCE / 2 and high - low > 0.001:
        ratio = (low + high) / 2
        pruned = prune(job, teacher, ratio)
        share = count_parameters(pruned) / full
        if abs(share - size) < abs(count_parameters(best) / full - size):
            best = pruned
        low, high = (ratio, high) if share > size else (low, ratio)
    prepare = place.prepare(best, place.scheduler(), training=True)

    def loss(step: int, batch: Batch) -> Tensor:
        return denoising_loss(best, batch, prepare)

    train_alone(job, best, loss)
    save_model(best, model_file(job, size))
    return {}


def library_methods() -> dict[str, Method]:
    """The library jointly, cut alone, and one size at a time; a variant `X` has a method of its name."""
    made = {
        name: Method(functools.partial(train_library, variant=variant), each_size=False)
        for name, variant in VARIANTS.items()
    }
    for name, changes in CUTS.items():
        train = functools.partial(train_library, variant=Variant(compression=changes))
        made[name] = Method(train, each_size=False, share="none")
    alone = {
        "alone": Variant(PLAIN, {"distill_weight": 0.0, **INDEPENDENT}, ADAMW),
        "alone_distilled": Variant(PLAIN, {"distill_weight": 1.0, **INDEPENDENT}, ADAMW),
        # With the joint run's learning rate over time, average and noise levels.
        "alone_distilled_linear": Variant(
            PLAIN, {"distill_weight": 1.0}, {"optimizer": "adamw", "learning_rate": LEARNING_RATE}
        ),
        "alone_ours": Variant(),
    }
    for name, variant in alone.items():
        train = functools.partial(train_library, variant=variant)
        made[name] = Method(train, each_size=True)
        made[name.replace("alone", "alone_share")] = Method(train, each_size=True, share="size")
    return made


METHODS: dict[str, Method] = {
    "paper": Method(train_printed, each_size=False),
    "cut_paper": Method(train_printed, each_size=False, share="none"),
    **library_methods(),
    "scratch": Method(train_scratch, each_size=True),
    HEALED: Method(train_healed, each_size=False),
    "torch_pruning": Method(train_torch_pruning, each_size=True),
    "blocks": Method(train_blocks, each_size=True),
}
