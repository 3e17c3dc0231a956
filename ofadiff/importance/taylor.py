"""First-order Taylor importance (equation 4), exact for every sample, from one batched backward over activations.

I_c = (1/N) Σ_n | Σ_{w ∈ c} w · ∂L_n/∂w |, one tensor at a time, summed over the tensors that a channel touches.

For a linear map or convolution y = W x + b at positions p the inner sum needs no weight gradient:
    output channel i:  Σ_w w · ∂L_n/∂w = Σ_p (y_{p,i} − b_i) · ∂L_n/∂y_{p,i}
    input channel j:   Σ_w w · ∂L_n/∂w = Σ_p x_{p,j} · ∂L_n/∂x_{p,j}   (the gradient through this layer only)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup, Slice
from ofadiff.importance.matrices import scored_slices


def taylor(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any] | None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None,
    loss_threshold: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Equation 4 with exact per-sample scores.

    Costs about half a training step per batch: parameters get no gradient. The model runs in eval mode, and its mode
    and `requires_grad` flags are as before at the end.

    Args:
        model: The denoiser, not elastic yet.
        groups: Its channel groups.
        batches: Batches for `loss_fn`; at least one.
        loss_fn: Denoising loss of every sample in a batch, `(N,)`.
        loss_threshold: Leave out samples whose loss is under this fraction of the largest loss seen, in [0, 1): the
            late timesteps that Diff-Pruning (arXiv 2305.10924) leaves out. 0 keeps all.

    Returns:
        For every group its scores, shape `(width,)`, float32.

    Raises:
        ValueError: If batches or the loss are missing, there is no batch, a loss is not `(N,)` or not finite, or
            `loss_threshold` is outside [0, 1).
    """
    if batches is None or loss_fn is None:
        raise ValueError("criterion 'taylor' needs batches and loss_fn")
    if not 0 <= loss_threshold < 1:
        raise ValueError(f"loss_threshold is {loss_threshold}; it must lie in [0, 1)")
    losses: list[torch.Tensor] = []
    # Per sample only where samples are left out later; otherwise the running sum.
    sums = {group.name: torch.zeros(group.width) for group in groups}
    samples: dict[str, list[torch.Tensor]] = {group.name: [] for group in groups}
    training = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # float16 gradients of a mean over pixels fall under its smallest number; the scores are scaled back.
    loss_scale = 2.0**14 if any(p.dtype == torch.float16 for p in gradients) else 1.0
    model.eval().requires_grad_(False)
    try:
        for batch in batches:
            with _Recorder(model, groups) as recorder, torch.enable_grad():
                loss = loss_fn(model, batch)
                if loss.ndim != 1:
                    raise ValueError(
                        f"loss_fn gave a loss of shape {tuple(loss.shape)}; it must be (N,), one per sample"
                    )
                if not torch.isfinite(loss).all():
                    raise ValueError(f"loss_fn gave a loss that is not finite: {loss.detach().tolist()}")
                (loss.float().sum() * loss_scale).backward()
            losses.append(loss.detach().float().cpu())
            for name, scaled in recorder.unit_scores(len(loss)).items():
                scores = scaled / loss_scale
                if not torch.isfinite(scores).all():
                    raise ValueError(f"scores of {name} are not finite in {model.dtype}; score in bfloat16 or float32")
                if loss_threshold:
                    samples[name].append(scores)
                else:
                    sums[name] += scores.sum(0)
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)
    if not losses:
        raise ValueError("there is no batch to score the channels on")
    every = torch.cat(losses)
    if not loss_threshold:
        return {name: total / len(every) for name, total in sums.items()}
    counted = every >= loss_threshold * every.max()
    return {name: torch.cat(parts)[counted].mean(0) for name, parts in samples.items()}


class _Recorder:
    """Collects Σ w · ∂L_n/∂w of every row and column that a group touches, by hooks on the layers.

    A module that is called more than once in a forward adds up before the absolute value is taken.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.model = model
        self.parts = [(group, part) for group in groups for part in scored_slices(model, group)]
        self.products: dict[tuple[str, str], torch.Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Recorder:
        for module, axis in dict.fromkeys((part.module, part.axis) for _, part in self.parts):
            layer = self.model.get_submodule(module)
            if axis == "out":
                self.handles.append(layer.register_forward_hook(_OutputHook(self.products, (module, axis))))
            else:
                self.handles.append(layer.register_forward_pre_hook(_InputHook(self.products, (module, axis))))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def unit_scores(self, samples: int) -> dict[str, torch.Tensor]:
        """Absolute value per channel and tensor, summed to units: for every group `(samples, width)`, float32.

        Layers that the loss does not depend on count nothing: some transformers drop their last block's text stream.
        """
        if not self.products:
            raise ValueError("the loss depends on no channel group of the model, so none has a score")
        scores = {group.name: torch.zeros(samples, group.width) for group, _ in self.parts}
        for group, part in self.parts:
            if (part.module, part.axis) in self.products:
                products = self.products[part.module, part.axis]
                scores[group.name] += _per_sample_units(part, products, samples).cpu()
        return scores


def _per_sample_units(part: Slice, products: torch.Tensor, samples: int) -> torch.Tensor:
    if products.shape[0] % samples:
        raise ValueError(f"{part.module} ran on {products.shape[0]} rows, which {samples} samples do not divide")
    per_sample = products.unflatten(0, (samples, -1)).sum(1)
    return part.per_unit(per_sample.abs().T).T


def _channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


class _OutputHook:
    def __init__(self, products: dict[tuple[str, str], torch.Tensor], key: tuple[str, str]) -> None:
        self.products, self.key = products, key

    def __call__(self, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # Nothing upstream may need a gradient (text keys and values, time embeddings): then the output is a leaf.
        output = output if output.requires_grad else output.detach().requires_grad_()
        channel_dim = _channel_dim(layer)
        bias = layer.bias
        if bias is not None and channel_dim == 1:
            bias = bias.view(-1, *[1] * (output.ndim - 2))
        return _Product.apply(output, bias, channel_dim, self.products, self.key)


class _InputHook:
    def __init__(self, products: dict[tuple[str, str], torch.Tensor], key: tuple[str, str]) -> None:
        self.products, self.key = products, key

    def __call__(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # A private alias: its gradient comes through this layer alone, whoever else reads the same tensor.
        alias = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        return (_Product.apply(alias, None, _channel_dim(layer), self.products, self.key), *args[1:])


class _Product(torch.autograd.Function):
    """The identity; its backward adds Σ_p (value − bias) · gradient to a sum of shape `(rows, channels)`.

    The value is saved as autograd saves its own, so gradient checkpointing drops it and computes it anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        channel_dim: int,
        products: dict[tuple[str, str], torch.Tensor],
        key: tuple[str, str],
    ) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.bias, ctx.channel_dim, ctx.products, ctx.key = bias, channel_dim, products, key
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        # The bias is taken off only now, so that nothing but the activation is held until the backward.
        value = value if ctx.bias is None else value - ctx.bias.to(value.device)
        product = value.float() * gradient.float()
        positions = [dim for dim in range(1, product.ndim) if dim != ctx.channel_dim % product.ndim]
        total = product.sum(positions) if positions else product
        ctx.products[ctx.key] = ctx.products[ctx.key] + total if ctx.key in ctx.products else total
        return gradient, None, None, None, None
