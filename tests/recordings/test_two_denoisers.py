"""Both denoisers of one pipeline, compressed one after the other; their sizes move together."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from ofadiff import OFAPipeline
from ofadiff.commands.app import make_app
from ofadiff.commands.command import call

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* of the parameters are elastic:UserWarning")]

TINY = (
    "--max_train_steps 1 --train_batch_size 2 --importance_samples 2 --correction_samples 2 --validation_fraction 0 "
    "--steps_per_call 1"
)
BOTH = ("transformer", "transformer_2")


def compress(component, model, folder, out, sizes=("0.8", "1.0")):
    words = f"--pretrained_model_name_or_path {model} --component {component} --calls_file {folder / 'calls.jsonl'} "
    words += f"{TINY} --lr_warmup_steps 0 --output_dir {out} --sizes"
    return call(make_app(), ["compress", *words.split(), *sizes])


@pytest.fixture(scope="module")
def both(saved, tmp_path_factory):
    """A checkpoint of Wan 2.2 with sizes of both transformers."""
    folder, out = saved("wan_2_2"), tmp_path_factory.mktemp("both")
    compress("transformer", folder / "pipeline", folder, out / "one")
    compress("transformer_2", out / "one", folder, out / "both")
    return out


def widths(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_of_both_move_together(both):
    pipeline = OFAPipeline.from_pretrained(both / "both")
    assert pipeline.denoiser_names == BOTH and pipeline.sizes == (0.8, 1.0)
    pipeline.set_size(0.8)
    assert [supernet.size for supernet in pipeline.supernets.values()] == [0.8, 0.8]
    small = pipeline.extract(0.8)
    alone = OFAPipeline.from_pretrained(both / "both", size=0.8)
    assert alone.sizes == (0.8,)
    call_of = {"prompt": "a", "height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
    videos = []
    for each in (pipeline, small, alone):
        each.set_progress_bar_config(disable=True)
        videos.append(each(**call_of, generator=torch.Generator().manual_seed(0)).frames)
    for name in BOTH:
        assert widths(small.components[name]) < widths(pipeline.components[name])
        assert widths(alone.components[name]) == widths(small.components[name])
    torch.testing.assert_close(videos[0], videos[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(videos[1], videos[2], rtol=1e-3, atol=1e-4)


def test_a_denoiser_without_sizes_is_named(both, saved):
    pipeline = OFAPipeline.from_pretrained(both / "both")
    pipeline.transformer_2 = DiffusionPipeline.from_pretrained(saved("wan_2_2") / "pipeline").transformer_2
    with pytest.raises(ValueError, match="the pipeline's transformer_2 is another WanTransformer3DModel than it was"):
        pipeline("a", size=0.8)
    with pytest.raises(ValueError, match="transformer_2 is another"):
        pipeline.set_size(0.8)


def test_a_size_is_a_plain_pipeline(both, tmp_path):
    (folder,) = call(
        make_app(),
        f"extract --checkpoint {both / 'both'} --sizes smallest --output_dir {tmp_path}".split(),
    )
    plain = DiffusionPipeline.from_pretrained(folder)
    assert [type(plain.components[name]).__name__ for name in BOTH] == ["OFAWanTransformer3DModel"] * 2


def test_what_cannot_be_is_named(both, saved, tmp_path):
    folder = saved("wan_2_2")
    with pytest.raises(ValueError, match=r"those of the pipeline's transformer \(0\.8, 1\.0\)"):
        compress("transformer_2", both / "one", folder, tmp_path / "x", ("0.7", "1.0"))
    with pytest.raises(ValueError, match="is compressed already: its transformer; expected the original"):
        compress("transformer", both / "one", folder, tmp_path / "x")
    heal = (
        f"heal --pretrained_model_name_or_path {both / 'both'} --size 0.8 --lora_rank 2 --output_dir {tmp_path / 'x'}"
    )
    with pytest.raises(ValueError, match="has sizes of transformer and transformer_2; say which one with component"):
        call(make_app(), [*heal.split(), "--calls_file", str(folder / "calls.jsonl")])
    mixed = tmp_path / "mixed"
    shutil.copytree(both / "both", mixed)
    config = mixed / "transformer_2" / "ofa_config.json"
    config.write_text(config.read_text().replace('"size": 0.8', '"size": 0.7'))
    with pytest.raises(ValueError, match=r"has sizes .*; they differ"):
        OFAPipeline.from_pretrained(mixed)
    assert not (tmp_path / "x").exists()
