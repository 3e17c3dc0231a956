"""Values that are not finite, found where they arise: their images would be black, and have numbers all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ofadiff.storage.finite import NotFiniteError


@contextmanager
def finite_outputs(pipeline: Any, denoiser: nn.Module, name: str, samples: Sequence[int] = ()) -> Iterator[None]:
    """A block in which a pipeline's denoiser and its VAE's decoder have to give finite values.

    Args:
        pipeline: What samples.
        denoiser: Its denoiser.
        name: What to call the model in an error, such as `"size 0.5"`.
        samples: What to call the samples of a call; with guidance the denoiser sees each of them more than once.

    Raises:
        NotFiniteError: At the first value that is not finite: names the model, the denoising step and the sample.
    """
    watches = [denoiser.register_forward_hook(_Watch(f"the denoiser of {name}", samples, steps=True), with_kwargs=True)]
    vae = pipeline.components.get("vae")
    decoder = dict(vae.named_children()).get("decoder") if isinstance(vae, nn.Module) else None
    if decoder is not None:
        watch = _Watch(f"the VAE, decoding what {name} has made,", samples, steps=False)
        watches.append(decoder.register_forward_hook(watch, with_kwargs=True))
    try:
        yield
    finally:
        for watch in watches:
            watch.remove()


class _Watch:
    """Looks at what a module puts out; counts the timesteps that it is called with."""

    def __init__(self, what: str, samples: Sequence[int], steps: bool) -> None:
        self.what, self.samples, self.steps = what, samples, steps
        self.step, self.timestep = 0, [math.nan]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.steps:
            given = kwargs.get("timestep", args[1] if len(args) > 1 else self.step)
            timestep = torch.as_tensor(given).flatten()[:1].tolist()
            self.step, self.timestep = self.step + (timestep != self.timestep), timestep
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFiniteError(f"{self.what} gives values that are not finite{self._where(tensor)}")

    def _where(self, tensor: torch.Tensor) -> str:
        at = f" at denoising step {self.step}" if self.steps else ""
        rows = [row for row in range(len(tensor)) if not torch.isfinite(tensor[row]).all()] if tensor.ndim else []
        if not rows or not self.samples or len(tensor) % len(self.samples):
            return at
        return f"{at}, sample {self.samples[rows[0] % len(self.samples)]}"
