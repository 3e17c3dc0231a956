"""A checkpoint from a stranger: one test for each threat of SECURITY.md, which names it."""

import io
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from faults.conftest import bomb, edit, pipe, write
from PIL import Image
from training.conftest import fresh_accelerate  # noqa: F401

from ofadiff import OFAPipeline, Supernet
from ofadiff.adapters.size_adapter import SizeAdapter, save_size_adapter, save_size_adapters
from ofadiff.commands.page import Served
from ofadiff.data.decoding import open_image
from ofadiff.data.hub_datasets import load_dataset_split
from ofadiff.data.shards import ERROR, TarShards, decode_column
from ofadiff.denoisers.original import read_original
from ofadiff.evaluation.checkpoints import open_pipeline
from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.report import Report
from ofadiff.evaluation.report.rows import JOINT, Row
from ofadiff.recordings import Recordings
from ofadiff.storage.around import copy_component, copy_pipeline
from ofadiff.storage.strangers import check_pipeline
from ofadiff.training.checkpoint import find_checkpoint, read_flags

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Attack:
    """What a pickle of it does where it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def put_pickles(folder, mark):
    """A malicious pickle under every name of weights and states, in every folder of a checkpoint."""
    names = (
        *("diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt", "pytorch_model.bin", "model.pt", "model.ckpt"),
        *("optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "random_states_0.pkl", "scaler.pt"),
        *("training_args.bin", "adapter_model.bin", "ofa_basis.bin", "learned_embeds.bin", "spiece.pkl", "vocab.pkl"),
    )
    for each in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in names:
            (each / name).write_bytes(pickle.dumps(Attack(mark)))


@pytest.mark.parametrize("under", ["beside the weights", "in their place", "under their name"])
def test_no_pickle_is_opened(under, place):
    mark = place.folder / "opened"
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists()  # it is one
    mark.unlink()
    for name in ("checkpoint", "text", "size", "recordings"):
        put_pickles(place / name, mark)
        for file in [] if under == "beside the weights" else (place / name).rglob("*.safetensors"):
            file.unlink()
            if under == "under their name":
                file.write_bytes(pickle.dumps(Attack(mark)))
    doors = (
        lambda: OFAPipeline.from_pretrained(place / "checkpoint"),
        lambda: OFAPipeline.from_pretrained(place / "checkpoint", size=0.6),
        lambda: Supernet.from_pretrained(place / "checkpoint/unet"),
        lambda: open_pipeline(str(place / "text"), torch.float32, CPU),
        lambda: read_original(str(place / "text")).load(),
        lambda: Recordings(place / "recordings"),
    )
    for door in doors:
        if under == "beside the weights":
            door()
        else:
            with pytest.raises((OSError, ValueError)):
                door()
    for file in (place / "checkpoint").rglob("*.bin"):
        with pytest.raises(ValueError, match="no file of reference statistics"):
            FeatureStatistics.load(file)
    assert not mark.exists()


def test_nothing_asks_for_pickles():
    """Wherever diffusers or transformers load weights, they are told that safetensors are all there is."""
    loads = re.compile(r"(\w+)\.from_pretrained\((?!\))")
    own = {"OFAPipeline", "Supernet", "SizeAdapter", "PeftModel", "CLIPTokenizer", "CLIPImageProcessor", "cls", "super"}
    for path in (ROOT / "ofadiff").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        code = re.sub(r'"""[\s\S]*?"""|#.*|f?"[^"\n]*`[^"\n]*"', "", text)
        assert "import pickle" not in code and "torch.load(" not in code, path
        for found in loads.finditer(code):
            if found[1] not in own and "use_safetensors" not in text:
                raise AssertionError(f"{path.name}: {found[1]}.from_pretrained without use_safetensors")


CODE = {
    "a pipeline of the folder": ({"_class_name": ["own", "Own"]}, {}),
    "a pipeline's module": ({"_class_name": "own"}, {}),
    "a component of its folder": ({"text_encoder": ["own", "Own"]}, {}),
    "a module beside the process": ({"text_encoder": ["own_module", "Own"]}, {}),
    "a class of another module": ({"text_encoder": ["subprocess", "Popen"]}, {}),
    "an automatic class": ({"text_encoder": ["transformers", "AutoModel"]}, {"auto_map": {"AutoModel": "own.Own"}}),
    "an implementation on the hub": ({}, {"_attn_implementation": "own/kernel"}),
}


@pytest.mark.parametrize("kind", CODE)
def test_no_code_of_a_checkpoint_runs(kind, place, monkeypatch):
    mark = place.folder / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import CLIPTextModel as Own\n"
    index, config = CODE[kind]
    edit("text/model_index.json", lambda values: values.update(index))(place)
    edit("text/text_encoder/config.json", lambda values: values.update(config))(place)
    for folder in ("text", "text/text_encoder", "text/unet"):
        for name in ("own.py", "own_module.py", "pipeline.py"):
            write(f"{folder}/{name}", code)(place)
    monkeypatch.chdir(place / "text")
    monkeypatch.syspath_prepend(str(place / "text"))  # as in `python -m ofadiff`
    for door in (
        lambda: check_pipeline(place / "text"),
        lambda: open_pipeline(str(place / "text"), torch.float32, CPU),
        lambda: read_original(str(place / "text")),
    ):
        with pytest.raises(ValueError):
            door()
    assert not mark.exists() and "own_module" not in sys.modules


def test_no_file_is_written_outside_the_output_folder(place):
    outside = place.folder / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    unet = place / "checkpoint/unet"
    (unet / "ofa_adapters").symlink_to(outside)
    small = Supernet.from_pretrained(shutil.copytree(place.whole / "checkpoint/unet", place.folder / "unet"))
    state = {"conv_in.lora_A.weight": torch.zeros(1, 3, 3, 3), "conv_in.lora_B.weight": torch.zeros(16, 1, 1, 1)}
    adapter = SizeAdapter.from_state_dict({"peft_type": "LORA", "lora_alpha": 1}, state)
    for write_it in (lambda: save_size_adapter(adapter, unet, 0.6), lambda: save_size_adapters({}, unet)):
        with pytest.raises(ValueError, match="leads out of"):
            write_it()
    config = place.folder / "unet/ofa_config.json"
    config.unlink()
    config.symlink_to(outside / "kept")
    with pytest.raises(ValueError, match="leads out of"):
        small.save_metadata(place.folder / "unet")
    edit("text/model_index.json", lambda values: values.update({"../../outside": ["diffusers", "UNet2DModel"]}))(place)
    with pytest.raises(ValueError, match="must be a plain word"):
        copy_pipeline(place / "text", place.folder / "out")
    assert [path.name for path in outside.iterdir()] == ["kept"] and (outside / "kept").read_text() == "kept"


CLAIMS = {
    "channels": ("checkpoint/unet/config.json", {"block_out_channels": [10**6, 10**6]}),
    "channels of text": ("text/text_encoder/config.json", {"hidden_size": 10**6, "intermediate_size": 10**7}),
    "layers of text": ("text/text_encoder/config.json", {"num_hidden_layers": 10**8}),
    "positions": ("text/text_encoder/config.json", {"max_position_embeddings": 10**12}),
    "latents": ("text/vae/config.json", {"latent_channels": 10**9}),
    "timesteps": ("text/scheduler/scheduler_config.json", {"num_train_timesteps": 10**13}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_config_allocates_no_more_than_the_weights_have(claim, place):
    import resource

    name, values = CLAIMS[claim]
    edit(name, lambda before: before.update(values))(place)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"config\.json"):
        if name.startswith("text"):
            open_pipeline(str(place / "text"), torch.float32, CPU)
        else:
            OFAPipeline.from_pretrained(place / "checkpoint", size=0.6)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes


def test_images_and_archives_that_claim_more_than_they_are(place, monkeypatch):
    place.folder.joinpath("bomb.png").write_bytes(bomb())
    with pytest.raises(ValueError, match="2500000000 pixels"):
        open_image(place.folder / "bomb.png")
    # A program in PostScript, which Pillow would have Ghostscript run, under the name of a picture.
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"
    for given in (program, write("program.png", program)(place) or place.folder / "program.png"):
        with pytest.raises(OSError, match="cannot identify"):
            open_image(given)
    monkeypatch.setattr("ofadiff.data.shards.MOST_BYTES", 1000)
    with tarfile.open(place.folder / "0.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 10**6
        archive.addfile(info, io.BytesIO(bytes(10**6)))
    # The name of a member is a key of a sample and no path: nothing is unpacked.
    with tarfile.open(place.folder / "1.tar", "w") as archive:
        archive.add(place.folder / "bomb.png", "../../escaped.png")
    shards = TarShards([str(place.folder / "1.tar"), str(place.folder / "0.tar.gz")])
    (huge,) = shards.shard(2, 1)
    assert "at most" in huge[ERROR]
    with pytest.raises(ValueError, match="at most"):
        decode_column(huge, "png")
    assert not list(place.folder.parent.glob("**/escaped.png"))


def test_links_lead_nothing_out_of_a_checkpoint(place):
    secret = place.folder / "secret"
    secret.mkdir()
    (secret / "key").write_text("a key")
    folder = place / "text"
    (folder / "tokenizer/notes.txt").symlink_to(secret / "key")
    for copied in (
        lambda: copy_pipeline(folder, place.folder / "out"),
        lambda: copy_component(folder / "tokenizer", place.folder / "out"),
    ):
        with pytest.raises(ValueError, match=r"notes\.txt is a link that leads out of"):
            copied()
    assert not (place.folder / "out").exists()
    # The hub's cache is made of links, and is copied.
    (folder / "tokenizer/notes.txt").unlink()
    snapshot = place.folder / "models--a--b/snapshots/0123"
    shutil.copytree(folder, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "vae/config.json", blobs / "abc")
    (snapshot / "vae/config.json").symlink_to("../../../blobs/abc")
    copy_pipeline(snapshot, place.folder / "copied")
    assert not (place.folder / "copied/vae/config.json").is_symlink()


def test_a_report_escapes_what_strangers_wrote(tmp_path):
    script = "<script>alert(1)</script>"
    protocol = {"prompts": script, script: "a | b", "command": f"ofadiff evaluate --checkpoint {script}"}
    Report(script, {}, [Row(script, JOINT, 0.6), Row("model", script)], protocol).write(tmp_path)
    for name in ("report.html", "report.md"):
        assert "<script" not in (tmp_path / name).read_text(encoding="utf-8"), name
    assert "&lt;script&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_seen_by_this_machine_alone():
    assert not Served().share and Served().host == "127.0.0.1"


def test_a_checkpoint_to_resume_from_holds_no_pickle(place):
    mark = place.folder / "opened"
    folder = place.folder / "run/checkpoint-2"
    shutil.copytree(ROOT / "tests/fixtures/written_before_the_move/run/checkpoint-2", folder)
    put_pickles(folder, mark)
    assert find_checkpoint(str(folder.parent), "latest") == folder
    read_flags(folder)
    Supernet.from_pretrained(folder / "denoiser")
    assert not mark.exists()
    assert not [path for path in (ROOT / "tests/fixtures").rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_nothing_waits_for_a_pipe(place):
    doors = {
        "text/tokenizer/vocab.json": lambda: open_pipeline(str(place / "text"), torch.float32, CPU),
        "checkpoint/scheduler/notes": lambda: OFAPipeline.from_pretrained(place / "checkpoint", size=0.6),
        "recordings/calls/000000.safetensors": lambda: Recordings(place / "recordings"),
        "captioned/metadata.jsonl": lambda: load_dataset_split(str(place / "captioned")),
    }
    for name, door in doors.items():
        pipe(name)(place)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is a pipe"):
            door()


def test_threats_and_their_tests():
    """Every threat of SECURITY.md names a test that is here, and every test here is named there."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    threats = re.findall(r"^\*\*(T\d+)\.", text, re.MULTILINE)
    assert threats == [f"T{number}" for number in range(1, len(threats) + 1)] and threats
    parts = re.split(r"^\*\*T\d+\.", text, flags=re.MULTILINE)[1:]
    here = {name for name in globals() if name.startswith("test_")} - {"test_threats_and_their_tests"}
    named = [re.findall(r"`(test_\w+)`", part) for part in parts]
    assert all(named)
    assert {name for names in named for name in names} == here
