import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import make_dropping_supernet, make_supernet, output, random_inputs, relative_error
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image
from recipes.conftest import load_recipe
from recipes.tiny_stable_diffusion import make_unet, save_captioned_images, save_stable_diffusion
from safetensors.torch import load_file

from ofadiff import OFAPipeline, Supernet
from ofadiff.commands import command

pytestmark = pytest.mark.slow

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ADAPTER = "unet/ofa_adapters/0.5"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pixel and a Stable Diffusion checkpoint of three sizes, and images for either."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    blocks |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks).eval()
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder / "pixels")
    make_supernet(unet, sizes=(0.5, 0.75, 1.0)).save_pretrained(folder / "pixels" / "unet")
    save_stable_diffusion(folder / "sd")
    make_supernet(make_unet(), sizes=(0.5, 1.0)).save_pretrained(folder / "sd" / "unet")
    save_captioned_images(folder / "captioned")
    noise = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(12):
        pixels = noise.integers(0, 255, (10, 9), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    return folder


@pytest.fixture
def flags(files, tmp_path, words):
    """Makes a command line; options are flags without their dashes, None leaves one out."""

    def flags(**options):
        settings = {
            "pretrained_model_name_or_path": tmp_path / "checkpoint",
            "output_dir": tmp_path / "checkpoint",
            "train_data_dir": files / "images",
            "size": 0.5,
            "lora_rank": 2,
            "max_train_steps": 3,
            "train_batch_size": 2,
            "validation_samples": 8,
            "num_validation_images": 0,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 2,
            "learning_rate": 1e-2,
        }
        return words(settings | options)

    return flags


@pytest.fixture
def run(flags, recipe):
    return lambda **options: recipe("finetune_size.py", flags(**options))


@pytest.fixture
def checkpoint(files, tmp_path):
    return shutil.copytree(files / "pixels", tmp_path / "checkpoint")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def predictions(folder, inputs):
    supernet = Supernet.from_pretrained(folder / "unet")
    return {size: output(supernet.model, inputs) for size in supernet.sizes if supernet.set_size(size) is None}


def test_a_lora_heals_its_size_and_nothing_else_changes(run, checkpoint, files, capsys):
    before = contents(checkpoint)
    inputs = random_inputs(Supernet.from_pretrained(checkpoint / "unet").model)
    untouched = predictions(checkpoint, inputs)
    options = {"ema_decay": 0.5, "num_validation_images": 2, "ddpm_num_inference_steps": 2}
    result = run(max_train_steps=20, checkpointing_steps=20, **options)
    assert result.history[20][0.5] < result.history[0][0.5] and set(result.history[0]) == {0.5}
    assert "has an adapter of size 0.5" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    with Image.open(checkpoint / "finetune-0.5" / "samples" / "000020.png") as grid:
        assert grid.size == (2 * 8, 8)

    after = predictions(checkpoint, inputs)
    assert not torch.equal(after[0.5], untouched[0.5])
    assert all(torch.equal(after[size], untouched[size]) for size in (0.75, 1.0))
    one = OFAPipeline.from_pretrained(checkpoint, size=0.5)
    assert relative_error(output(one.unet, inputs), after[0.5]) < 1e-5
    # Every cut layer has it, of the size's own shape.
    adapter = load_file(checkpoint / ADAPTER / "adapter_model.safetensors")
    first = "base_model.model.down_blocks.0.resnets.0"
    assert adapter[f"{first}.conv1.lora_B.weight"].shape[0] == one.unet.down_blocks[0].resnets[0].conv1.out_channels
    layers = {key.split(".lora_")[0].rpartition(".")[2] for key in adapter}
    assert layers == {"conv1", "conv2", "time_emb_proj", "to_q", "to_k", "to_v", "0"}

    with pytest.raises(ValueError, match=r"size 0\.5 has an adapter already.* replace it with --overwrite"):
        run()
    healed = contents(checkpoint / ADAPTER)
    run(size=0.75, output_dir=checkpoint)
    assert contents(checkpoint / ADAPTER) == healed
    run(overwrite=True, lora_rank=1, lora_alpha=4, lora_target_modules="conv1")
    pipeline = OFAPipeline.from_pretrained(checkpoint)
    assert list(pipeline.supernet.size_adapters) == [0.5, 0.75]
    config = pipeline.supernet.size_adapters[0.5].config
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (1, 4, ["conv1"])


def test_the_full_size_teaches_with_its_own_adapter(run, checkpoint, tmp_path):
    """Also where the checkpoint is given as the teacher of another one."""
    first = run(output_dir=tmp_path / "first")
    shutil.copytree(checkpoint, tmp_path / "plain")
    healed = run(size="largest", distill_weight=0, learning_rate=0.1, max_train_steps=10).history[10][1.0]
    assert healed != pytest.approx(first.teacher_loss, rel=1e-2)
    for number, options in enumerate(({}, {"pretrained_model_name_or_path": tmp_path / "plain"})):
        given = {"teacher_model_name_or_path": checkpoint, **options} if options else {}
        taught = run(output_dir=tmp_path / f"copy{number}", **given)
        assert taught.teacher_loss == pytest.approx(healed, rel=1e-4)


def test_a_largest_size_that_is_cut_learns_from_the_whole_weights(run, files, tmp_path):
    """Also where it has an adapter, which does not fit them."""
    unet = DiffusionPipeline.from_pretrained(files / "pixels").unet
    shutil.copytree(files / "pixels", tmp_path / "checkpoint", ignore=shutil.ignore_patterns("unet"))
    make_supernet(unet, sizes=(0.5, 0.75)).save_pretrained(tmp_path / "checkpoint" / "unet")
    run(size="largest")
    run(size=0.5)
    assert list(OFAPipeline.from_pretrained(tmp_path / "checkpoint").supernet.size_adapters) == [0.5, 0.75]


def test_a_copy_gets_the_adapter_and_the_checkpoint_stays(run, checkpoint, tmp_path):
    before = contents(checkpoint)
    (tmp_path / "copy").mkdir()
    run(output_dir=tmp_path / "copy", size="smallest")
    assert contents(checkpoint) == before
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    assert list(OFAPipeline.from_pretrained(tmp_path / "copy").supernet.size_adapters) == [0.5]
    with pytest.raises(ValueError, match=r"copy is not empty; give .*checkpoint itself for the adapter"):
        run(output_dir=tmp_path / "copy")


@pytest.mark.parametrize("rank", [2, None])
def test_a_killed_run_resumes_to_the_same_result(run, checkpoint, tmp_path, monkeypatch, rank):
    def ending(folder):
        return load_file(folder / (f"{ADAPTER}/adapter_model.safetensors" if rank else WEIGHTS))

    run(output_dir=tmp_path / "whole", lora_rank=rank)
    with monkeypatch.context() as killed:
        killed.setattr("ofadiff.runs.healing.loss_table", None)  # any step of the end
        killed.setattr("ofadiff.runs.healing.copy_pipeline", None)
        killed.setattr(DiffusionPipeline, "save_pretrained", None)
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            run(output_dir=tmp_path / "out", lora_rank=rank)
    with pytest.raises(ValueError, match="is not empty"):
        run(output_dir=tmp_path / "out", lora_rank=rank)
    if rank:
        with pytest.raises(ValueError, match="its lora_rank is 2, this run's is 4"):
            run(output_dir=tmp_path / "out", lora_rank=4, resume_from_checkpoint="latest")
        supernet = Supernet.from_pretrained(checkpoint / "unet")
        shutil.copytree(checkpoint, tmp_path / "retrained")
        supernet.model.conv_in.bias.data += 1
        supernet.save_pretrained(tmp_path / "retrained" / "unet")
        with pytest.raises(ValueError, match=r"its start is SHA-256 .*, this run's is SHA-256"):
            retrained = {"pretrained_model_name_or_path": tmp_path / "retrained"}
            run(output_dir=tmp_path / "out", lora_rank=rank, resume_from_checkpoint="latest", **retrained)
    run(output_dir=tmp_path / "out", lora_rank=rank, resume_from_checkpoint="latest")
    expected = ending(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in ending(tmp_path / "out").items())


@pytest.mark.parametrize("rank", [2, 0])
def test_a_size_that_drops_branches(run, checkpoint, tmp_path, rank):
    unet = Supernet.from_pretrained(checkpoint / "unet").model
    shutil.rmtree(checkpoint / "unet")
    dropping = make_dropping_supernet(UNet2DModel.from_config(unet.config).eval(), (0.5, 1.0))
    assert 0 in dropping.subnets[0].widths.values()
    dropping.save_pretrained(checkpoint / "unet")
    out = checkpoint if rank else tmp_path / "out"
    result = run(lora_rank=rank or None, max_train_steps=20, checkpointing_steps=20, ema_decay=0.5, output_dir=out)
    assert result.history[20][0.5] < result.history[0][0.5]
    pipeline = OFAPipeline.from_pretrained(out, size=0.5) if rank else DiffusionPipeline.from_pretrained(out)
    inputs = random_inputs(unet)
    with dropping.at(0.5) as model:
        assert relative_error(output(pipeline.unet, inputs), output(model, inputs)) > 1e-3


def test_without_a_rank_the_subnet_becomes_a_plain_pipeline(run, checkpoint, tmp_path):
    run()  # the size as it is, with its adapter, is what is trained further
    before = OFAPipeline.from_pretrained(checkpoint, size=0.5).unet
    inputs = random_inputs(before)
    untouched = contents(checkpoint)
    unchanged = run(lora_rank=None, output_dir=tmp_path / "zero", max_train_steps=0)
    assert unchanged.steps == 0 and contents(checkpoint) == untouched
    small = DiffusionPipeline.from_pretrained(tmp_path / "zero")
    assert relative_error(output(small.unet, inputs), output(before, inputs)) < 1e-5

    teacher = {"teacher_model_name_or_path": checkpoint, "feature_distill_weight": 0.1}
    result = run(lora_rank=None, output_dir=tmp_path / "small", max_train_steps=10, ema_decay=0.5, **teacher)
    assert result.history[10][0.5] < result.history[0][0.5]
    small = DiffusionPipeline.from_pretrained(tmp_path / "small")
    assert type(small) is DDPMPipeline and small.unet.config["ofa_widths"] == before.config["ofa_widths"]
    assert not torch.equal(output(small.unet, inputs), output(before, inputs))


@pytest.mark.parametrize("rank", [2, None])
def test_stable_diffusion(run, files, tmp_path, rank):
    options = {"train_data_dir": files / "captioned", "cache_dir": files / "cache", "num_validation_images": None}
    options |= {"pretrained_model_name_or_path": files / "sd", "lora_rank": rank, "mixed_precision": "bf16"}
    options |= {"validation_prompts": ["a red house"], "validation_inference_steps": 1, "snr_gamma": 5}
    result = run(output_dir=tmp_path / "out", max_train_steps=1, gradient_checkpointing=True, **options)
    assert set(result.history) == {0, 1}
    samples = tmp_path / "out" / ("finetune-0.5/samples" if rank else "samples")
    with Image.open(samples / "000001.png") as image:
        assert image.size == (16, 16)  # the checkpoint's own resolution
    if rank:
        pipeline = OFAPipeline.from_pretrained(tmp_path / "out", size=0.5)
    else:
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.dtype == torch.float32
    assert len(pipeline("a b", height=16, width=16, num_inference_steps=1).images) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0.3}, r"size is 0\.3; it must be one of 0\.5, 0\.75, 1"),
        ({"lora_rank": None, "lora_alpha": 4}, "are for a LoRA; give its --lora_rank"),
        ({"lora_rank": None, "overwrite": True}, "checkpoint holds all sizes; give another folder for this one"),
        ({"train_data_dir": "nowhere"}, "nowhere is not a folder"),
        ({"validation_prompts": "a house"}, "--validation_prompts is for text-to-image models that are trained"),
        ({"pretrained_model_name_or_path": "/no/such/folder"}, "neither a folder nor the name of a hub repository"),
        ({"size": 1.0}, r"size 1 is the checkpoint's largest.* --teacher_model_name_or_path, or --distill_weight 0"),
        ({"size": "largest", "distill_weight": 0, "feature_distill_weight": 1}, "cannot teach itself"),
        ({"teacher_model_name_or_path": "/no/such/folder"}, "cannot load /no/such/folder, expected a pipeline with"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(run, checkpoint, options, message):
    before = contents(checkpoint)
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert contents(checkpoint) == before


def test_peft_is_needed_for_a_lora_and_asked_for_first(run, checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--lora_rank needs peft, which is not installed: pip install peft"):
        run()


def test_what_is_no_checkpoint_or_no_teacher_for_it_is_refused(run, files, checkpoint, tmp_path):
    DiffusionPipeline.from_pretrained(checkpoint).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"holds no ofa_config\.json"):
        run(pretrained_model_name_or_path=tmp_path / "plain")
    with pytest.raises(ValueError, match="the teacher's unet has _class_name UNet2DConditionModel, the checkpoint's"):
        run(teacher_model_name_or_path=files / "sd")


def test_a_configuration_file_and_one_sentence_for_a_mistake(run, flags, checkpoint, tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"size": 0.75, "lora_rank": 3, "overwrite": True}))
    seen = {}
    with monkeypatch.context() as patched, pytest.raises(AttributeError):  # nothing was started
        patched.setattr("ofadiff.commands.heal.start_healing", lambda settings: seen.update(settings.flags()))
        run(size=None, lora_rank=None, config=config)
    assert (seen["size"], seen["lora_rank"], seen["overwrite_output_dir"]) == (0.75, 3, True)
    with pytest.raises(SystemExit) as stop:
        command.main(load_recipe("finetune_size.py"), flags(size=0.3))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("finetune_size.py: error: size is 0.3; it must be one of")
