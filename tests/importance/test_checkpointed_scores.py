"""Scoring under gradient checkpointing: the same scores, and activations are dropped and computed anew."""

import pytest
import torch
from conftest import make_unet, random_inputs, relative_error, squared_output_loss
from tiny_transformers import tiny, tiny_inputs
from torch.utils._pytree import tree_leaves

from ofadiff import find_channel_groups, score_channels

# Denoisers, each with a layer that runs again when its block's activations are computed anew.
MODELS = {
    "plain": "down_blocks.0.resnets.0.conv1",
    "sdxl": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "SD3Transformer2DModel": "transformer_blocks.0.attn.to_q",
    "FluxTransformer2DModel": "transformer_blocks.0.attn.to_q",
}


def loss(model, inputs):
    return squared_output_loss(model, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_same_and_activations_are_not_held(name):
    unet = name in ("plain", "sdxl")
    held, calls, scores = [], [], []
    for checkpointed in (False, True):
        model = make_unet(name) if unet else tiny(name)
        inputs = random_inputs(model) if unet else tiny_inputs(name)
        if checkpointed:
            model.enable_gradient_checkpointing()
        counted = []
        model.get_submodule(MODELS[name]).register_forward_hook(lambda *_, counted=counted: counted.append(1))
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def saved(model, inputs, pack=pack, sizes=sizes):
            own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *tree_leaves(inputs)]}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss(model, inputs)
            held.append(sum(size for pointer, size in sizes.items() if pointer not in own))
            return value

        scores.append(score_channels(model, find_channel_groups(model), [inputs], saved))
        calls.append(len(counted))
    assert calls == [1, 2]
    assert held[1] < 0.7 * held[0]
    for group, score in scores[0].items():
        assert relative_error(scores[1][group], score) < 1e-5
