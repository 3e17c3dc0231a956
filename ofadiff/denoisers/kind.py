"""What there is to know about calling a kind of denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.denoisers.zeros import Zeros

Config = Mapping[str, Any]
Text = dict[str, Tensor]

# What denoisers are conditioned on beside the time.
CAPTIONS, CLASSES, CALLS = "captions", "classes", "calls"
CONDITIONS = {
    CAPTIONS: "text-to-image models that are trained on images",
    CLASSES: "unconditional and class-conditional models that are trained on images",
    CALLS: "pipelines that are trained on recordings of their own calls (--calls_file, --recordings_dir)",
}

# The forward processes, see `ofadiff.noise`.
DIFFUSION, FLOW_MATCHING = "diffusion", "flow matching"


def patch_size(config: Config) -> int:
    """Side of a denoiser's patches, in its inputs' pixels; 1 without any."""
    return config.get("patch_size", 1)


@dataclass(frozen=True)
class DenoiserKind:
    """A kind of denoiser: everything about calling it.

    Attributes:
        model: Name of its class.
        example_inputs: (model, zeros) -> keyword arguments of one forward, to count and to time it.
        components: What it is called in the pipelines that it is trained in, by the name of their class.
        pixels_as: What it is called in pipelines of pixels, which have a scheduler beside it and nothing else.
        condition: What it is conditioned on in these: `"captions"`, or `"classes"`, which may be none; or `"calls"`
            where all that is known of it are recordings.
        arguments: (config, noisy samples `(N, C, H, W)`, their timesteps `(N,)`, the encoded batch) -> keyword
            arguments of its forward, as the pipeline's own call gives them.
        encode_captions: (pipeline, captions) -> their text, tensors with a row for each caption, as the pipeline's own
            call encodes it; an empty caption is what it guides away from when no negative prompt is given.
        classes: (model) -> how many classes it knows; infinitely many where it embeds any number, None without classes.
        null_class: (config) -> the label of no class; None where it has none, and labels are never left out.
        begin_training: (model) -> nothing; what has to be set on a model that is trained.
        forward_processes: Forward processes that it can have been trained with, `"diffusion"` and `"flow matching"`.
        packing: Side of the square of latents that is one token of its input and output, 1 where these are images.
        divisor: (config) -> what sides of its inputs are multiples of, beside `packing`.
        fixed_size: Whether it takes inputs of its config's `sample_size` only.
        split_alone: Classes of modules inside its blocks that are also used outside of these: FSDP splits them by
            themselves.
        learned_variance: Whether its output may hold a variance beside the prediction.
        call_options: What the pipeline's call needs to sample at just the height and width that it is given.
        training_defaults: What its training needs where nothing is asked for, by the name of the flag.
    """

    model: str
    example_inputs: Callable[[nn.Module, Zeros], dict[str, Any]]
    components: Mapping[str, str] = field(default_factory=dict)
    pixels_as: str | None = None
    condition: str = CAPTIONS
    arguments: Callable[[Config, Tensor, Tensor, Mapping[str, Any]], dict[str, Any]] | None = None
    encode_captions: Callable[[Any, Sequence[str]], Text] | None = None
    classes: Callable[[Any], float | None] | None = None
    null_class: Callable[[Config], int] | None = None
    begin_training: Callable[[nn.Module], None] | None = None
    forward_processes: tuple[str, ...] = (DIFFUSION, FLOW_MATCHING)
    packing: int = 1
    divisor: Callable[[Config], int] = patch_size
    fixed_size: bool = False
    split_alone: tuple[str, ...] = ()
    learned_variance: bool = True
    call_options: Mapping[str, Any] = field(default_factory=dict)
    training_defaults: Mapping[str, Any] = field(default_factory=dict)


def pack_latents(latents: Tensor, side: int) -> Tensor:
    """Each square of latents as one token: `(N, C, H, W)` to `(N, H/side · W/side, C · side²)`; as they are if 1."""
    if side == 1:
        return latents
    n, channels, height, width = latents.shape
    squares = latents.view(n, channels, height // side, side, width // side, side)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * side * side)


def call_default(pipeline: Any, name: str) -> Any:
    """The value that an argument of the pipeline's call has when it is not given."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def masked_text_arguments(
    config: Config, latents: Tensor, timesteps: Tensor, encoded: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of transformers that are told how long each caption is."""
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return {"hidden_states": latents, "timestep": timesteps, **{name: encoded[name] for name in names}}


def where_empty(captions: Sequence[str], nothing: Text, text: Text) -> Text:
    """The text of captions, with another one, of one row, in place of the empty ones."""
    empty = torch.tensor([not caption for caption in captions])
    replaced = {name: value.clone() for name, value in text.items()}
    for name, value in replaced.items():
        value[empty.to(value.device)] = nothing[name]
    return replaced


# What models of text and images are trained with by default: they are large, and so are their data sets.
TEXT_TO_IMAGE_DEFAULTS = {
    "resolution": 512,
    "validation_fraction": 0.02,
    "max_train_steps": 50_000,
    "learning_rate": 5e-5,
    "lr_warmup_steps": 500,
    "tracker_project_name": "ofadiff-sd",
    "validation_inference_steps": 25,
}
