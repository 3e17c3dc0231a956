"""docs/deployment.md keeps its word: its blocks run as they stand there, and what they make computes the same."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_dropping_supernet, output, random_inputs, relative_error
from diffusers import UNet2DConditionModel
from tiny_stable_diffusion import save_stable_diffusion
from tiny_transformers import tiny
from torch._dynamo.testing import CompileCounter
from versions import needs_torchao, skip_if_older

from ofadiff import Supernet

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
START, *SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
SECTION = dict(section.split("\n", 1) for section in SECTIONS)


def run(text, **names):
    """The names that a text's blocks leave behind."""
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    return names


def without_some_branches(model, sizes):
    """A supernet whose smaller size has empty layers."""
    supernet = make_dropping_supernet(model, sizes)
    assert 0 in supernet.subnets[0].widths.values()
    return supernet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    few_blocks = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
    }
    save_stable_diffusion(folder / "sd-ofa", **few_blocks)
    unet = UNet2DConditionModel.from_pretrained(folder / "sd-ofa" / "unet")
    without_some_branches(unet, (0.5, 1.0)).save_pretrained(folder / "sd-ofa" / "unet")
    return folder


@pytest.fixture
def loaded(folder, monkeypatch):
    """What the page starts with, and what the supernet computes at that size."""
    monkeypatch.chdir(folder)
    names = run(START)
    with Supernet.from_pretrained("sd-ofa/unet").at(0.5) as unet:
        names["expected"] = output(unet, random_inputs(unet))
    return names


@pytest.fixture(params=["unet", "transformer"])
def denoiser(request, loaded):
    """That of the page, or a transformer's."""
    if request.param == "unet":
        return loaded["denoiser"]
    return without_some_branches(tiny("DiTTransformer2DModel"), (0.6, 1.0)).extract(0.6)


def error(denoiser, expected):
    return relative_error(output(denoiser, random_inputs(denoiser)).float(), expected)


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", generator=generator, num_inference_steps=2, output_type="np").images


def test_every_section_is_tested():
    own = ["bfloat16", "channels_last", "torch.compile", "torch.export and ONNX", "Quantization"]
    assert list(SECTION) == [*own, "What goes together"]  # the last by tests/test_composing.py


def test_bfloat16(loaded):
    pipeline = run(SECTION["bfloat16"], **loaded)["pipeline"]
    assert pipeline.unet.dtype == torch.bfloat16
    assert error(pipeline.unet, loaded["expected"]) < 3e-2
    assert sample(pipeline).shape == (1, 16, 16, 3)


def test_channels_last(loaded):
    before = sample(loaded["pipeline"])
    run(SECTION["channels_last"], **loaded)
    assert loaded["denoiser"].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert error(loaded["denoiser"], loaded["expected"]) < 1e-5
    assert abs(sample(loaded["pipeline"]) - before).max() < 1e-5


def test_compiling_makes_one_graph(loaded, monkeypatch):
    graphs, compile = CompileCounter(), torch.compile
    # The backend that the page leaves to PyTorch takes a minute.
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, backend=graphs, **options))
    before = sample(loaded["pipeline"])
    run(SECTION["torch.compile"], **loaded)
    for _ in range(2):
        assert abs(sample(loaded["pipeline"]) - before).max() < 1e-5
    assert graphs.frame_count == 1


def test_exported_programs_compute_the_same_at_every_batch_size(denoiser):
    skip_if_older("torch", "ONNX export that onnxscript converts")
    names = run(SECTION["torch.export and ONNX"], torch=torch, denoiser=denoiser)
    assert names["exported"].call_spec.out_spec.type is tuple  # so the file can be loaded without diffusers
    program = torch.export.load("denoiser.pt2").module()
    for batch_size in (1, 2, 3):
        inputs = random_inputs(denoiser, batch_size)
        expected = output(denoiser, inputs)
        with torch.no_grad():
            (prediction,) = program(**inputs, return_dict=False)
        assert relative_error(prediction, expected) < 1e-5
        (prediction,) = names["session"].run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert relative_error(torch.from_numpy(prediction), expected) < 1e-5


def test_quantization(denoiser):
    needs_torchao()
    expected = output(denoiser, random_inputs(denoiser))
    run(SECTION["Quantization"], denoiser=denoiser)
    assert 0 < error(denoiser, expected) < 2e-2


def test_a_pipeline_samples_with_a_quantized_denoiser(loaded):
    needs_torchao()
    before = sample(loaded["pipeline"])
    run(SECTION["Quantization"], **loaded)
    assert 0 < abs(sample(loaded["pipeline"]) - before).max() < 5e-2
