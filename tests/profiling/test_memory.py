import pytest
import torch
from conftest import make_unet
from torch import nn

from ofadiff.denoisers.inputs import example_inputs
from ofadiff.profiling.memory import measure_peak_memory


class Chain(nn.Module):
    """Doubles its input, adds the two, and holds all three at once."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        doubled = x * 2
        return doubled + x


def test_peak_memory_is_weights_inputs_and_what_the_forward_holds():
    x = torch.zeros(1000, 256)
    assert measure_peak_memory(Chain(), {"x": x}) == 256 * 4 + 3 * x.nbytes


def test_peak_memory_of_a_denoiser_grows_with_the_batch_and_covers_its_weights(capfd):
    model = make_unet("plain")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    one, four = (measure_peak_memory(model, example_inputs(model, batch)) for batch in (1, 4))
    assert weights < one < four < weights + 4 * (one - weights) * 1.1
    assert capfd.readouterr().err == ""  # the profiler's own messages do not break progress bars


def test_tied_weights_count_once():
    model = Chain()
    model.tied = model.weight
    model.other = nn.Module()
    model.other.weight = model.weight
    x = torch.zeros(1000, 256)
    assert measure_peak_memory(model, {"x": x}) == 256 * 4 + 3 * x.nbytes


def test_peak_memory_on_other_devices_is_an_error():
    with pytest.raises(ValueError, match="the model is on 'meta'; peak memory is measured on cpu and cuda"):
        measure_peak_memory(Chain().to("meta"), {"x": torch.zeros(1, 256, device="meta")})
