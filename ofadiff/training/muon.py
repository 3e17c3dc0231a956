"""Muon: steps along the orthogonal factor of the momentum, for the matrices of a network's blocks; AdamW for the rest.

A size that is drawn now and then changes the weights it shares with all others along few directions. AdamW, which looks
at single numbers, follows those that are large; an orthogonal step goes equally far in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ofadiff.channels import ChannelGroup
from ofadiff.layers import is_adaptable

# Coefficients of the Newton-Schulz iteration (Jordan et al. 2024): five steps bring singular values close to one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5

# Root mean square of AdamW's steps in practice, so that both take the same learning rate (arXiv 2502.16982, eq. 4).
STEP_SIZE = 0.2


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024), with the step size of Liu et al. (2025, arXiv 2502.16982).

    The momentum M of a matrix, with Nesterov's look ahead, takes the step −lr · 0.2 √max(rows, columns) · U Vᵀ, where
    M = U S Vᵀ. A convolution is the matrix of its rows, `(out, in * kernel)`. Keeps one number per weight, AdamW two.

    Args:
        matrices: Weights of linear maps and convolutions, whole on every process.
        others: What AdamW trains: norms, biases, embeddings, first and last layers.
        lr: Of both.
        momentum: Of the matrices' gradients, in [0, 1).
        **options: Of AdamW: `betas`, `eps`, `weight_decay`; weights of matrices decay as it decays the others'.

    Raises:
        ValueError: If a number is out of its range, or there is a matrix with fewer than two dimensions.

    Example:
        >>> matrices, others = split_weights(unet, groups)
        >>> optimizer = Muon(matrices.values(), others.values(), lr=1e-3)
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.9,
        **options: Any,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
        matrices, others = list(matrices), list(others)
        for matrix in matrices:
            if matrix.ndim < 2:
                raise ValueError(f"a weight of shape {tuple(matrix.shape)} is no matrix; give it among the others")
        groups: list[dict[str, Any]] = [
            {"params": matrices, "momentum": momentum},
            {"params": others, "momentum": None},
        ]
        super().__init__([group for group in groups if group["params"]], lr=lr, **options)

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As any optimizer's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        for group in every:
            if group["momentum"] is not None:
                self._step_matrices(group)
        self.param_groups = [group for group in every if group["momentum"] is None]
        try:
            super().step()
        finally:
            self.param_groups = every
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.tensor(0.0)  # AdamW's loading of a state looks for it
                state["momentum_buffer"] = torch.zeros_like(weight)
            state["step"] += 1
            momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
            step = orthogonalized(weight.grad.add(momentum, alpha=group["momentum"]).flatten(1))
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            size = STEP_SIZE * max(step.shape) ** 0.5
            weight.add_(step.view_as(weight).to(weight.dtype), alpha=-float(group["lr"]) * size)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of a matrix U S Vᵀ, `(rows, columns)`; in bfloat16 on GPUs, which is enough; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    value = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = value.shape[0] > value.shape[1]
    value = value.T if tall else value
    value = value / value.norm().clamp_min(torch.finfo(value.dtype).tiny)
    for _ in range(ITERATIONS):
        gram = value @ value.T
        value = a * value + (b * gram + c * gram @ gram) @ value
    return (value.T if tall else value).contiguous()


def split_weights(
    model: nn.Module, groups: Sequence[ChannelGroup]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """What `Muon` takes: the matrices inside the blocks that have channel groups, and all else, by name.

    Only parameters that want gradients. Embeddings of time, labels and text, patches, and the last layer are not among
    the matrices.
    """
    stages = {f"{group.stage}." for group in groups if group.kind != "time_embedding"}
    matrices: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        inside = any(name.startswith(stage) for stage in stages)
        chosen = inside and parameter.ndim >= 2 and is_adaptable(layer)
        (matrices if chosen else others)[name] = parameter
    return matrices, others
