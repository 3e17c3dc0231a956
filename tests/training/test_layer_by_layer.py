"""A model that stays in main memory is scored and corrected as one on the device, which holds a layer of it."""

import pytest
import torch
from conftest import make_unet, random_inputs, squared_output_loss
from tiny_transformers import tiny, tiny_inputs

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.correction import correct_readers
from ofadiff.training.layer_by_layer import layer_by_layer
from training.live_memory import LiveMemory, bytes_of

# The model says so of kernels that it cannot use in mixed precision.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")

CPU = torch.device("cpu")
FLUX = "FluxTransformer2DModel"
# Wide and with few tokens: nearly all memory is weights.
WIDE = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "num_layers": 2, "num_single_layers": 6}


def made(name, **changes):
    torch.manual_seed(0)
    if name == "plain":
        model = make_unet(name)
        return model, [random_inputs(model, 2, seed) for seed in range(2)]
    return tiny(name, **changes), [tiny_inputs(name, 2, seed) for seed in range(2)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["plain", "DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_scores_are_the_same(name, autocast):
    model, batches = made(name)
    if autocast:
        model.enable_gradient_checkpointing()
    groups = find_channel_groups(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = score_channels(model, groups, batches, squared_output_loss)
        with layer_by_layer(model, CPU):
            scores = score_channels(model, groups, batches, squared_output_loss)
    assert all(torch.equal(scores[name], score) for name, score in expected.items())
    after = model.state_dict()
    assert places == [tensor.data_ptr() for tensor in after.values()]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("autocast", [False, True])
def test_scoring_holds_one_layer_at_a_time(autocast):
    model, batches = made(FLUX, **WIDE)
    groups, weights = find_channel_groups(model), [*model.parameters(), *model.buffers()]
    largest = max(bytes_of(module.parameters(recurse=False)) for module in model.modules())
    peaks = []
    for device in (None, CPU):
        with LiveMemory(beside=weights) as memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if device is None:
                score_channels(model, groups, batches, squared_output_loss)
            else:
                with layer_by_layer(model, device):
                    score_channels(model, groups, batches, squared_output_loss)
        peaks.append(memory.most)
    # Autocast keeps a copy of all weights in half precision where they are on the device; here it keeps none.
    assert peaks[1] < (peaks[0] if not autocast else peaks[0] - 0.4 * bytes_of(weights)) + 3 * largest
    assert peaks[1] < 0.5 * bytes_of(weights)


def test_readers_are_corrected_the_same_and_adapters_come_along():
    results = []
    for layered in (False, True):
        model, batches = made("PixArtTransformer2DModel")
        groups = find_channel_groups(model)
        scores = score_channels(model, groups, criterion="magnitude")
        supernet = Supernet(model, groups, scores, allocate(model, groups, scores, (0.7, 1.0)))

        def call(model, inputs):
            model(**inputs, return_dict=False)

        options = {"adapter_rank": 2, "ridge": 1e-2}
        if layered:
            with layer_by_layer(model, CPU):
                correct_readers(supernet, batches, call, **options)
        else:
            correct_readers(supernet, batches, call, **options)
        assert supernet.size_adapters
        adapters = {size: adapter.state_dict() for size, adapter in supernet.size_adapters.items()}
        results.append((model.state_dict(), *adapters.values()))
    for expected, given in zip(*results, strict=True):
        assert all(torch.equal(given[name], weight) for name, weight in expected.items())


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    model, batches = made("plain")
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with pytest.raises(RuntimeError), layer_by_layer(model, CPU):
        model(batches[0]["sample"][:, :1], 0)
    assert places == [tensor.data_ptr() for tensor in model.state_dict().values()]
