"""The files of a supernet: replaced together or not at all, tied together, the same weights whichever way they load."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_supernet, make_unet, output, random_inputs
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_transformers import tiny, tiny_inputs

from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, rotate_attention, score_channels
from ofadiff.basis.change import BASIS_NAME, save_basis
from ofadiff.channels import Slice
from ofadiff.extraction.reader import load_extracted
from ofadiff.reading.tensors import read_metadata
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.files import add_to_safetensors

pytestmark = pytest.mark.slow

SIZES = (0.5, 1.0)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def supernet_of(kind, seed=0, sizes=SIZES):
    """Supernets of another order, basis and widths for every seed."""
    unet = make_unet(kind)
    torch.manual_seed(seed)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return make_supernet(unet, sizes)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """As a signal would."""


@pytest.mark.parametrize("kind", ["plain", "sd15"])
def test_a_killed_save_leaves_the_old_supernet_or_the_new_one(kind, tmp_path, monkeypatch):
    old, new = supernet_of(kind, 0), supernet_of(kind, 1, sizes=(0.6, 1.0))
    folder = tmp_path / "unet"
    new.save_pretrained(tmp_path / "new")
    old.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)

    # Every write, renaming and removal may be the last.
    left = [0]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    seen = set()
    for limit in range(1, 100):
        left[0] = limit
        with monkeypatch.context() as patched:
            patched.setattr("ofadiff.supernet_state.save_basis", counted(save_basis))
            patched.setattr("ofadiff.storage.files.os.replace", counted(os.replace))
            patched.setattr("safetensors.torch.save_file", counted(save_file))
            patched.setattr("ofadiff.storage.files.shutil.rmtree", counted(shutil.rmtree))
            try:
                new.save_pretrained(folder)
                done = True
            except Killed:
                done = False
        if folder.exists():
            loaded = Supernet.from_pretrained(folder)
            expected = old if loaded.sizes == old.sizes else new
            assert loaded.subnets == expected.subnets
            inputs = random_inputs(loaded.model)
            for size in loaded.sizes:
                with loaded.at(size) as found, expected.at(size) as wanted:
                    assert torch.equal(output(found, inputs), output(wanted, inputs))
            seen.add(loaded.sizes)
        old.save_pretrained(folder)  # whatever was left behind is no hindrance, and nothing of the user's is lost
        assert contents(folder) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "unet"]
        if done:
            break
    assert done and limit > 5 and seen == {old.sizes, new.sizes}


@pytest.mark.parametrize("kind", ["plain", "sdxl"])
@pytest.mark.parametrize("file", [CONFIG_NAME, BASIS_NAME, WEIGHTS])
def test_a_mixture_of_two_supernets_is_refused(kind, file, tmp_path):
    for seed in range(2):
        supernet_of(kind, seed).save_pretrained(tmp_path / f"{seed}")
    shutil.copy(tmp_path / "1" / file, tmp_path / "0" / file)
    stock = type(supernet_of(kind).model)
    with pytest.raises(ValueError, match="they were not written together"):
        Supernet.from_pretrained(tmp_path / "0")
    with pytest.raises(ValueError, match="they were not written together"):
        subnet = Supernet.from_pretrained(tmp_path / "1").subnets[0]
        load_extracted(tmp_path / "0", stock, subnet)


def test_weights_of_other_sizes_or_from_elsewhere_are_refused_too(tmp_path):
    supernet = supernet_of("plain")
    supernet.save_pretrained(tmp_path / "a", max_shard_size="100kB")
    supernet_of("plain", 1).save_pretrained(tmp_path / "b", max_shard_size="100kB")
    shard = sorted((tmp_path / "a").glob("*-of-*.safetensors"))[-1].name
    shutil.copy(tmp_path / "b" / shard, tmp_path / "a" / shard)
    with pytest.raises(ValueError, match=f"{shard} does not belong to the {CONFIG_NAME} beside it"):
        Supernet.from_pretrained(tmp_path / "a")
    # The same order and weights, other sizes.
    supernet.save_pretrained(tmp_path / "c")
    supernet_of("plain", sizes=(0.6, 1.0)).save_pretrained(tmp_path / "d")
    shutil.copy(tmp_path / "d" / CONFIG_NAME, tmp_path / "c" / CONFIG_NAME)
    with pytest.raises(ValueError, match="they were not written together"):
        Supernet.from_pretrained(tmp_path / "c")
    # A plain model, saved over it without ofadiff.
    make_unet("plain").save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match="they were not written together"):
        Supernet.from_pretrained(tmp_path / "d")


def test_checkpoints_from_before_files_were_tied_load(tmp_path):
    supernet = supernet_of("sd15")
    supernet.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    del values["ofa_structure"]
    for group in values["groups"]:
        del group["slices"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})
    wide = {torch.float16: torch.float64, torch.int16: torch.int64}
    save_file({k: v.to(wide[v.dtype]) for k, v in load_file(tmp_path / BASIS_NAME).items()}, tmp_path / BASIS_NAME)

    loaded = Supernet.from_pretrained(tmp_path)
    inputs = random_inputs(loaded.model)
    for size in SIZES:
        with loaded.at(size) as found, supernet.at(size) as expected:
            assert torch.equal(output(found, inputs), output(expected, inputs))
    subnet = loaded.subnets[0]
    one = load_extracted(tmp_path, type(supernet.model), subnet)
    assert torch.equal(output(one, inputs), output(supernet.extract(0.5), inputs))
    loaded.save_pretrained(tmp_path, variant="fp16")  # tied from now on, the weights without variant as well
    assert (tmp_path / WEIGHTS).is_file()
    for variant in (None, "fp16"):
        assert Supernet.from_pretrained(tmp_path, variant=variant).subnets == supernet.subnets


def test_other_files_and_variants_of_the_same_supernet_stay(tmp_path):
    supernet = supernet_of("plain")
    folder = tmp_path / "unet"
    supernet.save_pretrained(folder)
    (folder / "samples").mkdir()
    (folder / "samples" / "1.png").write_bytes(b"picture")
    supernet.save_pretrained(folder, variant="fp16", max_shard_size="100kB")
    for variant in (None, "fp16"):
        assert Supernet.from_pretrained(folder, variant=variant).subnets == supernet.subnets
    supernet_of("plain", 1).save_pretrained(folder)  # weights of another one don't
    assert not list(folder.glob("*fp16*")) and (folder / "samples" / "1.png").read_bytes() == b"picture"
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_the_working_directory_can_be_saved_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        supernet = supernet_of("plain", seed)
        supernet.save_pretrained(".")
        assert Supernet.from_pretrained(".").subnets == supernet.subnets
    assert (tmp_path / WEIGHTS).is_file()


def test_a_changed_finder_does_not_load_old_checkpoints(tmp_path, monkeypatch):
    supernet = supernet_of("sd15")
    supernet.save_pretrained(tmp_path)
    changes = {
        "attention": lambda part: part.keeps_softmax_scale,
        "feed_forward": lambda part: part.repeats == 2,
    }
    for kind, applies in changes.items():

        def changed(model, kind=kind, applies=applies):
            groups = find_channel_groups(model)
            for group in groups:
                if group.kind.endswith(kind):
                    group.slices = tuple(
                        Slice(**{**vars(part), "keeps_softmax_scale": False, "repeats": 1, "channels": part.repeats})
                        if applies(part)
                        else part
                        for part in group.slices
                    )
            return groups

        with monkeypatch.context() as patched:
            patched.setattr("ofadiff.supernet.find_channel_groups", changed)
            patched.setattr("ofadiff.extraction.extracted_model.find_channel_groups", changed)
            with pytest.raises(ValueError, match="was made for other channel groups"):
                Supernet.from_pretrained(tmp_path)
            with pytest.raises(ValueError, match="was made for other channel groups"):
                load_extracted(tmp_path, type(supernet.model), supernet.subnets[0])


def test_the_basis_is_small_and_exact(tmp_path):
    supernet = supernet_of("sd15")
    supernet.save_pretrained(tmp_path)
    stored = load_file(tmp_path / BASIS_NAME)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int16}
    assert (tmp_path / BASIS_NAME).stat().st_size < 0.1 * (tmp_path / WEIGHTS).stat().st_size
    # What turned the weights is what is stored, to the last bit.
    unet = make_unet("sd15")
    torch.manual_seed(0)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    groups = find_channel_groups(unet)
    rotate_attention(unet, groups)
    for group in groups:
        for name, matrices in (group.basis or {}).items():
            assert torch.equal(stored[f"{group.name}.{name}"].double(), matrices)


def make_transformer_supernet(name):
    model = tiny(name)
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, criterion="random")
    table = allocate(model, groups, scores, (0.6, 1.0), budget="channels", inputs=tiny_inputs(name))
    return Supernet(model, groups, scores, table)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "Kandinsky5Transformer3DModel", "sd15"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_size_has_the_same_dtypes_and_bits_whichever_way_it_is_loaded(name, dtype, tmp_path):
    supernet = supernet_of(name) if name == "sd15" else make_transformer_supernet(name)
    supernet.save_pretrained(tmp_path / "supernet")
    stock = type(supernet.model)
    options = {} if dtype is None else {"torch_dtype": dtype}
    whole = Supernet.from_pretrained(tmp_path / "supernet", **options)
    subnet = whole.subnets[0]
    extracted = whole.extract(subnet.size)
    one = load_extracted(tmp_path / "supernet", stock, subnet, torch_dtype=dtype)
    extracted.save_pretrained(tmp_path / "small")
    saved = type(extracted).from_pretrained(tmp_path / "small", **options)
    for other in (one, saved):
        for found, expected in ((other.state_dict(), extracted.state_dict()), (buffers(other), buffers(extracted))):
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert found[key].dtype == tensor.dtype, key
                assert torch.equal(found[key], tensor), key
    if dtype is not None and stock._keep_in_fp32_modules:
        assert {torch.float32, dtype} <= {parameter.dtype for parameter in one.parameters()}


def buffers(model):
    return dict(model.named_buffers())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_half_stored_checkpoint_is_the_same_by_every_door(stored, tmp_path):
    unet = supernet_of("plain").model
    DDPMPipeline(unet.to(stored), DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "checkpoint").unet
    whole = OFAPipeline.from_pretrained(tmp_path / "checkpoint")
    one = OFAPipeline.from_pretrained(tmp_path / "checkpoint", size=0.5).unet
    extracted = whole.extract(0.5).unet
    assert plain.dtype == whole.unet.dtype == one.dtype == extracted.dtype
    for key, tensor in extracted.state_dict().items():
        assert torch.equal(one.state_dict()[key], tensor)


def test_what_is_added_to_a_safetensors_file_leaves_the_rest(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(5, dtype=torch.bfloat16), "b": torch.ones(2, 3, dtype=torch.float8_e4m3fn)}
    save_file(tensors, file, metadata={"format": "pt"})
    add_to_safetensors(file, {"mark": "1"}, {"c": torch.arange(3, dtype=torch.int16), "d": torch.zeros(0)})
    add_to_safetensors(file, {"mark": "2"})
    assert read_metadata(file) == {"format": "pt", "mark": "2"}
    found = load_file(file)
    assert found.keys() == {"a", "b", "c", "d"} and found["c"].tolist() == [0, 1, 2]
    assert all(torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)) for name, value in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
