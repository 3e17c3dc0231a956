import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_supernet, make_unet, output, plain_unet, random_inputs
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, inject_adapter_in_model
from tiny_stable_diffusion import save_stable_diffusion

from ofadiff import OFAPipeline, Supernet, layers
from ofadiff.adapters.size_adapter import SizeAdapter, save_size_adapter
from ofadiff.channels import active_part
from ofadiff.pipelines import ClassConditionalDDPMPipeline


def sample(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(index) for index in range(2)]
    if pipeline.unet.config.num_class_embeds is not None:
        arguments["class_labels"] = [3, 5]
    else:
        arguments["batch_size"] = 2
    return torch.from_numpy(pipeline(generator=generator, num_inference_steps=2, output_type="np", **arguments).images)


def checkpoint(folder, unet):
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    supernet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(params=["plain", "scale_shift"])
def folder(request, tmp_path):
    return checkpoint(tmp_path / "checkpoint", make_unet(request.param))


def test_it_is_the_checkpoint_s_own_pipeline_class(folder):
    pipeline = OFAPipeline.from_pretrained(folder)
    assert isinstance(pipeline, OFAPipeline) and isinstance(pipeline, DDPMPipeline)
    assert pipeline.sizes == (0.5, 1.0) and pipeline.size == 1.0
    assert "size" in inspect.signature(pipeline.__call__).parameters
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert sample(pipeline).shape == (2, 16, 16, 3)


def test_size_holds_for_one_call(folder):
    pipeline = OFAPipeline.from_pretrained(folder)
    full = sample(pipeline)
    small = sample(pipeline, size=0.5)
    assert pipeline.size == 1.0 and torch.equal(sample(pipeline), full)
    assert not torch.equal(small, full)
    assert torch.equal(sample(pipeline, size="smallest"), small)
    with pytest.raises(TypeError, match="no_such_argument"):
        pipeline(size=0.5, no_such_argument=1)
    assert pipeline.size == 1.0
    pipeline.set_size(0.5)
    assert torch.equal(sample(pipeline), small)


def test_a_call_cuts_the_weights_once_and_the_next_call_sees_what_became_of_them(folder, monkeypatch):
    cut = []

    def count(weight, *args):
        cut.append(weight)
        return active_part(weight, *args)

    monkeypatch.setattr(layers, "active_part", count)
    pipeline = OFAPipeline.from_pretrained(folder)
    before = sample(pipeline, size=0.5)
    assert len(cut) == len({id(weight) for weight in cut}) > 0
    for parameter in pipeline.unet.parameters():
        parameter.data.mul_(0.9)  # which autograd does not notice: so do weight averages and fused adapters
    after = sample(pipeline, size=0.5)
    assert not torch.equal(after, before)
    assert torch.equal(after, sample(pipeline.extract(0.5)))


def test_extracting_and_loading_one_size_give_the_same_images(folder, tmp_path):
    pipeline = OFAPipeline.from_pretrained(folder)
    small = sample(pipeline, size=0.5)
    extracted = pipeline.extract(0.5)
    assert not isinstance(extracted, OFAPipeline) and torch.equal(sample(extracted), small)
    one = OFAPipeline.from_pretrained(folder, size=0.5)
    assert one.sizes == (0.5,) and one.size == 0.5 and torch.equal(sample(one), small)
    assert torch.equal(sample(one.extract(0.5)), small)
    with pytest.raises(ValueError, match=r"size is 1\.0; it must be one of 0\.5"):
        one(size=1.0)


def test_plain_diffusers_loads_an_extracted_pipeline(folder, tmp_path):
    pipeline = OFAPipeline.from_pretrained(folder)
    pipeline.extract(0.5).save_pretrained(tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["unet"] == ["ofadiff", "OFAUNet2DModel"]
    plain = DiffusionPipeline.from_pretrained(tmp_path / "small")
    assert type(plain) is DDPMPipeline
    inputs = random_inputs(plain.unet)
    with pipeline.supernet.at(0.5) as unet:
        assert torch.equal(output(plain.unet, inputs), output(unet, inputs))


@pytest.mark.slow
def test_diffusers_without_ofadiff_loads_the_checkpoint_at_full_size(folder):
    script = (
        "import sys, torch; from diffusers import DiffusionPipeline, UNet2DModel; "
        f"p = DiffusionPipeline.from_pretrained({str(folder)!r}); "
        "assert type(p.unet) is UNet2DModel and 'ofadiff' not in sys.modules; "
        "print(float(sum(v.double().sum() for v in p.unet.state_dict().values())))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    state = OFAPipeline.from_pretrained(folder).unet.state_dict()
    assert float(printed) == pytest.approx(float(sum(value.double().sum() for value in state.values())))


def test_saving_keeps_the_sizes(folder, tmp_path):
    pipeline = OFAPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    again = OFAPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(sample(again, size=0.5), sample(pipeline, size=0.5))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])  # either, whichever the installed diffusers knows
def test_dtype_and_variant(folder, tmp_path, name):
    OFAPipeline.from_pretrained(folder, **{name: torch.float16}).save_pretrained(tmp_path / "half", variant="fp16")
    states = []
    for size in (None, 0.5):
        options = {"variant": "fp16", name: torch.bfloat16}
        loaded = OFAPipeline.from_pretrained(tmp_path / "half", size=size, **options)
        assert loaded.unet.dtype == torch.bfloat16
        states.append(loaded.extract(0.5).unet.state_dict())
    assert all(torch.equal(states[1][name], weight) for name, weight in states[0].items())
    with pytest.raises(ValueError, match="they are two names of one argument"):
        OFAPipeline.from_pretrained(folder, dtype=torch.float16, torch_dtype=torch.float16)


def test_a_variant_that_only_other_components_have(tmp_path):
    unet = make_unet("sd15")
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    save_stable_diffusion(tmp_path / "checkpoint")
    supernet.save_pretrained(tmp_path / "checkpoint" / "unet")
    vae = tmp_path / "checkpoint" / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    for size in (None, 0.5):
        pipeline = OFAPipeline.from_pretrained(tmp_path / "checkpoint", size=size, variant="fp16", safety_checker=None)
        assert isinstance(pipeline, StableDiffusionPipeline) and pipeline.sizes[0] == 0.5


def test_text_to_image_at_a_size(tmp_path):
    unet = make_unet("sd15")
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    save_stable_diffusion(tmp_path / "checkpoint", cross_attention_dim=32)
    supernet.save_pretrained(tmp_path / "checkpoint" / "unet")
    pipeline = OFAPipeline.from_pretrained(tmp_path / "checkpoint", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    texts = {"prompt_embeds": torch.randn(1, 12, 32), "negative_prompt_embeds": torch.zeros(1, 12, 32)}

    def image(pipeline, **size):
        generator = torch.Generator().manual_seed(0)
        return pipeline(**texts, **size, generator=generator, num_inference_steps=2, output_type="pt").images

    small = image(pipeline, size=0.5)
    assert pipeline.size == 1.0 and not torch.equal(small, image(pipeline))
    extracted = pipeline.extract(0.5)
    extracted.set_progress_bar_config(disable=True)
    assert torch.allclose(image(extracted), small, atol=1e-5)


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match=r"size is 0\.3; it must be one of 0\.5, 1"):
        OFAPipeline.from_pretrained(folder, size=0.3)
    with pytest.raises(ValueError, match=r"size is True; it must be one of 0\.5, 1"):
        OFAPipeline.from_pretrained(folder, size=True)
    with pytest.raises(ValueError, match="unet cannot be passed"):
        OFAPipeline.from_pretrained(folder, unet=plain_unet())
    with pytest.raises(ValueError, match="holds a supernet"):
        OFAPipeline.from_pretrained(folder, size=0.5).save_pretrained(folder)
    assert OFAPipeline.from_pretrained(folder).sizes == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        OFAPipeline.from_pretrained(tmp_path)
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"holds no ofa_config\.json .*`ofadiff compress` makes one"):
        OFAPipeline.from_pretrained(tmp_path / "plain")


def test_a_hub_repository_is_loaded_with_its_own_files(folder, tmp_path, monkeypatch):
    # A hub that gives what is asked for: every download copies the files whose names match into one snapshot.
    supernet = Supernet.from_pretrained(folder / "unet")
    small = supernet.extract(0.5)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), small)
    save_size_adapter(SizeAdapter.from_model(small), folder / "unet", 0.5)
    snapshot, shown = tmp_path / "snapshot", sample(OFAPipeline.from_pretrained(folder), size=0.5)

    def fetch(patterns):
        for file in (path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder)
            if any(name.match(pattern) for pattern in patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).write_bytes(file.read_bytes())
        return str(snapshot)

    known = ["model_index.json", "*/config.json", "*/scheduler_config.json", "*/diffusion_pytorch_model.safetensors"]
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: fetch(known))
    monkeypatch.setattr(
        "ofadiff.storage.pipeline_folder.snapshot_download", lambda name, allow_patterns: fetch(allow_patterns)
    )
    assert torch.equal(sample(OFAPipeline.from_pretrained("someone/compressed"), size=0.5), shown)
    with pytest.raises(ValueError, match="neither a folder nor the name of a hub repository"):
        OFAPipeline.from_pretrained("/no/such/folder")


def test_a_ddim_folder_takes_class_labels(tmp_path):
    unet = make_unet("scale_shift")
    supernet = make_supernet(unet, sizes=(0.5, 1.0))
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "checkpoint")
    supernet.save_pretrained(tmp_path / "checkpoint" / "unet")
    assert sample(OFAPipeline.from_pretrained(tmp_path / "checkpoint"), size=0.5).shape == (2, 16, 16, 3)


def test_class_labels_are_checked():
    pipeline = ClassConditionalDDPMPipeline(make_unet("scale_shift"), DDPMScheduler())
    with pytest.raises(ValueError, match=r"each must lie in \[0, 10\)"):
        pipeline(class_labels=[10])
    with pytest.raises(ValueError, match="one label per image"):
        pipeline(class_labels=[])
