"""A model of one's own, compressed: a U-ViT (Bao et al., arXiv 2209.12152) of scikit-learn's digits, in two minutes.

    python docs/u_vit.py --output_dir u-vit

trains a small U-ViT, compresses it to three sizes in one joint run, saves it, loads it again, samples every size and
extracts the smallest. docs/own_model.md explains it step by step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from cyclopts import Parameter
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.utils import make_image_grid
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

import ofadiff
from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.channels import ChannelGroup, Slice
from ofadiff.commands.command import main, script
from ofadiff.data.order import Key, fixed_batches, hold_out, load_batches, step_batches
from ofadiff.denoisers import DENOISERS, prepare_batch
from ofadiff.denoisers.kind import patch_size
from ofadiff.denoisers.prepare import Prepare
from ofadiff.denoisers.unet_2d import UNET_2D
from ofadiff.noise.diffusion import diffuse
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.storage.model_classes import MODEL_CLASSES
from ofadiff.training.bundles import Objective, Schedule, TrainingResult, Watching
from ofadiff.training.losses import denoising_loss
from ofadiff.training.train import train
from ofadiff.unet_elastic import FINDERS
from ofadiff.unet_elastic.dropped_attention import droppable
from ofadiff.unet_elastic.feed_forward import neurons
from ofadiff.values import COUNT, SIZES, WHOLE, Bundle

# The model


class UViTAttention(nn.Module):
    """Self-attention of all tokens, `(N, tokens, hidden_size)` to the same shape."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden_size // heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        projected = (layer(hidden_states) for layer in (self.to_q, self.to_k, self.to_v))
        query, key, value = (each.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for each in projected)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class UViTFeedForward(nn.Module):
    """Two linear maps with a GELU in between, for each token alone."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(hidden_size, inner_size)
        self.linear_out = nn.Linear(inner_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(hidden_states)))


class UViTBlock(nn.Module):
    """A transformer block; with `long_skip` it first takes in what an earlier block put out."""

    def __init__(self, hidden_size: int, heads: int, inner_size: int, long_skip: bool) -> None:
        super().__init__()
        self.long_skip = nn.Linear(2 * hidden_size, hidden_size) if long_skip else None
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = UViTAttention(hidden_size, heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.ff = UViTFeedForward(hidden_size, inner_size)

    def forward(self, hidden_states: Tensor, earlier: Tensor | None = None) -> Tensor:
        if self.long_skip is not None:
            hidden_states = self.long_skip(torch.cat([hidden_states, earlier], dim=-1))
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class UViT(ModelMixin, ConfigMixin):
    """A transformer to which time, class and patches are all tokens, with long skip connections as a UNet has them.

    Args:
        sample_size: Side of the images, in pixels.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the images.
        out_channels: Channels of the prediction; by default those of the images.
        hidden_size: Width of the residual stream.
        num_layers: Blocks; an odd number: as many before the middle one as behind it.
        num_attention_heads: Heads of every attention.
        mlp_ratio: Neurons of a feed-forward, in multiples of `hidden_size`.
        num_class_embeds: Classes, or None for an unconditional model.

    Raises:
        ValueError: If the number of blocks is even, patches do not tile the images, or heads do not divide the width.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        out_channels: int | None = None,
        hidden_size: int = 512,
        num_layers: int = 13,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        if num_layers % 2 == 0:
            raise ValueError(f"num_layers is {num_layers}; it must be odd, since one block is in the middle")
        if sample_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}; it must divide sample_size, {sample_size}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"num_attention_heads is {num_attention_heads}; it must divide hidden_size, {hidden_size}")
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_proj = Timesteps(hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, hidden_size)
        self.conditions = 1 if num_class_embeds is None else 2
        tokens = self.conditions + (sample_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, hidden_size))
        sizes = hidden_size, num_attention_heads, round(mlp_ratio * hidden_size)
        self.in_blocks = nn.ModuleList(UViTBlock(*sizes, long_skip=False) for _ in range(num_layers // 2))
        self.mid_block = UViTBlock(*sizes, long_skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(*sizes, long_skip=True) for _ in range(num_layers // 2))
        out_channels = in_channels if out_channels is None else out_channels
        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, out_channels * patch_size**2)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.dirac_(self.conv_out.weight)  # nothing at first: at random it holds training up for hundreds of steps

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts what the model was trained to, such as the noise.

        Args:
            sample: Noisy images, `(N, in_channels, sample_size, sample_size)`.
            timestep: One for all, or `(N,)`.
            class_labels: `(N,)`, integers; needed if the model has classes.
            return_dict: Whether to return a `UNet2DOutput` or a tuple.

        Returns:
            The prediction as `sample`, `(N, out_channels, sample_size, sample_size)`.

        Raises:
            ValueError: If labels are missing, or given to a model without classes.
        """
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(f"class_labels is {class_labels}; num_class_embeds is {self.config.num_class_embeds}")
        patches = self.patch_embed(sample)
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        tokens = [self.time_proj(times).to(patches)[:, None]]
        if self.class_embedding is not None:
            tokens.append(self.class_embedding(class_labels)[:, None])
        hidden_states = torch.cat([*tokens, patches.flatten(2).transpose(1, 2)], dim=1) + self.pos_embed
        earlier = []
        for block in self.in_blocks:
            hidden_states = block(hidden_states)
            earlier.append(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        for block in self.out_blocks:
            hidden_states = block(hidden_states, earlier.pop())
        pixels = self.proj_out(self.norm_out(hidden_states[:, self.conditions :]))
        images = F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, patches.shape[2:]), self.config.patch_size)
        output = self.conv_out(images)
        return UNet2DOutput(sample=output) if return_dict else (output,)


# What ofadiff has to know of it


def attention_groups(name: str, attn: UViTAttention, stage: str) -> list[ChannelGroup]:
    """The group of a `UViTAttention`; the unit is one channel of the head dimension, the same in every head."""
    head = {"units": attn.head_dim, "repeats": attn.heads}
    slices = (
        Slice(f"{name}.to_q", "out", **head, basis="query_key", keeps_softmax_scale=True),
        Slice(f"{name}.to_k", "out", **head, basis="query_key", dual=True),
        Slice(f"{name}.to_v", "out", **head, basis="value_output"),
        Slice(f"{name}.to_out", "in", **head, basis="value_output", dual=True),
    )
    resize = droppable(set_head_dim, UViTAttention)
    return [ChannelGroup(name, "self_attention", stage, slices, resize, droppable=True)]


def set_head_dim(attn: nn.Module, group: ChannelGroup, units: int) -> None:
    """Sets what the attention's forward reads beside its weights."""
    attn.head_dim = units


FINDERS[f"{__name__}.UViTAttention"] = attention_groups
FINDERS[f"{__name__}.UViTFeedForward"] = neurons("linear_in", reader="linear_out")
MODEL_CLASSES["UViT"] = UViT
DENOISERS["u_vit"] = replace(UNET_2D, model="UViT", divisor=patch_size, fixed_size=True)


# The run


class Digits:
    """scikit-learn's digits as samples for training: 8 pixels a side, grey, in [-1, 1].

    Args:
        indices: Which of the 1797; all by default.
    """

    def __init__(self, indices: Sequence[int] | None = None) -> None:
        digits = load_digits()
        indices = range(len(digits.images)) if indices is None else indices
        self.images = torch.tensor(digits.images[list(indices)], dtype=torch.float32)[:, None] / 8 - 1
        self.labels = torch.tensor(digits.target[list(indices)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, seed = key
        return {"pixel_values": self.images[index], "class_labels": self.labels[index], "seeds": seed}


def make_prepare(model: ModelMixin, scheduler: DDPMScheduler) -> Prepare:
    """What turns a batch of digits into the arguments of a U-ViT, and into what it should predict."""
    forward_process = functools.partial(diffuse, noise_scheduler=scheduler)
    return functools.partial(
        prepare_batch, kind=DENOISERS["u_vit"], config=model.config, forward_process=forward_process
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings(Bundle):
    """How large the example is."""

    output_dir: str = "u-vit"
    """folder to make; must be new or empty"""
    sizes: Annotated[tuple[float, ...], SIZES] = (0.4, 0.7, 1.0)
    """fractions of the parameters"""
    teacher_steps: Annotated[int, COUNT] = 1000
    """training steps of the original model"""
    joint_steps: Annotated[int, COUNT] = 600
    """training steps of the joint run"""
    batch_size: Annotated[int, COUNT] = 32
    """images of a step"""
    validation_samples: Annotated[int, COUNT] = 1024
    """noisy images of a validation loss"""
    num_samples: Annotated[int, COUNT] = 200
    """images sampled at every size"""
    inference_steps: Annotated[int, COUNT] = 20
    """denoising steps of an image"""
    seed: Annotated[int, WHOLE] = 0
    """of everything random"""


def compress_digits(*, settings: Settings = Settings()) -> dict[str, dict[str, float]]:
    """Train a small U-ViT of digits, compress it, sample every size, and extract the smallest.

    Returns:
        What the table shows, by size; of the original as `"original"`.

    Raises:
        ValueError: If the output folder holds something already.
    """
    folder = Path(settings.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not empty; choose another one or remove it")
    torch.set_num_threads(1)  # the model is too small for several: they would wait for each other
    torch.manual_seed(settings.seed)
    seen, held_out = (Digits(indices) for indices in hold_out(len(Digits()), 0.25, settings.seed))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    print("1/4  The original, trained from scratch", flush=True)
    teacher = UViT(
        sample_size=8, in_channels=1, hidden_size=64, num_layers=5, num_attention_heads=4, num_class_embeds=10
    )
    train_teacher(teacher, seen, scheduler, settings)
    original = ClassConditionalDDPMPipeline(teacher, scheduler)
    original.save_pretrained(folder / "teacher")

    print(f"2/4  Compression to {len(settings.sizes)} sizes in one joint run", flush=True)
    supernet = make_supernet(copy.deepcopy(teacher), seen, scheduler, settings)
    print(supernet.subnets, flush=True)
    result = train_sizes(supernet, teacher, seen, held_out, scheduler, settings)
    ClassConditionalDDPMPipeline(supernet.model, scheduler).save_pretrained(folder / "ofa")

    print("3/4  Loading it again, and sampling every size from the same seeds", flush=True)
    pipeline = OFAPipeline.from_pretrained(folder / "ofa")
    images = {"original": sample(original, settings)}
    images |= {f"{size:g}": sample(pipeline, settings, size=size) for size in reversed(pipeline.sizes)}
    save_grid(images, folder / "samples.png")

    print("4/4  The smallest size as a model of its own", flush=True)
    pipeline.extract("smallest").save_pretrained(folder / "smallest")
    ofadiff.OFAUViT.from_pretrained(folder / "smallest" / "unet")

    results = numbers(images, teacher, pipeline, result, seen)
    print(f"\n{table(results)}\n\n{folder / 'samples.png'} has a row for each.")
    return results


def train_teacher(model: UViT, digits: Digits, scheduler: DDPMScheduler, settings: Settings) -> None:
    """Trains a model on the denoising loss, in place."""
    steps, prepare = settings.teacher_steps, make_prepare(model, scheduler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    batches = list(step_batches(len(digits), range(steps), 1, settings.batch_size, settings.seed))
    for batch in tqdm(load_batches(digits, batches), "Teacher"):
        denoising_loss(model, batch, prepare).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def make_supernet(model: UViT, digits: Digits, scheduler: DDPMScheduler, settings: Settings) -> Supernet:
    """Rotates, ranks, gives every size its widths, and makes the model elastic, in place."""
    groups = find_channel_groups(model)
    rotate_attention(model, groups)
    batches = fixed_batches(digits, 16 * settings.batch_size, settings.batch_size, settings.seed, "importance")
    loss = functools.partial(denoising_loss, prepare=make_prepare(model, scheduler))
    scores = score_channels(model, groups, batches, loss)
    return Supernet(model, groups, scores, allocate(model, groups, scores, settings.sizes))


def train_sizes(
    supernet: Supernet, teacher: UViT, digits: Digits, held_out: Digits, scheduler: DDPMScheduler, settings: Settings
) -> TrainingResult:
    """Trains one size per step, taught by the digits and by the original, in place."""
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=2e-3, weight_decay=0.0)
    return train(
        supernet,
        digits,
        held_out,
        Objective(make_prepare(teacher, scheduler), teacher),
        optimizer,
        get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=settings.joint_steps),
        Accelerator(cpu=True),
        settings.output_dir,
        Schedule(settings.joint_steps, settings.batch_size, settings.seed, ema_decay=0.995),
        Watching(validation_samples=settings.validation_samples),
    )


def labels_of(count: int) -> list[int]:
    """All classes in turn."""
    return [number % 10 for number in range(count)]


def sample(pipeline: Any, settings: Settings, **options: Any) -> Tensor:
    """Images of all classes in turn from the same seed, `(num_samples, 1, 8, 8)` in [0, 1]."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(settings.seed)
    options |= {"num_inference_steps": settings.inference_steps, "output_type": "pt"}
    return pipeline(labels_of(settings.num_samples), generator=generator, **options).images


def save_grid(images: dict[str, Tensor], file: Path) -> None:
    """Ten images of each row, six times as large."""
    rows = [F.interpolate(row[:10], scale_factor=6).permute(0, 2, 3, 1).numpy() for row in images.values()]
    columns = min(map(len, rows))
    make_image_grid([image for row in rows for image in DDPMPipeline.numpy_to_pil(row)], len(rows), columns).save(file)


def numbers(
    images: dict[str, Tensor], teacher: UViT, pipeline: Any, result: TrainingResult, digits: Digits
) -> dict[str, dict[str, float]]:
    """What the table shows: costs, losses, how many images are read as what they should be, and PSNR in dB."""
    reader = KNeighborsClassifier(3).fit(digits.images.flatten(1), digits.labels)
    columns: dict[str, dict[str, float]] = {
        "original": {"params": teacher.num_parameters(), "loss": result.teacher_loss or 0.0}
    }
    for subnet in pipeline.subnets:
        cut, trained = (result.history[step][subnet.size] for step in (0, result.steps))
        columns[f"{subnet.size:g}"] = {"params": subnet.params, "loss": trained, "loss, only cut": cut}
    for name, drawn in images.items():
        columns[name]["read"] = float(reader.score((drawn * 2 - 1).flatten(1), labels_of(len(drawn))))
        if name != "original":
            columns[name]["psnr"] = float(-10 * (drawn - images["original"]).square().mean().log10())
    return {name: columns[name] for name in images}


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a table."""
    heads = ("size", "parameters", "held-out loss", "the same, only cut", "read as asked", "PSNR with the original")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in results.items():
        share = f"{row['params'] / results['original']['params']:.1%}"
        cells = [name, share, f"{row['loss']:.4f}"]
        cells += [f"{row['loss, only cut']:.4f}" if "loss, only cut" in row else "–", f"{row['read']:.1%}"]
        cells += [f"{row['psnr']:.1f} dB" if "psnr" in row else "–"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    # What is saved names the module of the model, and "__main__" is another program's tomorrow.
    import u_vit

    main(script(u_vit.compress_digits, __file__))
