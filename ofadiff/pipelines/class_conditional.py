"""Sampling from a class-conditional denoiser of pixels: `DDPMPipeline` with `class_labels`."""

# Annotations are not strings here: diffusers 0.35 looks into those of a pipeline's components, for classes and Unions.
import inspect
import json
from collections.abc import Sequence
from typing import Union

import torch
from diffusers import (
    DDPMPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor

from ofadiff.denoisers.pipelines import class_count
from ofadiff.denoisers.table import kind_of_model
from ofadiff.reading.json_file import shown
from ofadiff.supernet_model import unwrapped


class ClassConditionalDDPMPipeline(DDPMPipeline):
    """`DDPMPipeline` for a denoiser with class embeddings, with any diffusers scheduler.

    diffusers has no pipeline class for such a model of pixels; on disk it stays a `DDPMPipeline` of the same
    components.

    Args:
        unet: A `UNet2DModel` whose config has `num_class_embeds`, a `DiTTransformer2DModel`, or a model of
            one's own with an entry in `DENOISERS`.
        scheduler: A diffusers scheduler.

    Example:
        >>> pipeline = ClassConditionalDDPMPipeline(unet, DDIMScheduler())
        >>> images = pipeline(class_labels=[3, 5], num_inference_steps=50).images
    """

    # diffusers' `from_pipe` takes over the two that are named, and loading is content with any model.
    def __init__(
        self,
        unet: Union[UNet2DModel, DiTTransformer2DModel, ModelMixin],  # noqa: UP007
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Samples one image for every label.

        Args:
            class_labels: Class of each image, `(N,)`, integers in [0, number of classes).
            generator: One generator, or one for each image.
            num_inference_steps: Denoising steps.
            output_type: `"pil"`, `"np"` (`(N, H, W, C)` in [0, 1]) or `"pt"` (`(N, C, H, W)` in [0, 1]).
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.

        Returns:
            The images.

        Raises:
            ValueError: If labels are missing or out of range, the number of classes is not known, or `output_type` is
                none of the three.
        """
        config = self.unet.config
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=self._execution_device)
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}; it must be (N,), one label per image")
        classes = _count_classes(unwrapped(self.unet))
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels are {labels.tolist()}; each must lie in [0, {classes})")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {shown(output_type)}; it must be 'pil', 'np' or 'pt'")
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), config.in_channels, height, width)
        image = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        image = image * self.scheduler.init_noise_sigma
        extra = self.prepare_step_arguments(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(image, t)
            model_output = self.unet(model_input, t.expand(len(labels)), class_labels=labels).sample
            image = self.scheduler.step(model_output, t, image, **extra).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    def to_json_string(self) -> str:
        """The pipeline's config; it names `DDPMPipeline`, so that plain diffusers loads the folder."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = DDPMPipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def prepare_step_arguments(self, generator: torch.Generator | list[torch.Generator] | None) -> dict:
        """The generator, for schedulers whose step draws noise."""
        accepts = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if accepts else {}


def _count_classes(denoiser: ModelMixin) -> int:
    """How many classes a denoiser knows. Raises ValueError if nothing says so, or it has no classes."""
    classes, name = class_count(denoiser), type(denoiser).__name__
    if classes is not None:
        return classes
    if kind_of_model(denoiser) is None:
        raise ValueError(
            f"how many classes a {name} has is not known; DENOISERS of ofadiff.denoisers must have an entry for it "
            "that says so, a DenoiserKind with classes="
        )
    raise ValueError(
        f"this {name} has no fixed number of classes; it must be conditioned on classes, as a UNet2DModel with "
        "num_class_embeds is"
    )
