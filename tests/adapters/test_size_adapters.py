"""One adapter per size: a part of that size alone, of what is extracted, and of what is saved."""

import copy
import json
import sys

import pytest
import torch
from conftest import make_supernet, make_unet, output, random_inputs, relative_error
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from tiny_stable_diffusion import save_stable_diffusion
from torch import nn

from ofadiff import OFAPipeline, Supernet
from ofadiff.adapters.size_adapter import (
    ADAPTER_WEIGHTS_NAME,
    SizeAdapter,
    load_size_adapters,
    save_size_adapter,
    save_size_adapters,
)
from ofadiff.layers import LowRankUpdate, make_elastic
from ofadiff.storage.ofa_config import ADAPTERS_NAME

pytestmark = pytest.mark.slow

SIZES = (0.5, 0.75, 1.0)
# Cut layers of every kind, and two that no group cuts.
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_in",
]
CHANGED = 1e-2


def adapted_model(supernet, size, seed=0, **changes):
    """A subnet with a LoRA that is not the identity."""
    small = supernet.extract(size)
    torch.manual_seed(seed)
    options = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    return inject_adapter_in_model(LoraConfig(**{**options, **changes}), small)


def outputs(supernet, inputs):
    return {size: output(supernet.model, inputs) for size in SIZES if supernet.set_size(size) is None}


@pytest.fixture(params=["scale_shift", "sd15"])
def supernet(request):
    return make_supernet(make_unet(request.param), sizes=SIZES)


def test_an_adapter_acts_at_its_size_alone(supernet):
    inputs = random_inputs(supernet.model)
    weights = copy.deepcopy(supernet.model.state_dict())
    before = outputs(supernet, inputs)
    trained = {size: adapted_model(supernet, size, seed) for seed, size in enumerate((0.5, 1.0))}
    for size, small in trained.items():
        supernet.set_size_adapter(size, SizeAdapter.from_model(small))
    after = outputs(supernet, inputs)
    assert torch.equal(after[0.75], before[0.75])
    for size, small in trained.items():
        assert relative_error(after[size], output(small, inputs)) < 1e-5
        assert relative_error(after[size], before[size]) > CHANGED
    assert supernet.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in supernet.model.state_dict().items())

    twin = copy.deepcopy(supernet)
    twin.set_size_adapter(0.5, None)
    assert relative_error(outputs(supernet, inputs)[0.5], after[0.5]) == 0
    assert torch.equal(outputs(twin, inputs)[1.0], after[1.0])

    # Replaced, then taken away. The new one is trained on the bare subnet.
    supernet.set_size_adapter(0.5, None)
    other = adapted_model(supernet, 0.5, seed=2, target_modules=["conv1"], r=2)
    supernet.set_size_adapter(0.5, SizeAdapter.from_model(other))
    assert relative_error(outputs(supernet, inputs)[0.5], output(other, inputs)) < 1e-5
    supernet.set_size_adapter(0.5, SizeAdapter.from_model(trained[0.5]))
    for size in (0.5, 1.0):
        supernet.set_size_adapter(size, None)
    assert all(torch.equal(value, before[size]) for size, value in outputs(supernet, inputs).items())
    assert not [name for name, _ in supernet.model.named_buffers() if "adapter" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extracting_merges_it(supernet, dtype):
    supernet.set_size_adapter(0.5, SizeAdapter.from_model(adapted_model(supernet, 0.5)))
    supernet.model.to(dtype)
    inputs = random_inputs(supernet.model)
    for size, expected in outputs(supernet, inputs).items():
        small = supernet.extract(size)
        assert relative_error(output(small, inputs), expected) < (1e-5 if dtype is torch.float32 else 3e-2)
        assert not [name for name, _ in small.named_buffers() if "adapter" in name]


def test_a_checkpoint_holds_it_beside_the_same_weights(supernet, tmp_path, monkeypatch):
    inputs = random_inputs(supernet.model)
    supernet.save_pretrained(tmp_path / "without")
    small = adapted_model(supernet, 0.5, use_rslora=True)
    supernet.set_size_adapter(0.5, SizeAdapter.from_model(small))
    supernet.save_pretrained(tmp_path / "with")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)  # it is for training
        loaded = Supernet.from_pretrained(tmp_path / "with")
        assert list(loaded.size_adapters) == [0.5]
        expected = outputs(supernet, inputs)
        assert all(torch.equal(value, expected[size]) for size, value in outputs(loaded, inputs).items())
        loaded.save_pretrained(tmp_path / "again")
        loaded.save_metadata(tmp_path / "again")  # over its own files
    adapter = f"{ADAPTERS_NAME}/0.5"
    for file in (tmp_path / "with" / adapter).iterdir():
        assert (tmp_path / "again" / adapter / file.name).read_bytes() == file.read_bytes()

    # It is the extracted model's LoRA as peft knows it, of that model's own shapes: to the rounding of what is
    # stored, not to that of either model's float32.
    theirs = PeftModel.from_pretrained(supernet_without(tmp_path).extract(0.5), tmp_path / "with" / adapter)
    twice = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    assert relative_error(output(theirs.base_model.model.double(), twice), output(small.double(), twice)) < 1e-6
    plain = type(supernet.model).from_pretrained(tmp_path / "with").eval()
    assert relative_error(output(plain, inputs), expected[1.0]) < 1e-5

    # Saving a supernet without adapters over one with them leaves none of another supernet's behind.
    supernet_without(tmp_path).save_pretrained(tmp_path / "again")
    assert not Supernet.from_pretrained(tmp_path / "again").size_adapters


def supernet_without(tmp_path):
    return Supernet.from_pretrained(tmp_path / "without")


def test_a_killed_save_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    supernet = make_supernet(make_unet("plain"), sizes=SIZES)
    old, new = (
        SizeAdapter.from_model(adapted_model(supernet, 0.5, seed, target_modules=["conv1"])) for seed in range(2)
    )
    save_size_adapter(old, tmp_path, 0.5)
    with monkeypatch.context() as killed, pytest.raises(TypeError):
        killed.setattr("ofadiff.adapters.size_adapter.json.dumps", None)  # the weights are written, the JSON is not
        save_size_adapter(new, tmp_path, 0.5)
    for expected in (old, new):
        loaded = load_size_adapters(tmp_path, SIZES)[0.5].state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in expected.state_dict().items())
        save_size_adapter(new, tmp_path, 0.5)
    assert [path.name for path in (tmp_path / ADAPTERS_NAME).iterdir()] == ["0.5"]

    save_size_adapters({0.5: old, 0.75: old}, tmp_path)
    with monkeypatch.context() as killed, pytest.raises(TypeError):
        killed.setattr("ofadiff.adapters.size_adapter.json.dumps", None)
        save_size_adapters({0.5: new}, tmp_path)
    assert load_size_adapters(tmp_path, SIZES).keys() == {0.5, 0.75}
    save_size_adapters({0.5: new}, tmp_path)
    assert load_size_adapters(tmp_path, SIZES).keys() == {0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
def test_a_pipeline_loads_one_size_with_its_adapter_merged(tmp_path, dtype):
    unet = make_unet("plain")
    supernet = make_supernet(unet, sizes=SIZES)
    supernet.set_size_adapter(
        0.5, SizeAdapter.from_model(adapted_model(supernet, 0.5, target_modules=["conv1", "to_q"]))
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "first")
    supernet.save_metadata(tmp_path / "first" / "unet")
    OFAPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "checkpoint")

    pipeline = OFAPipeline.from_pretrained(tmp_path / "checkpoint", torch_dtype=dtype)
    inputs = random_inputs(pipeline.unet)
    pipeline.extract(0.5).save_pretrained(tmp_path / "small")
    one = OFAPipeline.from_pretrained(tmp_path / "checkpoint", size=0.5, torch_dtype=dtype)
    saved = DiffusionPipeline.from_pretrained(tmp_path / "small", torch_dtype=dtype)
    assert torch.equal(output(one.unet, inputs), output(saved.unet, inputs))
    pipeline.set_size(0.5)
    error = relative_error(output(one.unet, inputs), output(pipeline.unet, inputs))
    assert error < (1e-5 if dtype is torch.float32 else 3e-2)
    assert (tmp_path / "checkpoint" / "unet" / ADAPTERS_NAME / "0.5").is_dir()


def test_users_loras_act_beside_it(tmp_path):
    """A LoRA of the original and a size's adapter together are both merged; the user's calls reach the user's alone."""
    original = make_unet("sd15")
    original.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1", "ff.net.2"], init_lora_weights=False))
    user = {f"unet.{key}": value.clone() for key, value in get_peft_model_state_dict(original).items()}

    supernet = make_supernet(make_unet("sd15"), sizes=SIZES)
    plain = copy.deepcopy(supernet)
    supernet.set_size_adapter(0.5, SizeAdapter.from_model(adapted_model(supernet, 0.5)))
    save_stable_diffusion(tmp_path / "checkpoint")
    supernet.save_pretrained(tmp_path / "checkpoint" / "unet")
    pipeline = OFAPipeline.from_pretrained(tmp_path / "checkpoint", safety_checker=None)
    merged = {size: pipeline.extract(size) for size in SIZES}
    inputs = random_inputs(pipeline.unet)
    healed = outputs(pipeline.supernet, inputs)

    pipeline.load_lora_weights(user, adapter_name="style")
    assert pipeline.get_active_adapters() == ["style"]
    for size, value in outputs(pipeline.supernet, inputs).items():
        merged[size].load_lora_weights(user)
        assert relative_error(value, output(merged[size].unet, inputs)) < 1e-5
        assert relative_error(value, healed[size]) > 1e-4
    assert relative_error(healed[0.5], outputs(plain, inputs)[0.5]) > CHANGED
    for refused in (lambda: pipeline.extract(0.5), lambda: pipeline.save_pretrained(tmp_path / "again")):
        with pytest.raises(ValueError, match="the model has adapters"):
            refused()
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipeline.supernet.set_size_adapter(0.5, None)
    pipeline.set_adapters("style", 0.0)
    assert relative_error(outputs(pipeline.supernet, inputs)[0.5], healed[0.5]) < 1e-6
    pipeline.unload_lora_weights()
    assert all(torch.equal(value, healed[size]) for size, value in outputs(pipeline.supernet, inputs).items())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_convolution_of_any_dimension_takes_one(dimensions):
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 6, 3, stride=2, padding=1)
    update = LowRankUpdate(torch.randn(2, 4, *[3] * dimensions), torch.randn(6, 2, *[1] * dimensions), 0.5)
    inputs = torch.randn(2, 4, *[8] * dimensions)
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        merged.weight.copy_(update.add_to(layer.weight))
    make_elastic(layer, "layer")
    layer.updates = (update,)
    assert torch.allclose(layer(inputs), merged(inputs), atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    supernet = make_supernet(make_unet("plain"), sizes=SIZES)
    inputs = random_inputs(supernet.model)
    small = adapted_model(supernet, 0.5, target_modules=["to_q", "conv1"])
    adapter = SizeAdapter.from_model(small)
    supernet.set_size_adapter(0.5, adapter)
    before = outputs(supernet, inputs)
    with pytest.raises(ValueError, match=r"conv1 is for a weight of shape .* at size 0\.75 it has .* extract\(0\.75\)"):
        supernet.set_size_adapter(0.75, SizeAdapter.from_model(small))
    with pytest.raises(ValueError, match=r"size is 0\.3; it must be one of 0\.5, 0\.75, 1"):
        supernet.set_size_adapter(0.3, adapter)
    with pytest.raises(ValueError, match="no adapter 'style'; it has default"):
        SizeAdapter.from_model(small, "style")
    config, state_dict = adapter.config, adapter.state_dict()
    elsewhere = {key.replace("conv1", "conv9"): value for key, value in state_dict.items()}
    with pytest.raises(ValueError, match=r"conv9, which the model does not have"):
        supernet.set_size_adapter(0.75, SizeAdapter.from_state_dict(config, elsewhere))
    norm = {key.replace("conv1", "norm2"): value for key, value in state_dict.items()}
    with pytest.raises(TypeError, match=r"norm2, a ElasticGroupNorm that no size can adapt"):
        supernet.set_size_adapter(0.75, SizeAdapter.from_state_dict(config, norm))
    for changes, extra, message in (
        ({"peft_type": "LOHA"}, {}, "is a LOHA"),
        ({"alpha_pattern": {"to_q": 1}}, {}, "one alpha for all layers"),
        ({"init_lora_weights": "pissa"}, {}, "'pissa'"),
        ({}, {"to_q.lora_magnitude_vector": torch.ones(1)}, "has 'to_q.lora_magnitude_vector'"),
    ):
        with pytest.raises(ValueError, match=message):
            SizeAdapter.from_state_dict({**config, **changes}, {**state_dict, **extra})
    after = outputs(supernet, inputs)
    assert all(torch.equal(value, after[size]) for size, value in before.items())

    supernet.save_pretrained(tmp_path)
    (tmp_path / ADAPTERS_NAME / "0.5").rename(tmp_path / ADAPTERS_NAME / "0.6")
    with pytest.raises(ValueError, match=r"ofa_adapters has 0\.6, but the sizes are 0\.5, 0\.75, 1"):
        Supernet.from_pretrained(tmp_path)
    (tmp_path / ADAPTERS_NAME / "0.6").rename(tmp_path / ADAPTERS_NAME / "0.5")
    (tmp_path / ADAPTERS_NAME / "0.5" / ADAPTER_WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        Supernet.from_pretrained(tmp_path)
    assert json.loads((tmp_path / ADAPTERS_NAME / "0.5" / "adapter_config.json").read_text())["r"] == 3
