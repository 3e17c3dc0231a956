import inspect
from functools import partial

import pytest
import torch
from conftest import plain_unet
from diffusers import DiffusionPipeline, UNet2DModel
from recipes.tiny_stable_diffusion import save_stable_diffusion, save_stable_diffusion_xl
from recipes.tiny_text_to_image import PIPELINES, save_pipeline
from versions import since

from ofadiff.denoisers.encoder import Encoder, encode_images
from ofadiff.denoisers.inputs import example_inputs
from ofadiff.denoisers.kind import CAPTIONS, CLASSES, DenoiserKind, pack_latents
from ofadiff.denoisers.old_tables import INPUTS
from ofadiff.denoisers.pipelines import denoiser_of
from ofadiff.denoisers.prepare import prepare_batch
from ofadiff.denoisers.table import DENOISERS
from ofadiff.noise.flow_matching import interpolate
from ofadiff.profiling.cost import count_macs
from ofadiff.training.distill import block_outputs, distillation_loss
from ofadiff.training.losses import predict

SAVE = {
    "sd": save_stable_diffusion,
    "sdxl": save_stable_diffusion_xl,
    **{name: partial(save_pipeline, name) for name in PIPELINES},
}
# diffusers computes with numpy of yesterday.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", params=SAVE)
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    SAVE[request.param](folder)
    index = DiffusionPipeline.load_config(folder)
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def given(value):
    """Arguments without those that say nothing."""
    if isinstance(value, dict):
        entries = {name: given(entry) for name, entry in value.items() if name != "return_dict"}
        return {name: entry for name, entry in entries.items() if entry is not None and entry != {}}
    return value


def assert_same(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same(ours[name], value)
    else:
        torch.testing.assert_close(ours, theirs.to(ours).expand_as(ours), atol=1e-5, rtol=1e-4)


def test_the_denoiser_is_called_as_the_pipeline_calls_it(pipeline):
    encode = Encoder(pipeline)
    kind, denoiser = encode.kind, denoiser_of(pipeline)
    calls = []

    def spy(module, args, kwargs):
        calls.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    if type(pipeline).__name__ == "SanaPipeline":
        latents = latents[:, :, :8, :8]
    theirs = latents if kind.packing == 1 else pipeline._pack_latents(latents, 1, 4, 16, 16)
    handle = denoiser.register_forward_pre_hook(spy, with_kwargs=True)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent", **kind.call_options}
    pipeline("a b", latents=theirs, **options)
    handle.remove()

    call = given(dict(calls[0]))
    n = len(call["encoder_hidden_states"])  # guidance compares with no prompt
    encoded = encode.encode_captions(["", "a b"][-n:])
    encoded["time_ids"] = torch.tensor([[32, 32, 0, 0, 32, 32]] * n)
    timesteps = pipeline.scheduler.timesteps[:1].expand(n)
    ours = kind.arguments(denoiser.config, latents.expand(n, -1, -1, -1), timesteps, encoded)
    assert_same(given(ours), call)


def test_latents_are_what_the_pipeline_decodes(pipeline):
    vae = pipeline.vae
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = encode_images(vae, pixels)
    encoded = vae.encode(pixels)
    shift = vae.config.get("shift_factor") or 0.0
    expected = encoded.latent if "latent" in encoded else encoded.latent_dist.mean
    with torch.no_grad():
        torch.testing.assert_close(latents["latent_mean"] / vae.config.scaling_factor + shift, expected)
    assert vae.config.scaling_factor != 1 and latents["latent_std"].shape == latents["latent_mean"].shape


def test_features_are_the_outputs_of_every_block_and_stream(pipeline):
    encode = Encoder(pipeline)
    kind, denoiser = encode.kind, denoiser_of(pipeline)
    batch = {"pixel_values": torch.rand(2, 3, 32, 32) * 2 - 1, "captions": ["a", ""], "seeds": torch.arange(2)}
    batch["time_ids"] = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    inputs = prepare_batch(batch, kind, denoiser.config, interpolate, encode)
    stages = [name for name, _ in denoiser.named_children() if name.endswith("transformer_blocks")] or ["down_blocks"]
    with block_outputs(denoiser, stages) as features:
        prediction = predict(denoiser, inputs)
    assert prediction.shape[0] == 2 and prediction.shape[2:] == inputs.target.shape[2:]
    assert len(features) == 2
    loss = distillation_loss(denoiser, inputs, prediction, features, weight=1.0, feature_weight=1.0)
    assert torch.equal(loss, torch.zeros(2))
    moved = {name: (*outputs[:-1], 1.1 * outputs[-1]) for name, outputs in features.items()}
    assert (distillation_loss(denoiser, inputs, prediction, moved, feature_weight=1.0) > 1e-4).all()


def test_packed_latents_hold_each_square_together():
    latents = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    packed = pack_latents(latents, 2)
    assert packed.shape == (2, 4, 12)
    assert torch.equal(packed[1, 2].view(3, 2, 2), latents[1, :, 2:, :2])
    assert pack_latents(latents, 1) is latents


class Mine(UNet2DModel):
    """A denoiser that the table does not know."""


@pytest.mark.parametrize("add", ["DENOISERS", "INPUTS"])
def test_a_kind_of_ones_own_is_one_entry(monkeypatch, add):
    model = Mine(**plain_unet().config)
    asked = []

    def inputs(model, zeros):
        asked.append(zeros.batch_size)
        return {"sample": zeros(3, 8, 8), "timestep": zeros.whole()}

    for kind in DENOISERS:
        monkeypatch.setitem(DENOISERS, kind, DENOISERS[kind])  # all is as before afterwards
    if add == "DENOISERS":
        monkeypatch.setitem(DENOISERS, "mine", DenoiserKind("Mine", inputs))
    else:
        monkeypatch.setitem(INPUTS, "Mine", inputs)
    assert example_inputs(model, 2)["sample"].shape == (2, 3, 8, 8)
    assert count_macs(model) < count_macs(plain_unet())  # 8x8, where the config says 16x16
    assert asked == [2, 1]


@pytest.mark.parametrize(("name", "kind"), DENOISERS.items())
def test_each_kind_says_how_it_is_called(name, kind):
    assert since(f"diffusers.{kind.model}")
    trained = kind.components or kind.pixels_as
    assert (kind.arguments is not None) == bool(trained), name
    if trained:
        assert (kind.encode_captions is not None) == (kind.condition == CAPTIONS), name
        assert (kind.classes is not None) == (kind.condition == CLASSES), name
    for pipeline, component in kind.components.items():
        assert component in inspect.signature(since(f"diffusers.{pipeline}")).parameters, name
