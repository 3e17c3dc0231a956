"""Pipelines that no kind of denoiser is written for, from the command line to plain diffusers."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from recordings.tiny_pipelines import CALLS, COMPONENT, PIPELINES

from ofadiff import OFAPipeline
from ofadiff.commands.app import make_app
from ofadiff.commands.command import call
from ofadiff.pipelines.calls import opened

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* of the parameters are elastic:UserWarning")]

TINY = (
    "--max_train_steps 2 --train_batch_size 2 --importance_samples 4 --correction_samples 0 --validation_samples 2 "
    "--validation_fraction 0.3 --steps_per_call 1 --lr_warmup_steps 0"
)
# Tiny models whose embeddings are most of them.
SMALLEST = {"z_image": "0.92", "hunyuan_dit": "0.9"}


def sample(pipeline, folder, kind, **options):
    """Whatever a pipeline's first call gives, as one tensor."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(CALLS[kind][0])
    arguments = {name: folder / value if name == "image" else value for name, value in arguments.items()}
    torch.manual_seed(0)
    output = pipeline(**opened(arguments), **options, generator=torch.Generator().manual_seed(0), output_type="pt")
    return torch.as_tensor(output[0] if not isinstance(output[0], list) else output[0][0]).float()


@pytest.mark.parametrize("kind", PIPELINES)
def test_from_prompts_to_plain_diffusers(kind, saved, tmp_path, capsys):
    folder, component, small = saved(kind), COMPONENT[kind], SMALLEST.get(kind, "0.8")
    model = ["--pretrained_model_name_or_path", str(folder / "pipeline"), "--component", component]
    calls = ["--calls_file", str(folder / "calls.jsonl"), "--recordings_dir", str(tmp_path / "recordings")]
    made = call(
        make_app(),
        ["compress", *model, *calls, *TINY.split(), "--sizes", small, "1.0", "--output_dir", str(tmp_path / "ofa")],
    )
    assert made.steps == 2 and made.history[0][1.0] < 1e-8 < made.history[0][float(small)]
    config = json.loads((tmp_path / "ofa" / component / "ofa_config.json").read_text())
    assert config["provenance"]["criterion"] == "sensitivity"
    (extracted,) = call(
        make_app(), ["extract", "--checkpoint", str(tmp_path / "ofa"), "--sizes", small, "--output_dir", str(tmp_path)]
    )
    pipeline = OFAPipeline.from_pretrained(tmp_path / "ofa")
    images = {size: sample(pipeline, folder, kind, size=size) for size in ("smallest", 1.0)}
    plain = DiffusionPipeline.from_pretrained(extracted)
    assert type(plain.components[component]).__name__.startswith("OFA")
    alone = sample(plain, folder, kind)
    assert all(image.isfinite().all() for image in images.values())
    assert not torch.equal(images["smallest"], images[1.0])
    torch.testing.assert_close(alone, images["smallest"], rtol=1e-3, atol=1e-4)
