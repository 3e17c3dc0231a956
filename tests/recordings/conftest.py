"""What tests of recordings share."""

import json

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from recordings.tiny_pipelines import CALLS, save_pipeline
from versions import skip_if_older

# diffusers and transformers warn of themselves.
WARNINGS = [
    "ignore:`?FluxPosEmbed:FutureWarning",
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:`past_key_values` is deprecated:FutureWarning",
    "ignore:`callback_steps` is deprecated:FutureWarning",
    "ignore:__array__ implementation:DeprecationWarning",
]


def pytest_collection_modifyitems(items):
    for item in items:
        if "/recordings/" in str(item.path):
            for warning in WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


# Their text encoders are made as transformers 5 has them.
FOR_TRANSFORMERS_5 = {"audioldm2", "auraflow", "qwen_image"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders with a tiny pipeline each, its calls, and the image that some of them take."""
    made = {}

    def save(kind):
        if kind not in made:
            if kind in FOR_TRANSFORMERS_5:
                skip_if_older("transformers", f"text encoder that is made as {kind}'s here")
            folder = tmp_path_factory.mktemp(kind)
            save_pipeline(kind, folder / "pipeline")
            made[kind] = folder
            Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "image.png")
            (folder / "calls.jsonl").write_text("\n".join(map(json.dumps, CALLS[kind])))
        return made[kind]

    return save


@pytest.fixture
def load(saved):
    def load(kind):
        pipeline = DiffusionPipeline.from_pretrained(saved(kind) / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
