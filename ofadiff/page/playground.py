"""Pictures of the original and of every size, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ofadiff.page.costs import Costs, costs_at, costs_of_original, costs_over
from ofadiff.page.form import Form, Request
from ofadiff.pipelines.calls import without_bar
from ofadiff.profiling.timing import seconds_of
from ofadiff.size_schedule import SizeSchedule


@dataclass(frozen=True)
class Picture:
    """A picture and what it took.

    Attributes:
        image: The picture.
        title: What it was drawn with, such as `"size 0.6"`.
        seconds: Of the pipeline's whole call.
        costs: Of the denoiser.
        peak_bytes: On CUDA, the most memory that PyTorch held during the call, all that lies on the device included.
        schedule: The size of every step, where it was drawn with a schedule.
    """

    image: Image.Image
    title: str
    seconds: float
    costs: Costs
    peak_bytes: int | None = None
    schedule: SizeSchedule | None = None


class Playground:
    """A checkpoint to play with, and the original beside it; several users at once wait for one another.

    Args:
        pipeline: An `OFAPipeline` with all its sizes.
        original: A pipeline of the original model; it samples with the checkpoint's scheduler. By default the largest
            size stands for it.

    Raises:
        ValueError: If the pipeline's call cannot be made from a page (see `Form.of`), or the original's is another one.

    Example:
        >>> playground = Playground(OFAPipeline.from_pretrained("ofa"))
        >>> picture = playground.draw(Request(seed=0, steps=20), "0.6")
        >>> picture.image.save("0.6.png")
    """

    def __init__(self, pipeline: Any, original: DiffusionPipeline | None = None) -> None:
        self.pipeline, self.original = pipeline, original
        self.form = Form.of(pipeline)
        if original is not None:
            _check_original(pipeline, self.form, original)
            if pipeline.components.get("scheduler") is not None:
                original.scheduler = pipeline.scheduler
        self._one_at_a_time = threading.Lock()

    @property
    def choices(self) -> Mapping[str, float | SizeSchedule]:
        """What can be drawn at, by what it is called on the page: every size, then every kept schedule."""
        sizes: dict[str, float | SizeSchedule] = {str(size): size for size in self.pipeline.sizes}
        return sizes | {f"schedule {name}": schedule for name, schedule in self.pipeline.schedules.items()}

    @property
    def original_title(self) -> str:
        """What stands for the original."""
        return "the original" if self.original is not None else f"the largest size, {self.pipeline.sizes[-1]}"

    def draw(self, request: Request, choice: str) -> Picture:
        """A picture at one of the choices; the same request gives the same picture.

        Raises:
            ValueError: If there is no such choice, or the pipeline gives no picture; and whatever its call raises.
        """
        if choice not in self.choices:
            raise ValueError(f"the size is {choice!r}; it must be one of {', '.join(self.choices)}")
        size = self.choices[choice]
        if isinstance(size, SizeSchedule):
            followed = size if request.steps is None else size.over(request.steps)
            return self._draw(self.pipeline, request, choice, None, followed)
        return self._draw(self.pipeline, request, f"size {choice}", costs_at(self.pipeline, size), size)

    def draw_original(self, request: Request) -> Picture:
        """The same picture of the original, or of the largest size where there is none.

        Raises:
            ValueError: If the pipeline gives no picture; and whatever its call raises.
        """
        if self.original is None:
            largest = self.pipeline.sizes[-1]
            return self._draw(self.pipeline, request, self.original_title, costs_at(self.pipeline, largest), largest)
        costs = costs_of_original(self.original, self.pipeline)
        return self._draw(self.original, request, self.original_title, costs)

    def _draw(
        self,
        pipeline: Any,
        request: Request,
        title: str,
        costs: Costs | None,
        size: float | SizeSchedule | None = None,
    ) -> Picture:
        """A picture; where no costs are given, they are those of the forwards that it took."""
        at_size = {} if size is None else {"size": size}
        device, outputs = self.pipeline.device, []
        with self._one_at_a_time, without_bar(pipeline), _sizes_of_forwards(self.pipeline) as sizes:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = seconds_of(lambda: outputs.append(pipeline(**request.arguments(), **at_size)), device)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        image = _first_image(outputs[0], type(pipeline).__name__)
        costs = costs or costs_over(self.pipeline, sizes)
        return Picture(image, title, seconds, costs, peak, size if isinstance(size, SizeSchedule) else None)


@contextmanager
def _sizes_of_forwards(pipeline: Any) -> Iterator[list[float]]:
    """A block in which the size of every forward of a pipeline's denoisers is noted."""
    sizes: list[float] = []
    handles = [
        supernet.model.register_forward_hook(lambda *call, of=supernet: sizes.append(of.size))
        for supernet in pipeline.supernets.values()
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _first_image(output: Any, name: str) -> Image.Image:
    """The picture of a pipeline's output. Raises ValueError if it has none."""
    first = output[0]
    if isinstance(first, list) and first and isinstance(first[0], Image.Image):
        return first[0]
    raise ValueError(f"this {name} gives no picture but {type(output).__name__}, which the page cannot show")


def _check_original(pipeline: Any, form: Form, original: DiffusionPipeline) -> None:
    """Raises ValueError unless an original is called as the checkpoint's pipeline is, and has the same denoisers."""
    own, other = type(pipeline).__name__, type(original).__name__
    if own != other or Form.of(original) != form:
        named = f"a {other}" if own != other else f"another {other}, with other classes"
        raise ValueError(f"the original is {named}; it must be called as the checkpoint's {own} is")
    for name in pipeline.denoiser_names:
        if original.components.get(name) is None:
            raise ValueError(f"the original has no {name}, which is what the checkpoint has sizes of")
