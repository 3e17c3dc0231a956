"""What is not finite stops an evaluation, and says where it arose; timing has the machine to itself."""

import numpy as np
import pytest
import torch
from conftest import make_supernet, plain_unet
from diffusers import DDIMScheduler, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from tiny_stable_diffusion import save_stable_diffusion

from ofadiff import OFAPipeline, evaluate
from ofadiff.evaluation import generate
from ofadiff.evaluation.share import Processes
from ofadiff.storage.finite import NotFiniteError


@pytest.fixture
def broken(tmp_path):
    """A checkpoint whose size 1.0 alone gives NaN: a channel that 0.5 does not use does."""
    unet = plain_unet(in_channels=1, out_channels=1).eval()
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    group = next(g for g in supernet.groups if supernet.subnets[0].widths[g.name] < g.width and g.kind == "convolution")
    with torch.no_grad():
        unet.get_submodule(group.slices[0].module).weight[-1] = float("nan")
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "checkpoint")
    return OFAPipeline.from_pretrained(tmp_path / "checkpoint")


def test_a_size_that_gives_nan_gets_no_report(broken, tmp_path):
    options = {"num_inference_steps": 2, "num_samples": 8, "batch_size": 4, "progress": False}
    with pytest.raises(
        RuntimeError, match=r"the denoiser of size 1\.0 gives values that are not finite at denoising step 1"
    ):
        evaluate(broken, metrics=["macs"], samples_dir=tmp_path / "images", **options)
    assert not list(tmp_path.glob("images/**/*.png"))
    report = evaluate(broken, metrics=["macs"], sizes=[0.5], **options)
    assert report.rows[0].values["macs"] > 0
    with pytest.raises(RuntimeError, match=r"the denoiser of size 1 gives .* at denoising step 1, sample 0"):
        generate(broken, 4, num_inference_steps=2)
    assert torch.isfinite(generate(broken, 4, size=0.5, num_inference_steps=2).float()).all()


def test_the_step_and_the_sample_are_named(broken):
    broken.set_size(0.5)
    calls = []

    def spoil(module, args, output):
        calls.append(module)
        if len(calls) == 6:  # of two batches of three steps the last
            output.sample[1] = float("inf")
        return output

    handle = broken.unet.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match=r"the denoiser of size 0\.5 .* at denoising step 3, sample 5"):
        generate(broken, 8, batch_size=4, num_inference_steps=3)
    handle.remove()


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "checkpoint"
    save_stable_diffusion(folder)
    supernet = make_supernet(UNet2DConditionModel.from_pretrained(folder / "unet"), sizes=(0.6, 1.0))
    supernet.save_pretrained(folder / "unet")
    return folder


def spoiled(value, calls_before, row):
    calls = []

    def spoil(module, args, output):
        calls.append(module)
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if len(calls) > calls_before:
            tensor[row] = value

    return spoil


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", r"the denoiser of size 0\.6 gives values that are not finite at denoising step 2, sample 1"),
        ("vae", r"the VAE, decoding what size 0\.6 has made, gives values that are not finite, sample 1"),
    ],
)
def test_guidance_and_the_vae(stable_diffusion, part, message):
    pipeline = OFAPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    pipeline.set_size(0.6)
    # With guidance the UNet sees both samples twice: row 3 is sample 1.
    module, hook = (
        (pipeline.unet, spoiled(float("nan"), 1, 3))
        if part == "unet"
        else (pipeline.vae.decoder, spoiled(float("inf"), 0, 1))
    )
    module.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match=message):
        generate(pipeline, 2, num_inference_steps=2, arguments={"prompt": ["a", "b"]})
    plain = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(RuntimeError, match="this StableDiffusionPipeline"):
        generate(plain, 2, num_inference_steps=2, arguments={"prompt": ["a", "b"]})


def test_a_metric_that_is_no_number_is_no_dash(pipeline, monkeypatch):
    from ofadiff.evaluation.metrics.metric import Metric
    from ofadiff.evaluation.metrics.table import METRICS

    monkeypatch.setitem(METRICS, "macs", Metric(lambda subject: {"macs": np.nan}, METRICS["macs"].columns, ()))
    with pytest.raises(NotFiniteError, match=r"macs of size 1\.0 \(OFA\) is nan"):
        evaluate(pipeline, metrics=["macs"], num_inference_steps=1, num_shown=1, progress=False)


def test_all_processes_wait_while_one_takes_the_time(pipeline, monkeypatch):
    order = []
    monkeypatch.setattr(Processes, "wait", lambda self: order.append("wait"))
    monkeypatch.setattr(
        "ofadiff.evaluation.evaluator.measure_latencies",
        lambda models, inputs: order.append("measure") or {name: 1.0 for name, _ in models()},
    )
    evaluate(pipeline, metrics=["latency"], num_inference_steps=1, num_shown=1, progress=False)
    assert order == ["wait", "measure", "wait"]
