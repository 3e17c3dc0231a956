"""Images of a pipeline, the same ones for the same seed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from ofadiff.denoisers.pipelines import class_count, denoiser_of
from ofadiff.evaluation.called import check_one_sample, frames_of, images_of, in_a_row, same_shapes
from ofadiff.evaluation.finite import finite_outputs
from ofadiff.evaluation.saved_images import SavedImages
from ofadiff.evaluation.share import Processes, Share
from ofadiff.pipelines import ClassConditionalDDPMPipeline, OFAPipeline
from ofadiff.pipelines.calls import check_calls, opened, without_bar
from ofadiff.reading.json_file import shown
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.size_schedule import SizeSchedule
from ofadiff.storage.finite import NotFiniteError

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# What `generate` gives to a pipeline's call itself, or what would change how many images come of it.
RESERVED = (
    "batch_size",
    "generator",
    "num_images_per_prompt",
    "num_inference_steps",
    "output_type",
    "return_dict",
    "size",
)


def generate(
    pipeline: DiffusionPipeline,
    num_samples: int,
    *,
    size: float | str | SizeSchedule | None = None,
    batch_size: int = 64,
    seed: int = 0,
    num_inference_steps: int = 50,
    arguments: Mapping[str, Sequence[Any]] | None = None,
    call_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    description: str = "Sampling",
) -> torch.Tensor:
    """Samples images; image i depends on `seed + i` alone, whatever the batch size and the device.

    Up to float rounding, that is: kernels differ with the batch size in their last bits.

    Args:
        pipeline: Any diffusers pipeline of images.
        num_samples: Images to sample, N.
        size: For an `OFAPipeline`: the size to sample at, or a schedule, by default the one that it is set to.
        batch_size: Images per call of the pipeline.
        seed: Seed of the first image; every image has a generator of its own.
        num_inference_steps: Denoising steps.
        arguments: What the pipeline's call takes for each image, such as `{"class_labels": range(10)}`; the values are
            used in turn, over and over. By default what `default_arguments` says.
        call_arguments: What the pipeline's call takes once, for all images, such as `{"guidance_scale": 7.5}`.
        progress: Whether to show a progress bar over the images.
        description: What the bar is called.

    Returns:
        uint8 images `(N, 3, H, W)`; grey ones are repeated to three channels.

    Raises:
        ValueError: If a number is below 1, `size` is none of the pipeline's sizes, an argument has no values or is none
            of the pipeline's, a text-to-image pipeline gets no prompts, or the scheduler ignores generators.
        NotFiniteError: If the denoiser, the VAE or an image is not finite: names the size, the step and the sample.

    Example:
        >>> images = generate(pipeline, 8, size=0.5, arguments={"class_labels": range(10)})
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if size is not None and not isinstance(pipeline, OFAPipeline):
        raise ValueError(
            f"size is {shown(size)}, but this {type(pipeline).__name__} is no OFAPipeline, so it has no sizes"
        )
    sampling = Sampling.of(pipeline, seed, num_inference_steps, arguments, call_arguments)
    sampling.check(pipeline)
    images: dict[int, torch.Tensor] = {}
    share = Share(num_samples, batch_size, Processes())
    draw_share(pipeline, sampling, share, images, progress, description, {} if size is None else {"size": size})
    return torch.stack([images[index] for index in share.indices])


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a pipeline, see `generate`."""

    seed: int
    num_inference_steps: int
    arguments: Mapping[str, Sequence[Any]]
    call_arguments: Mapping[str, Any]
    calls: Sequence[Mapping[str, Any]] | None = None

    @classmethod
    def of(
        cls,
        pipeline: DiffusionPipeline,
        seed: int,
        num_inference_steps: int,
        arguments: Mapping[str, Sequence[Any]] | None,
        call_arguments: Mapping[str, Any] | None,
        calls: Sequence[str | Mapping[str, Any]] | None = None,
    ) -> Sampling:
        """The settings of `generate`, with the pipeline's defaults where there are none; or calls in their place.

        Raises:
            ValueError: If there are no denoising steps, or a call cannot be made.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        if calls is not None:
            if arguments is not None:
                raise ValueError(f"calls and arguments ({', '.join(arguments)}) exclude each other")
            checked = check_calls(type(pipeline), calls, call_arguments)
            check_one_sample(checked)
            return cls(seed, num_inference_steps, {}, {}, checked)
        arguments = default_arguments(pipeline) if arguments is None else arguments
        return cls(seed, num_inference_steps, arguments, {} if call_arguments is None else call_arguments)

    def check(self, pipeline: DiffusionPipeline) -> None:
        """Raises ValueError if the pipeline cannot be called like this."""
        if self.calls is not None:
            check_calls(type(pipeline), self.calls)
            return
        check_arguments(pipeline, self.arguments, self.call_arguments)

    def condition(self, indices: Sequence[int]) -> dict[str, Any]:
        """What the call takes for each of these images; of calls their prompts, if all have one."""
        if self.calls is not None:
            prompts = [self.calls[i % len(self.calls)].get("prompt") for i in indices]
            return {"prompt": prompts} if all(isinstance(call.get("prompt"), str) for call in self.calls) else {}
        return {name: [values[i % len(values)] for i in indices] for name, values in self.arguments.items()}

    def draw_frames(
        self,
        pipeline: DiffusionPipeline,
        indices: Sequence[int],
        added: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> torch.Tensor:
        """These images, in one call: uint8 `(len(indices), F, 3, H, W)`, where F is 1 but for videos.

        All noise comes from the images' own generators, which are on the CPU, so that devices draw the same.

        Args:
            pipeline: What draws.
            indices: Indices of the images.
            added: What its call takes beside all else, such as a size.
            name: What to call the model in an error.

        Raises:
            ValueError: If the pipeline's scheduler draws noise elsewhere: the images would depend on the batch.
            NotFiniteError: If something is not finite.
        """
        condition = self.condition(indices) or {"batch_size": len(indices)}
        before = _global_random_states(pipeline.device)
        added = added or {}
        name = name or _name_of(pipeline, added.get("size"))
        cannot = f"{type(pipeline).__name__} cannot be called as it was asked for"
        with in_one_sentence(cannot, NotFiniteError), finite_outputs(pipeline, denoiser_of(pipeline), name, indices):
            if self.calls is not None:
                images = same_shapes([self._call(pipeline, index, added) for index in indices])
            else:
                output = pipeline(
                    **condition,
                    **self.call_arguments,
                    **added,
                    generator=[torch.Generator().manual_seed(self.seed + i) for i in indices],
                    num_inference_steps=self.num_inference_steps,
                    output_type="pt",
                )
                images = images_of(output, type(pipeline).__name__).unsqueeze(1)
        bad = [index for index, image in zip(indices, images, strict=True) if not torch.isfinite(image).all()]
        if bad:
            raise NotFiniteError(f"{name} gives images with values that are not finite, sample {bad[0]}")
        if not all(map(torch.equal, before, _global_random_states(pipeline.device))):
            raise ValueError(
                f"this {type(pipeline).__name__} draws noise from PyTorch's global generator (its scheduler is a "
                f"{type(pipeline.components.get('scheduler')).__name__}), so no image depends on its seed alone; "
                "choose another scheduler"
            )
        return _to_uint8(images.flatten(0, 1)).unflatten(0, (len(indices), -1))

    def _call(self, pipeline: DiffusionPipeline, index: int, added: Mapping[str, Any]) -> torch.Tensor:
        """Frames of one call, `(F, C, H, W)` in [0, 1], as its user would make it."""
        assert self.calls is not None
        own = {
            "generator": torch.Generator().manual_seed(self.seed + index),
            "num_inference_steps": self.num_inference_steps,
            "output_type": "pt",
        }
        known = {name: value for name, value in own.items() if name in call_parameters(pipeline)}
        call = opened(self.calls[index % len(self.calls)])
        return frames_of(pipeline(**{**known, **call, **added}), type(pipeline).__name__)


def draw_share(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    share: Share,
    images: SavedImages | dict[int, torch.Tensor],
    progress: bool = False,
    description: str = "Sampling",
    added: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> None:
    """Draws the images of a share that are not there yet.

    A batch that lacks an image is drawn as a whole, so that nothing depends on what was there.
    """
    bar = tqdm(total=len(share.indices), desc=description, disable=not progress)
    with evaluation_mode(pipeline), bar:
        for batch in share.batches:
            absent = [index for index in batch if index not in images]
            if absent:
                drawn = [in_a_row(frames) for frames in sampling.draw_frames(pipeline, batch, added, name)]
                for index in absent:
                    images[index] = drawn[index - batch[0]]
            bar.update(len(batch))


def _name_of(pipeline: DiffusionPipeline, size: float | str | SizeSchedule | None) -> str:
    """What to call a pipeline's model: the size that it samples at, where it has sizes."""
    if not isinstance(pipeline, OFAPipeline):
        return f"this {type(pipeline).__name__}"
    if isinstance(size, SizeSchedule) or size in pipeline.schedules:
        return f"the schedule {size!r}"
    return f"size {pipeline.subnets.find(pipeline.size if size is None else size).size:g}"


def default_arguments(pipeline: DiffusionPipeline) -> dict[str, Sequence[Any]]:
    """Arguments per image that a pipeline cannot do without: every class in turn for a class-conditional model."""
    if isinstance(pipeline, ClassConditionalDDPMPipeline):
        return {"class_labels": range(class_count(pipeline.unet))}  # type: ignore[arg-type]
    return {}


def check_arguments(
    pipeline: DiffusionPipeline, arguments: Mapping[str, Sequence[Any]], call_arguments: Mapping[str, Any]
) -> None:
    """Raises ValueError if a pipeline cannot be called with these, see `generate`."""
    for name, values in arguments.items():
        if isinstance(values, str):
            raise ValueError(f"the argument {name!r} is the string {values!r}; it must be a sequence of values")
        if len(values) == 0:
            raise ValueError(f"the argument {name!r} has no values; it needs at least one")
    parameters = call_parameters(pipeline)
    for name in (*arguments, *call_arguments):
        if name in RESERVED:
            raise ValueError(f"the argument {name!r} cannot be given; sampling sets it itself")
        if name not in parameters:
            raise ValueError(f"{type(pipeline).__name__} takes no argument {name!r}; it takes {', '.join(parameters)}")
        if name in arguments and name in call_arguments:
            raise ValueError(f"the argument {name!r} is given both per image and for all images")
    given = {*arguments, *call_arguments}
    for name, each in parameters.items():
        if each.default is inspect.Parameter.empty and name not in given and each.kind not in VARIADIC:
            raise ValueError(
                f"this {type(pipeline).__name__} needs the argument {name!r}; give calls of it, or `ofadiff evaluate` "
                "a --calls_file"
            )
    if "prompt" in parameters and given.isdisjoint(("prompt", "prompt_embeds")):
        raise ValueError(
            f"this {type(pipeline).__name__} makes images of prompts, and there are none; give arguments="
            '{"prompt": [...]}, or `ofadiff evaluate` a --prompts_file'
        )


def call_parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes by name; Stable Diffusion's `**kwargs` ignores what it doesn't know."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return {name: each for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}


@contextlib.contextmanager
def evaluation_mode(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Every model of a pipeline in eval mode, and no progress bar per call; both as they were afterwards."""
    models = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with without_bar(pipeline):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _global_random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    """`(N, 1 or 3, H, W)` in [0, 1] to uint8 `(N, 3, H, W)`."""
    return to_rgb((images.float() * 255).round().to(torch.uint8).cpu())


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey images `(N, 1, H, W)` with their channel repeated, colour images as they are.

    Raises:
        ValueError: If the images are not `(N, 1 or 3, H, W)`.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}; it must be (N, 3, H, W) or (N, 1, H, W)")
    return images.expand(-1, 3, -1, -1)
