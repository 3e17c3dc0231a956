"""How `quality.py` measures any denoiser of a study: the same noisy images, initial noise and features for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, DPMSolverMultistepScheduler, ModelMixin
from quality_data import Place, load_features, mean_loss
from torch import Tensor, nn

from ofadiff.data.order import fixed_batches
from ofadiff.denoisers.pipelines import class_count
from ofadiff.evaluation import METRICS, Subject, generate, register_extractor
from ofadiff.evaluation.metrics.extractors import FeatureExtractor
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.sampling import to_rgb
from ofadiff.noise.draws import Batch
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.profiling.cost import count_parameters

# Of these the ones that the library has.
WANTED = ("fid", "kid", "precision", "recall", "mind", "psnr")
NAMES = tuple(name for name in WANTED if name in METRICS)
SAMPLING_BATCH = 100


@dataclass
class Judge:
    """What models of a study are measured against.

    Attributes:
        place: The study.
        part: The images: `"tuning"` or `"judging"`.
        num_samples: Images sampled of each model.
        noisy_images: Noisy images of the loss.
    """

    place: Place
    part: str
    num_samples: int
    noisy_images: int

    @cached_property
    def teacher(self) -> ModelMixin:
        """The original model."""
        return self.place.teacher()

    @cached_property
    def batches(self) -> list[Batch]:
        """The noisy images of the loss."""
        data = self.place.data(self.part, self.teacher)
        return list(fixed_batches(data, self.noisy_images, 128, 0, "benchmark"))

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """What takes the features of FID and the like."""
        name = f"quality {self.place.folder.name}"
        register_extractor(name, load_features(self.place))
        return FeatureExtractor(name, self.teacher.device)

    @cached_property
    def reference_features(self) -> Tensor:
        """Features of the real images."""
        data = self.place.data(self.part, self.teacher)
        pixels = torch.stack([data[index, 0]["pixel_values"] for index in range(len(data))])
        images = to_rgb(((pixels + 1) * 127.5).round().to(torch.uint8))
        return self.extractor.features(images)

    @cached_property
    def teacher_images(self) -> Tensor:
        """What the original model draws from the same noise."""
        return self.draw(self.teacher)

    @cached_property
    def teacher_loss(self) -> float:
        """The original model's loss on the noisy images."""
        return self.loss(self.teacher)

    def loss(self, denoiser: nn.Module) -> float:
        """Mean denoising loss on the noisy images."""
        prepare = self.place.prepare(self.teacher, self.place.scheduler(), training=False)
        return mean_loss(denoiser.eval(), self.batches, prepare)

    def draw(self, denoiser: ModelMixin) -> Tensor:
        """Samples from fixed seeds: uint8 `(N, 3, H, W)`."""
        pipeline = make_pipeline(denoiser, self.place)
        how = {"batch_size": SAMPLING_BATCH, "num_inference_steps": self.place.study.inference_steps}
        return generate(pipeline, self.num_samples, **how)

    def measure(self, denoiser: ModelMixin) -> dict[str, float | None]:
        """Everything there is to say about a denoiser: parameters, loss, its excess over the teacher's, and metrics."""
        loss = self.loss(denoiser)
        images = self.teacher_images if denoiser is self.teacher else self.draw(denoiser)
        subject = Subject(
            denoiser=denoiser,
            images=images,
            arguments={},
            gather=lambda values: values,
            teacher_images=None if denoiser is self.teacher else self.teacher_images,
            reference=FeatureStatistics.of(self.reference_features),
            reference_features=self.reference_features,
            extractor=self.extractor,
            batch_size=SAMPLING_BATCH,
        )
        parameters = count_parameters(denoiser)
        values: dict[str, float | None] = {
            "params": parameters,
            "share": parameters / count_parameters(self.teacher),
            "loss": loss,
            "excess": (loss - self.teacher_loss) * 1e4,
        }
        for name in NAMES:
            values.update(METRICS[name].measure(subject))
        return values

    def settings(self) -> Mapping[str, object]:
        """What results have to share to be compared."""
        return {"part": self.part, "num_samples": self.num_samples, "noisy_images": self.noisy_images}


def make_pipeline(denoiser: ModelMixin, place: Place) -> DiffusionPipeline:
    """A pipeline around a denoiser, with the sampler that all models of all methods have."""
    scheduler = DPMSolverMultistepScheduler.from_config(place.scheduler().config)
    pipeline_class = DDPMPipeline if class_count(denoiser) is None else ClassConditionalDDPMPipeline
    return pipeline_class(denoiser, scheduler)
