"""The denoising loss L_n of a sample n = (x0, t, ε), in two parts.

A *prepare* function turns a batch into what the denoiser is called with and the target it should predict; the loss
compares. Another kind of model is another prepare function, another forward process (`diffuse` here, or flow matching)
another function that it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofadiff.denoisers.prepare import DenoiserInputs, Prepare, parts_of
from ofadiff.noise.draws import Batch
from ofadiff.recordings.recorded_call import answer_of, answer_rows, in_dtype


def predict(model: nn.Module, inputs: DenoiserInputs) -> Tensor:
    """The denoiser's prediction, `(N, C, H, W)`, in the precision of its weights; of several outputs flat, `(N, …)`."""
    arguments = in_dtype(inputs.arguments, next(model.parameters()).dtype, inputs.time, inputs.dtype)
    return answer_rows(answer_of(model(**arguments, **inputs.options)))


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over everything but the batch, in float32: two of `(N, …)` to `(N,)`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def prediction_loss(prediction: Tensor, inputs: DenoiserInputs) -> Tensor:
    """Each sample's loss L_n, `(N,)`. Channels beyond the target's, a learned variance, do not count."""
    return inputs.weight * mean_squared_error(prediction[:, : inputs.target.shape[1]], inputs.target)


def denoising_loss(model: nn.Module, batch: Batch, prepare: Prepare) -> Tensor:
    """Each sample's loss L_n, `(N,)`. With `prepare` bound it is the `loss_fn` of `score_channels`."""
    return torch.cat([prediction_loss(predict(model, inputs), inputs) for inputs in parts_of(prepare(batch))])


def denoised(model: nn.Module, batch: Batch, prepare: Prepare) -> Tensor:
    """What counts of the denoiser's output, `(N, …)`: what criterion `"sensitivity"` takes in place of a loss."""
    predictions = [
        predict(model, inputs)[:, : inputs.target.shape[1]].flatten(1) for inputs in parts_of(prepare(batch))
    ]
    return torch.cat(predictions)
