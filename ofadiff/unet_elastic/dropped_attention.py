"""Attentions that a subnet does without: what is left of them are the biases of their output projections."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ofadiff.channels import ChannelGroup, Resize

# Layers that make the output, by what they are called over diffusers, and the text's output of a joint attention.
OUTPUT, TEXT_OUTPUT = ("to_out", "out_layer"), "to_add_out"


class DroppableAttention(nn.Module):
    """What an attention that a size does without puts before its stock class: a forward for when no channel is left.

    It asks no processor, so that the attention stays dropped whichever one is set. The class stays when the channels
    come back: a hook keeps the forward that it found.
    """

    stock: type[nn.Module]
    dropped = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class, unless the attention is dropped."""
        return self._without_channels(*args, **kwargs) if self.dropped else super().forward(*args, **kwargs)

    def _without_channels(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Returns what the stock class would if its output projections read zeros; of joint ones the text's part too.

        Args:
            hidden_states: `(…, channels)`; of an `Attention` also images, `(N, channels, H, W)`.
            encoder_hidden_states: Text or other tokens, `(…, channels)`.
            *args: Not used.
            **kwargs: Not used.
        """
        state = vars(self)
        if isinstance(self, Attention) and hidden_states.ndim == 4:
            output = self._project(OUTPUT, hidden_states.flatten(2).transpose(1, 2))
            output = output.transpose(1, 2).reshape(hidden_states.shape)
        else:
            output = self._project(OUTPUT, hidden_states)
        if state.get("residual_connection"):
            output = output + hidden_states
        output = output / state.get("rescale_output_factor", 1)
        # A joint attention returns both streams, with a layer for the text's, without one, or with a layer for neither.
        joint = TEXT_OUTPUT in self._modules or state.get("context_pre_only") or self._modules.keys().isdisjoint(OUTPUT)
        if encoder_hidden_states is None or not joint:
            return output
        return output, self._project((TEXT_OUTPUT,), encoder_hidden_states)

    def _project(self, names: tuple[str, ...], tokens: torch.Tensor) -> torch.Tensor:
        """What the first of these layers makes of tokens without channels; without such a layer, these tokens."""
        output = tokens[..., :0]
        layer = next((self._modules[name] for name in names if name in self._modules), None)
        for part in layer if isinstance(layer, nn.ModuleList) else () if layer is None else (layer,):
            output = part(output)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.stock,), self.__dict__


def droppable(resize: Resize, stock: type[nn.Module]) -> Resize:
    """A `resize` that also takes an attention of class `stock` away at no units, and brings it back."""
    return functools.partial(_resize, resize=resize, stock=stock)


def _resize(attn: nn.Module, group: ChannelGroup, units: int, resize: Resize, stock: type[nn.Module]) -> None:
    if not units and type(attn) is stock:
        attn.__class__ = _droppable_class(stock)  # type: ignore[arg-type]
    if isinstance(attn, DroppableAttention):
        attn.dropped = not units
    if units:
        resize(attn, group, units)


@functools.cache
def _droppable_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Droppable{stock.__name__}", (DroppableAttention, stock), {"__module__": __name__, "stock": stock})


def _new(stock: type[nn.Module]) -> nn.Module:
    return object.__new__(_droppable_class(stock))  # type: ignore[arg-type]
