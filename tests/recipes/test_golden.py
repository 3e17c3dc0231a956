"""The losses of three short runs are those that are kept: nothing changes how sizes are trained without being seen.

    GOLDEN=write python -m pytest tests/recipes/test_golden.py

writes them anew, where training is meant to change.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline
from PIL import Image
from recipes.test_compress_ddpm import save_teacher
from recipes.test_compress_dit import CLASSES, make_transformer
from recipes.tiny_stable_diffusion import make_vae, save_captioned_images, save_stable_diffusion
from versions import skip_if_older

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

# Other processors and versions of torch sum up in another order, which a few steps of training carry on: without oneDNN
# the UNet's losses are 3e-7 apart. A learning rate that is a tenth higher moves them by 4e-2.
ROUNDING = 1e-3

OPTIONS = {
    "sizes": "0.6 1.0",
    "seed": 10,  # of which both sizes are drawn
    "max_train_steps": 5,
    "train_batch_size": 2,
    "importance_samples": 4,
    "correction_samples": 4,
    "validation_samples": 4,
    "validation_steps": 3,
    "checkpointing_steps": 100,
    "lr_warmup_steps": 0,
    "learning_rate": 5e-3,
    "ema_decay": 0.9,
    "adam_epsilon": 1e-4,
    "feature_distill_weight": 0.1,
}


def unet(folder):
    """A UNet of pixels, without classes."""
    save_teacher(folder / "model")
    save_images(folder / "images")
    return "compress_ddpm.py", {"num_validation_images": 0}


def transformer(folder):
    """A DiT of latents with classes."""
    torch.manual_seed(0)
    names = {index: f"class {index}" for index in range(CLASSES)}
    scheduler = DDIMScheduler(num_train_timesteps=50, clip_sample=False)
    DiTPipeline(make_transformer(out_channels=8), make_vae(), scheduler, names).save_pretrained(folder / "model")
    save_images(folder / "images")
    return "compress_dit.py", {"num_validation_images": 0}


def text_to_image(folder):
    """Stable Diffusion, with min-SNR weights."""
    save_stable_diffusion(folder / "model")
    save_captioned_images(folder / "images")
    return "compress_sd.py", {"resolution": 16, "snr_gamma": 5, "random_flip": True}


RUNS = {"unet": unet, "transformer": transformer, "text_to_image": text_to_image}


def save_images(folder):
    noise = np.random.default_rng(0)
    for index in range(12):
        path = folder / str(index % CLASSES) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (18, 16), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("name", RUNS)
def test_a_short_run_has_the_losses_that_it_always_had(recipe, words, tmp_path, monkeypatch, name):
    logged = {}

    def log(self, values, step=None, **options):
        logged.setdefault(step, {}).update(values)

    monkeypatch.setattr(Accelerator, "log", log)
    which, options = RUNS[name](tmp_path)
    folders = {"pretrained_model_name_or_path": tmp_path / "model", "train_data_dir": tmp_path / "images"}
    folders |= {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    result = recipe(which, words({**folders, **OPTIONS, **options}))
    history = {f"{step} {size:g}": loss for step, losses in result.history.items() for size, loss in losses.items()}
    found = {
        "teacher_loss": result.teacher_loss,
        "sizes": [logged[step]["size"] for step in range(1, 6)],
        "losses": [logged[step]["loss"] for step in range(1, 6)],
        "validation_losses": history,
    }
    file = GOLDEN / f"{name}.json"
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
    if name == "text_to_image":
        skip_if_older("transformers", "text encoder of the same random weights")
    kept = json.loads(file.read_text())
    assert found["sizes"] == kept["sizes"]
    assert found["losses"] == pytest.approx(kept["losses"], rel=ROUNDING)
    assert found["teacher_loss"] == pytest.approx(kept["teacher_loss"], rel=ROUNDING)
    assert found["validation_losses"] == pytest.approx(kept["validation_losses"], rel=ROUNDING)
