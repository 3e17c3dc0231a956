"""docs/own_model.md and docs/u_vit.py keep their word: a model that diffusers does not ship goes all the way."""

import importlib
import json
import logging
import re
import sys
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import make_supernet, output, random_inputs, relative_error
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from PIL import Image

import ofadiff
from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups
from ofadiff.commands.command import call, script
from ofadiff.commands.compress import compress
from ofadiff.denoisers import DENOISERS
from ofadiff.denoisers.pipelines import class_of_component
from ofadiff.layers import ELASTIC
from ofadiff.pipelines import ClassConditionalDDPMPipeline
from ofadiff.recordings import Recordings
from ofadiff.runs import Compression, Data, Model, Optimization, Output, Watching
from ofadiff.storage.model_classes import MODEL_CLASSES
from ofadiff.unet_elastic import FINDERS, elastic_parameters, verify_groups
from ofadiff.unet_elastic.heads import head_groups

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "own_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
QUOTE = "# u_vit.py\n"

SIZES = (0.4, 0.7, 1.0)
TINY = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 2}
BLOCKS_OF_ONE = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.fixture(scope="module")
def u_vit():
    """The module; what it has entered in tables is gone afterwards."""
    with patch.dict(FINDERS), patch.dict(MODEL_CLASSES), patch.dict(DENOISERS):
        sys.path.insert(0, str(DOCS))
        try:
            yield importlib.import_module("u_vit")
        finally:
            sys.path.remove(str(DOCS))
            sys.modules.pop("u_vit", None)


@pytest.fixture
def make(u_vit):
    def make(**changes):
        torch.manual_seed(0)
        return u_vit.UViT(**{**TINY, "num_class_embeds": 10, **changes}).eval()

    return make


@pytest.fixture
def folder(make, tmp_path):
    """A pipeline's folder whose denoiser is a supernet of three sizes."""
    supernet = make_supernet(make(), SIZES)
    ClassConditionalDDPMPipeline(supernet.model, DDPMScheduler()).save_pretrained(tmp_path / "ofa")
    return tmp_path / "ofa"


def test_the_page_runs(u_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        if not block.startswith(QUOTE):
            exec(block, names)
    inputs, supernet = names["inputs"], names["supernet"]
    for size in SIZES:
        with supernet.at(size):
            expected = output(supernet.model, inputs)
        for loaded in ("by_class", "by_instance", "by_name"):
            with names[loaded].at(size) as model:
                assert torch.equal(output(model, inputs), expected)
    with supernet.at(0.4):
        assert torch.equal(output(names["small"], inputs), output(supernet.model, inputs))
    assert not torch.equal(output(u_vit.UViT.from_pretrained("supernet"), inputs), output(names["teacher"], inputs))
    assert len(names["images"]) == 2 and names["images"][0].size == (8, 8)
    assert type(DiffusionPipeline.from_pretrained("ofa-0.4").unet) is ofadiff.OFAUViT
    assert len(names["recordings"]) == 4


def test_the_page_quotes_the_file():
    quotes = [block.removeprefix(QUOTE) for block in BLOCKS if block.startswith(QUOTE)]
    text = (DOCS / "u_vit.py").read_text(encoding="utf-8")
    assert len(quotes) == 3 and all(quote in text for quote in quotes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_class_embeds": None}, {"patch_size": 4, "mlp_ratio": 1.5, "out_channels": 2, "num_layers": 5}],
    ids=["classes", "no classes", "other shapes"],
)
def test_groups_are_what_they_say(make, changes):
    model = make(**changes)
    inputs = random_inputs(model)
    groups = find_channel_groups(model)
    half = range(model.config.num_layers // 2)
    blocks = [*(f"in_blocks.{number}" for number in half), "mid_block", *(f"out_blocks.{number}" for number in half)]
    expected = {f"{block}.{branch}" for block in blocks for branch in ("attn", "ff")}
    assert {group.name for group in groups} == expected and all(group.droppable for group in groups)
    assert max(verify_groups(model, groups, inputs).values()) < 1e-10
    # What stays: embeddings, norms, long skips, and the way out.
    rigid = sum(p.numel() for name, p in model.named_parameters() if not re.search(r"\.(attn|ff)\.", name))
    assert elastic_parameters(model, groups) + rigid == model.num_parameters()


def test_a_wrong_finder_is_found_out(make, u_vit, monkeypatch):
    def without_keys(name, attn, stage):
        (group,) = u_vit.attention_groups(name, attn, stage)
        group.slices = tuple(part for part in group.slices if not part.module.endswith("to_k"))
        return [group]

    monkeypatch.setitem(FINDERS, "u_vit.UViTAttention", without_keys)
    model = make()
    with pytest.raises(ValueError, match=r"attn is no channel group: reordering its units"):
        verify_groups(model, find_channel_groups(model), random_inputs(model))


def test_the_model_is_a_u_vit(make):
    model, inputs = make(), random_inputs(make())
    assert output(model, inputs).shape == (2, 1, 8, 8)
    assert torch.equal(output(model, inputs), model(**inputs).sample)
    # Each of its inputs counts, and so does the long skip connection.
    expected = output(model, inputs)
    for name, other in (("timestep", torch.tensor([500, 501])), ("class_labels", torch.tensor([9, 8]))):
        assert not torch.allclose(output(model, {**inputs, name: other}), expected)
    one = {**inputs, "timestep": 7}
    assert torch.equal(output(model, one), output(model, {**inputs, "timestep": torch.tensor([7, 7])}))
    with torch.no_grad():
        model.out_blocks[0].long_skip.weight[:, 32:] = 0
    assert not torch.allclose(output(model, inputs), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "num_layers is 4; it must be odd"),
        ({"patch_size": 3}, "patch_size is 3; it must divide sample_size, 8"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; it must divide hidden_size, 32"),
    ],
)
def test_shapes_that_do_not_fit_are_named(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_labels_have_to_fit_the_model(make):
    labelled = random_inputs(make())
    with pytest.raises(ValueError, match="class_labels is None; num_class_embeds is 10"):
        make()(labelled["sample"], labelled["timestep"])
    with pytest.raises(ValueError, match="num_class_embeds is None"):
        make(num_class_embeds=None)(**labelled)


def test_the_full_size_is_the_original_exactly(make):
    model, inputs = make(), random_inputs(make())
    expected = output(model, inputs)
    groups = find_channel_groups(model)
    in_place = {group.name: torch.arange(group.width, 0, -1.0) for group in groups}
    Supernet(model, groups, in_place, allocate(model, groups, in_place, SIZES))
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("rotate", [False, True])
def test_sorted_and_turned_it_computes_the_same(make, rotate):
    model = torch.nn.Module.to(make(), torch.float64)
    inputs = random_inputs(model)
    expected, weights = output(model, inputs), model.mid_block.attn.to_q.weight.clone()
    make_supernet(model, SIZES, rotate=rotate)
    assert not torch.equal(model.mid_block.attn.to_q.weight, weights)
    assert relative_error(output(model, inputs), expected) < 1e-12


def test_every_way_of_loading_gives_the_same(folder, u_vit):
    saved = folder / "unet"
    supernets = [
        Supernet.from_pretrained(saved),
        Supernet.from_pretrained(saved, model=u_vit.UViT),
        Supernet.from_pretrained(saved, model=u_vit.UViT.from_config(u_vit.UViT.load_config(saved))),
        OFAPipeline.from_pretrained(folder).supernet,
    ]
    inputs = random_inputs(supernets[0].model)
    outputs = []
    for size in SIZES:
        for supernet in supernets:
            supernet.set_size(size)
        first, *others = (output(supernet.model, inputs) for supernet in supernets)
        assert all(torch.equal(first, other) for other in others)
        outputs.append(first)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_an_extracted_size_is_the_supernet_at_that_size(folder, tmp_path):
    supernet = Supernet.from_pretrained(folder / "unet")
    inputs = random_inputs(supernet.model)
    for subnet in supernet.subnets:
        supernet.extract(subnet.size).save_pretrained(tmp_path / "small")
        small = ofadiff.OFAUViT.from_pretrained(tmp_path / "small")
        assert not any(isinstance(module, tuple(ELASTIC.values())) for module in small.modules())
        assert small.num_parameters() == subnet.params
        assert small.mid_block.attn.head_dim == subnet.widths["mid_block.attn"]
        read = OFAPipeline.from_pretrained(folder, size=subnet.size).unet
        with supernet.at(subnet.size) as model:
            expected = output(model, inputs)
        assert torch.equal(output(small, inputs), expected) and torch.equal(output(read, inputs), expected)


def test_an_unregistered_class_is_named(folder, u_vit, monkeypatch):
    monkeypatch.delitem(MODEL_CLASSES, "UViT")
    with pytest.raises(ValueError, match=r"names the class 'UViT'.*MODEL_CLASSES of .*, or to be given .* as model="):
        Supernet.from_pretrained(folder / "unet")
    with pytest.raises(AttributeError, match="has no attribute 'OFAUViT'"):
        _ = ofadiff.OFAUViT
    assert Supernet.from_pretrained(folder / "unet", model=u_vit.UViT).sizes == SIZES


def test_arguments_given_by_position_are_kept(u_vit):
    torch.manual_seed(0)
    model = u_vit.UViT(8, 4, 1, None, 32, 3, 2, num_class_embeds=10).eval()
    inputs = random_inputs(model)
    supernet = make_supernet(model, SIZES)
    small = supernet.extract(0.4)
    with supernet.at(0.4):
        assert torch.equal(output(small, inputs), output(model, inputs))


def test_heads_of_an_attention_without_a_processor(make, monkeypatch):
    monkeypatch.setitem(FINDERS, "u_vit.UViTAttention", head_groups)
    model = make()
    groups = find_channel_groups(model)
    assert {group.width for group in groups if group.name.endswith("attn")} == {2}
    assert max(verify_groups(model, groups, random_inputs(model)).values()) < 1e-10


def test_an_extracted_model_takes_loras_only_where_its_class_does(u_vit):
    assert issubclass(ofadiff.OFAUViT, u_vit.UViT) and "load_lora_adapter" not in dir(ofadiff.OFAUViT)
    assert "load_lora_adapter" in dir(ofadiff.OFAUNet2DConditionModel)


def test_classes_have_to_be_known(make, monkeypatch):
    unconditional = ClassConditionalDDPMPipeline(make(num_class_embeds=None), DDPMScheduler())
    with pytest.raises(ValueError, match="this UViT has no fixed number of classes"):
        unconditional(class_labels=[1])
    pipeline = ClassConditionalDDPMPipeline(make(), DDPMScheduler())
    monkeypatch.delitem(DENOISERS, "u_vit")
    with pytest.raises(ValueError, match=r"classes a UViT has is not known; DENOISERS of .* with classes="):
        pipeline(class_labels=[1])


def test_the_pipeline_takes_any_model_without_a_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipeline = OFAPipeline.from_pretrained(folder)
    assert isinstance(pipeline, ClassConditionalDDPMPipeline) and "Expected types" not in caplog.text
    DDPMPipeline(**DiffusionPipeline.from_pretrained(folder).components)
    assert "Expected types for unet" in caplog.text  # diffusers' own class does warn
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_a_pipeline_is_made_of_another_one_as_before():
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=3, **BLOCKS_OF_ONE)
    pipeline = ClassConditionalDDPMPipeline.from_pipe(DDPMPipeline(unet, DDPMScheduler()))
    assert pipeline.unet is unet
    assert pipeline(class_labels=[2], num_inference_steps=1, output_type="pt").images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("library", "held", "message"),
    [
        ("notebook", (), r"names UViT of the module 'notebook' for its unet, which has no such class; .* in 'u_vit'"),
        ("notebook", ("UViT",), r"of the module 'notebook' for its unet, which lacks ModelMixin; .*have that module"),
        ("my_package.models", None, r"module 'my_package\.models' for its unet, which is not imported; .* in 'u_vit'"),
    ],
)
def test_a_module_that_diffusers_cannot_use_is_named(folder, u_vit, monkeypatch, library, held, message):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": [library, "UViT"]}))
    module = types.ModuleType(library)
    if held is not None:
        vars(module).update(dict.fromkeys(held, u_vit.UViT))
        monkeypatch.setitem(sys.modules, library, module)
    for size in (None, 0.4):
        with pytest.raises(ValueError, match=message):
            OFAPipeline.from_pretrained(folder, size=size)
    vars(module).update({"UViT": u_vit.UViT, "ModelMixin": ModelMixin})
    monkeypatch.setitem(sys.modules, library, module)
    assert OFAPipeline.from_pretrained(folder).sizes == SIZES


def test_a_component_may_come_from_a_package(u_vit):
    assert class_of_component("my_package.models", "UViT") is u_vit.UViT
    assert class_of_component("my_package.models", "UNet2DModel") is None
    assert class_of_component("diffusers", "UNet2DModel") is UNet2DModel


def test_images_compress_it_as_they_do_diffusers_own(make, tmp_path, monkeypatch):
    ClassConditionalDDPMPipeline(make(num_class_embeds=2), DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    noise = torch.Generator().manual_seed(0)
    for index in range(8):
        (tmp_path / "images" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8), generator=noise, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / str(index % 2) / f"{index}.png")
    arguments = {
        "model": Model(pretrained_model_name_or_path=str(tmp_path / "teacher")),
        "data": Data(train_data_dir=str(tmp_path / "images"), validation_fraction=0.25),
        "output": Output(output_dir=str(tmp_path / "out")),
        "compression": Compression(sizes=(0.5, 1.0), importance_samples=4, correction_samples=4),
        "optimization": Optimization(max_train_steps=2, train_batch_size=2, lr_warmup_steps=0),
        "watching": Watching(validation_samples=4, num_validation_images=0),
    }
    result = compress(**arguments)
    assert set(result.history) == {0, 2}
    pipeline = OFAPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.sizes == (0.5, 1.0)
    assert len(pipeline(class_labels=[0, 1], size=0.5, num_inference_steps=2).images) == 2
    monkeypatch.delitem(MODEL_CLASSES, "UViT")
    with pytest.raises(ValueError, match="there is no class 'UViT'; it must be one of diffusers or in MODEL_CLASSES"):
        compress(**{**arguments, "output": Output(output_dir=str(tmp_path / "other"))})


def test_recordings_answer_as_the_model_did(make, tmp_path):
    pipeline = ClassConditionalDDPMPipeline(make(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    calls = [{"class_labels": [3, 5]}, {"class_labels": [8]}]
    options = {"arguments": {"num_inference_steps": 4}, "steps_per_call": 3, "progress": False}
    recordings = ofadiff.record(pipeline, calls, tmp_path / "recordings", **options)
    assert len(recordings) == 6 and [call.rows for call in recordings] == [2, 2, 2, 1, 1, 1]
    other = make()
    with torch.no_grad():
        other.conv_out.bias += 1
    for recorded in Recordings(tmp_path / "recordings"):
        assert torch.equal(recorded.replay(make())[0], recorded.answer[0])
        assert not torch.equal(recorded.replay(other)[0], recorded.answer[0])
        assert recorded.kwargs["class_labels"].tolist() in ([3, 5], [8])


def test_the_run(u_vit, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "run"), "--teacher_steps", "2", "--joint_steps", "2", "--batch_size", "4"]
    words += ["--num_samples", "3", "--inference_steps", "2", "--validation_samples", "8"]
    words += ["--sizes", "0.5", "1.0"]
    results = call(script(u_vit.compress_digits, "u_vit.py"), words)
    assert list(results) == ["original", "1", "0.5"]
    assert 0.48 < results["0.5"]["params"] / results["original"]["params"] <= 0.5
    assert all(0 <= row["read"] <= 1 and row["loss"] > 0 for row in results.values())
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in results)
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        assert grid.size == (3 * 48, 3 * 48)
    index = json.loads((tmp_path / "run" / "ofa" / "model_index.json").read_text())
    assert index["unet"] == ["u_vit", "UViT"]
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "run" / "teacher").unet, u_vit.UViT)
    with pytest.raises(ValueError, match="is not empty"):
        call(script(u_vit.compress_digits, "u_vit.py"), words)
