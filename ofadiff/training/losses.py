"""The denoising loss L_n of a sample n = (x0, t, ε), in two parts.

A *prepare* function turns a batch into what the denoiser is called with and the target it should predict; the loss
compares. Another kind of model is another prepare function, another forward process (`diffuse` here, or flow matching)
another function that it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.denoisers.prepare import DenoiserInputs, Prepare
from ofadiff.noise.draws import Batch


def predict(model: nn.Module, inputs: DenoiserInputs) -> Tensor:
    """The denoiser's prediction, `(N, C, H, W)`, in the precision of its weights.

    Timesteps stay what they are, for the denoiser to embed: bfloat16 knows two of 998, 999 and 1000 at most.
    """
    arguments = _as_dtype(inputs.arguments, next(model.parameters()).dtype)
    arguments["timestep"] = inputs.arguments["timestep"]
    return model(**arguments, return_dict=False)[0]


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _as_dtype(entry, dtype) for name, entry in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over everything but the batch, in float32: two of `(N, …)` to `(N,)`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def prediction_loss(prediction: Tensor, inputs: DenoiserInputs) -> Tensor:
    """Each sample's loss L_n, `(N,)`. Channels beyond the target's, a learned variance, do not count."""
    return inputs.weight * mean_squared_error(prediction[:, : inputs.target.shape[1]], inputs.target)


def denoising_loss(model: nn.Module, batch: Batch, prepare: Prepare) -> Tensor:
    """Each sample's loss L_n, `(N,)`. With `prepare` bound it is the `loss_fn` of `score_channels`."""
    inputs = prepare(batch)
    return prediction_loss(predict(model, inputs), inputs)
