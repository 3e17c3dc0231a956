"""Importance of every unit of every channel group, by a criterion from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ofadiff.channels import ChannelGroup, check_groups
from ofadiff.importance import magnitude, random, sensitivity, taylor
from ofadiff.options import check_options
from ofadiff.reading.arguments import check_argument, check_choice, is_loader

__all__ = ["CRITERIA", "score_channels"]

# A new criterion is one file and one line here: `criterion(model, groups, batches, loss_fn, **options)`.
CRITERIA: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "taylor": taylor.taylor,
    "magnitude": magnitude.magnitude,
    "random": random.random,
    "sensitivity": sensitivity.sensitivity,
}


def score_channels(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    criterion: str = "taylor",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Scores every unit of every group.

    Args:
        model: The denoiser, not elastic yet; unchanged afterwards.
        groups: Its channel groups.
        batches: What `loss_fn` takes, one batch after the other; only `"taylor"` reads them.
        loss_fn: `loss_fn(model, batch)` gives the loss of every sample, `(N,)`; only `"taylor"` calls it.
        criterion: `"taylor"` (equation 4), `"magnitude"` or `"random"`.
        **options: Options of the criterion, such as `loss_threshold` of `"taylor"` or `seed` of `"random"`.

    Returns:
        For every group its scores, shape `(width,)`, float32, larger is more important.

    Raises:
        ValueError: If the criterion is unknown, takes no such option, or needs batches and a loss and gets none, or the
            groups are another model's.

    Example:
        >>> scores = score_channels(unet, groups, batches, loss_fn, criterion="taylor")
        >>> scores[groups[0].name].shape == (groups[0].width,)
        True
    """
    check_choice("criterion", criterion, sorted(CRITERIA))
    check_groups(model, groups)
    if batches is not None:
        check_argument("batches", batches, is_loader(batches), "a list or a loader of what loss_fn takes")
    if loss_fn is not None:
        check_argument("loss_fn", loss_fn, callable(loss_fn), "a function of a model and a batch")
    check_options(f"criterion {criterion!r}", CRITERIA[criterion], options)
    return CRITERIA[criterion](model, groups, batches, loss_fn, **options)
