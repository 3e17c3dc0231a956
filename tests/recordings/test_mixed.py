"""Images among recordings, for a pipeline that can be trained on both."""

import pytest
import torch
from conftest import plain_unet
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ofadiff import runs
from ofadiff.commands.compress import compress_with
from ofadiff.data.mixed_samples import MixedSamples
from ofadiff.data.order import draw_keys
from ofadiff.denoisers.prepare import parts_of
from ofadiff.training.losses import denoising_loss

pytestmark = pytest.mark.filterwarnings("ignore:.* of the parameters are elastic:UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a tiny pixel model, images for it, and calls of it."""
    folder = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(0)
    DDPMPipeline(plain_unet(), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder / "original")
    (folder / "images").mkdir()
    for number in range(6):
        Image.effect_noise((16, 16), 20 + 10 * number).convert("RGB").save(folder / "images" / f"{number}.png")
    (folder / "calls.jsonl").write_text('{"num_inference_steps": 4, "batch_size": 2}\n' * 3)
    return folder


def settings_of(folder, out, **data):
    data = {"train_data_dir": str(folder / "images"), "validation_fraction": 0.34, **data}
    return runs.RunSettings(
        runs.Model(pretrained_model_name_or_path=str(folder / "original")),
        runs.Data(**data),
        runs.Output(output_dir=str(out)),
        calls=runs.Calls(calls_file=str(folder / "calls.jsonl"), steps_per_call=2),
        compression=runs.Compression(sizes=(0.6, 1.0), importance_samples=2, correction_samples=0),
        optimization=runs.Optimization(max_train_steps=2, train_batch_size=3, lr_warmup_steps=0),
        watching=runs.Watching(validation_samples=2),
    )


def test_every_sample_comes_once_with_its_own_loss(made, tmp_path):
    run = runs.start_recorded(settings_of(made, tmp_path / "ofa"))
    data = run.data.training
    recorded, images = len(data.recorded), len(data.images)
    assert isinstance(data, MixedSamples) and (recorded, images) == (4, 4) and len(data) == 8
    keys = draw_keys(len(data), range(8), 0)
    assert sorted(index for index, _ in keys) == list(range(8))
    batch = data.collate([data[key] for key in keys])
    assert batch["seeds"].tolist() == [seed for _, seed in keys]
    parts = parts_of(run.prepare(batch))
    assert sum(len(part.target) for part in parts) == 2 * recorded + images  # a recorded call has two rows
    with torch.no_grad():
        losses = denoising_loss(run.denoiser, batch, run.prepare)
    assert losses[: 2 * recorded].max() < 1e-8  # the original against its own answers
    assert losses[-images:].min() > 1e-3  # the original against the noise of images
    only_images = data.collate([data[key] for key in keys if key[0] >= recorded])
    assert only_images["parts"] == [] and len(parts_of(run.prepare(only_images))) == 1
    assert "images" not in data.collate([data[key] for key in keys if key[0] < recorded])
    # Of stratified noise levels each image has its sample's own, and recorded calls have what they had.
    quantiles = torch.arange(len(keys)) / len(keys)
    *calls, pictures = parts_of(run.prepare({**batch, "quantiles": quantiles}))
    own = torch.tensor([index >= recorded for index, _ in keys])
    assert torch.equal(pictures.arguments["timestep"], (quantiles[own] * 50).long())
    before = [part.arguments["timestep"] for part in parts[:-1]]
    assert all(map(torch.equal, (part.arguments["timestep"] for part in calls), before))


def test_a_mixed_run_ends_with_all_sizes(made, tmp_path):
    result = compress_with(settings_of(made, tmp_path / "ofa"))
    assert result.steps == 2 and result.history[0][1.0] < 1e-8 < result.history[0][0.6]  # validated on recordings
    card = (tmp_path / "ofa" / "README.md").read_text()
    assert "recordings of" in card and "and " + str(made / "images") in card


def test_what_a_mixed_run_does_not_take_is_named(made, tmp_path):
    settings = settings_of(made, tmp_path / "ofa")
    for bundle, values, message in [
        ("losses", runs.Losses(distill_weight=0.5), "--distill_weight is not for runs that mix images into recordings"),
        ("captions", runs.Captions(center_crop=True), "--center_crop is for text-to-image models"),
    ]:
        with pytest.raises(ValueError, match=message):
            runs.start_recorded(runs.RunSettings(**{**vars(settings), bundle: values}))
    with pytest.raises(ValueError, match=r"none is not a folder|no such folder|is no folder"):
        runs.start_recorded(settings_of(made, tmp_path / "ofa", train_data_dir=str(made / "none")))
    assert not list(tmp_path.iterdir())  # nothing was sampled before
