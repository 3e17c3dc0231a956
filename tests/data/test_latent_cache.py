import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from recipes.tiny_stable_diffusion import save_stable_diffusion, save_stable_diffusion_xl
from training.tiny_run import noise_image

from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.images import Images
from ofadiff.data.latent_cache import LatentCache, LatentData
from ofadiff.data.order import draw_keys, load_batches
from ofadiff.denoisers.encoder import Encoder

SAVE = {"sd": save_stable_diffusion, "sdxl": save_stable_diffusion_xl}


@pytest.fixture(scope="module", params=SAVE)
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    SAVE[request.param](folder)
    return Encoder(DiffusionPipeline.from_pretrained(folder))


def make_data(count=6, **options):
    images = Images([str(index) for index in range(count)], noise_image)
    captions = [("a house",), ("a", "b c")] * (count // 2)
    settings = {"center_crop": True, "random_flip": True, "empty_captions": 0.3}
    return TextToImageData(images, captions, 16, **{**settings, **options})


def test_cached_samples_are_what_the_encoder_makes_of_the_images(encoder, tmp_path):
    data = make_data(indices=[1, 2, 4])
    cache = LatentCache(tmp_path / "latents", {})
    for process in range(2):
        cache.write(data, encoder, process, processes=2)
    assert cache.missing(range(6)) == [0, 3, 5]
    keys = [draw_keys(len(data), range(24), seed=0)]  # plain and mirrored, with every caption and without
    (expected,), (cached,) = ([*load_batches(source, keys)] for source in (data, LatentData(data, cache)))
    expected = encoder(expected)
    assert cached.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(cached[name], value, atol=1e-5, rtol=1e-4)


def test_latents_have_the_scale_of_the_denoiser_and_decode_to_the_image(encoder):
    pixels = make_data()[0, 0]["pixel_values"][None]
    mean = encoder.encode_images(pixels)["latent_mean"]
    vae = encoder.pipeline.vae
    with torch.no_grad():
        assert torch.equal(mean / vae.config.scaling_factor, vae.encode(pixels).latent_dist.mean)
    assert vae.config.scaling_factor != 1


def test_captions_are_encoded_as_in_sampling(encoder):
    text = encoder.encode_captions(["a house", ""])
    pipeline = encoder.pipeline
    # Without a negative prompt, guidance subtracts what the pipeline says for no caption at all.
    sampled = pipeline.encode_prompt("a house", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(text["encoder_hidden_states"], torch.cat(sampled[:2]))
    if "text_embeds" in text:
        torch.testing.assert_close(text["text_embeds"], torch.cat(sampled[2:]))


def test_a_cache_of_something_else_is_refused(encoder, tmp_path):
    folder = tmp_path / "latents"
    LatentCache(folder, {"resolution": 16}).write(make_data(2), encoder)
    LatentCache(folder, {"resolution": 16})
    with pytest.raises(ValueError, match="made with resolution 16, not 32; choose another folder or remove it"):
        LatentCache(folder, {"resolution": 32})
    with pytest.raises(ValueError, match="random ones differ every time"):
        LatentCache(tmp_path / "new", {}).write(make_data(center_crop=False), encoder)
    Image.new("L", (4, 4)).save(tmp_path / "mine.png")
    with pytest.raises(ValueError, match=r"it has no latents\.json, and is not empty"):
        LatentCache(tmp_path, {})


def test_a_killed_run_leaves_no_half_written_file(encoder, tmp_path, monkeypatch):
    cache = LatentCache(tmp_path / "latents", {})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            cache.write(make_data(2), encoder)
    assert cache.missing(range(2)) == [0, 1]
    cache = LatentCache(tmp_path / "latents", {})
    cache.write(make_data(2, indices=[0]), encoder)
    cache.write(make_data(2), encoder)
    assert cache.missing(range(2)) == []


def kill(*args):
    raise KeyboardInterrupt
