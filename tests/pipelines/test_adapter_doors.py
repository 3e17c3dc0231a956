"""An adapter of the original acts as on the original by whatever door it comes, or is refused."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_supernet, make_unet, output, random_inputs, relative_error, sliced
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipelines import image, load
from tiny_stable_diffusion import save_stable_diffusion
from tiny_transformers import tiny, tiny_inputs

from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, score_channels

pytestmark = pytest.mark.slow

SIZES = (0.6, 1.0)
TARGETS = {
    "sd15": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"],
    "SD3Transformer2DModel": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.0.proj", "ff.net.2"],
}


class Case:
    """A supernet, a LoRA of its original, and what the two have to give together."""

    def __init__(self, name, folder):
        make = make_unet if name == "sd15" else tiny
        original, adapted = make(name), make(name)
        self.config = LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS[name], init_lora_weights=False)
        torch.manual_seed(1)
        adapted.add_adapter(copy.deepcopy(self.config))
        self.lora = get_peft_model_state_dict(adapted)
        adapted.fuse_lora()
        adapted.unload_lora()
        self.inputs = random_inputs(original) if name == "sd15" else tiny_inputs(name)
        if name == "sd15":
            supernet = make_supernet(original, SIZES)
        else:
            groups = find_channel_groups(original)
            scores = score_channels(original, groups, criterion="random")
            costs = allocate(original, groups, scores, sizes=(1.0,), inputs=self.inputs)[0]
            assert costs.size == 1.0
            table = allocate(original, groups, scores, sizes=(0.7, 1.0), budget="channels", inputs=self.inputs)
            supernet = Supernet(original, groups, scores, table)
        supernet.save_pretrained(folder)
        self.sizes = supernet.sizes
        fused = sliced(adapted, folder)
        self.expected = {}
        for size in self.sizes:
            fused.set_size(size)
            self.expected[size] = output(fused.model, self.inputs)
        self.plain = output(original, self.inputs)
        assert relative_error(self.plain, self.expected[1.0]) > 1e-2
        self.folder = folder

    def check(self, model, sizes=None):
        supernet = Supernet.of(model)
        for size in sizes or self.sizes:
            supernet.set_size(size)
            assert relative_error(output(model, self.inputs), self.expected[size]) < 1e-4
        supernet.set_size(1.0)


@pytest.fixture(scope="module", params=TARGETS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case") / "denoiser")


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """The UNet's case, with a whole checkpoint around it and the LoRA in a file."""
    folder = tmp_path_factory.mktemp("sd")
    made = Case("sd15", folder / "alone")
    save_stable_diffusion(folder / "checkpoint")
    Supernet.from_pretrained(folder / "alone").save_pretrained(folder / "checkpoint" / "unet")
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=made.lora)
    made.checkpoint, made.file = folder / "checkpoint", folder / "lora"
    return made


def test_the_denoiser_loads_it_itself(case, tmp_path):
    model = Supernet.from_pretrained(case.folder).model
    model.load_lora_adapter(case.lora, prefix=None, adapter_name="first")
    case.check(model)
    model.delete_adapters("first")
    assert relative_error(output(model, case.inputs), case.plain) < 1e-6
    prefixed = {f"denoiser.{key}": value for key, value in case.lora.items()}
    save_file(prefixed, tmp_path / LORA)
    model.load_lora_adapter(tmp_path, prefix="denoiser", use_safetensors=True, weight_name=LORA)
    case.check(model)


def test_a_compiled_denoiser_loads_it(case):
    model = Supernet.from_pretrained(case.folder).model
    compiled = torch.compile(model, backend="eager")
    compiled.load_lora_adapter(case.lora, prefix=None)
    case.check(model)
    case.check(compiled, case.sizes[:1])  # a graph per size takes a while


def test_the_pipeline_of_a_compiled_denoiser_loads_it(sd):
    pipeline = load(sd.checkpoint)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.load_lora_weights(sd.file, weight_name=LORA)
    assert pipeline.sizes == SIZES and pipeline.supernet.model is pipeline.unet._orig_mod
    sd.check(pipeline.unet, sd.sizes[:1])


@pytest.mark.parametrize("compiled", [False, True])
def test_diffusers_own_pipelines_load_it(sd, compiled):
    pipeline = load(sd.checkpoint)
    plain = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    if compiled:
        plain.unet = torch.compile(plain.unet, backend="eager")
    plain.load_lora_weights(sd.file, weight_name=LORA, adapter_name="style")
    sd.check(pipeline.unet)
    plain.unet.delete_adapters("style")
    assert relative_error(output(pipeline.unet, sd.inputs), sd.plain) < 1e-6


def test_the_class_method_of_pipelines_loads_it(sd):
    pipeline = load(sd.checkpoint)
    lora = {f"unet.{key}": value for key, value in sd.lora.items()}
    StableDiffusionPipeline.load_lora_into_unet(lora, None, pipeline.unet)
    sd.check(pipeline.unet)


def test_an_offloaded_pipeline_loads_it(sd, monkeypatch):
    pipeline = load(sd.checkpoint)
    # After loading, diffusers offloads again to an accelerator that it finds by itself.
    enable = type(pipeline).enable_model_cpu_offload
    monkeypatch.setattr(type(pipeline), "enable_model_cpu_offload", lambda self: enable(self, device="cpu"))
    pipeline.enable_model_cpu_offload()
    pipeline.load_lora_weights(sd.file, weight_name=LORA)
    assert all("_hf_hook" in vars(part) for part in (pipeline.unet, pipeline.vae))
    sd.check(pipeline.unet)


def test_what_peft_injects_is_refused_until_it_is_adopted(case):
    model = Supernet.from_pretrained(case.folder).model
    for inject in (
        lambda: model.add_adapter(copy.deepcopy(case.config), "raw"),
        lambda: inject_adapter_in_model(copy.deepcopy(case.config), model, "raw"),
    ):
        inject()
        set_peft_model_state_dict(model, case.lora, adapter_name="raw")
        with pytest.raises(ValueError, match="'raw' was put into the supernet without being converted"):
            output(model, case.inputs)
        Supernet.of(model).adopt_adapter("raw")
        case.check(model)
        with pytest.raises(ValueError, match="follows the sizes already; converting it twice would be wrong"):
            Supernet.of(model).adopt_adapter("raw")
        model.delete_adapters("raw")
        assert relative_error(output(model, case.inputs), case.plain) < 1e-6


@pytest.mark.parametrize("kind", ["dora", "lokr", "bias"])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_no_plain_lora_is_refused_and_leaves_nothing(case, kind, compiled):
    donor = copy.deepcopy(Supernet.from_pretrained(case.folder).model)
    if kind == "lokr":
        inject_adapter_in_model(LoKrConfig(r=2, target_modules=["to_q"]), donor)
    else:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], use_dora=kind == "dora"), donor)
    state = get_peft_model_state_dict(donor)
    if kind == "bias":
        state["transformer_blocks.0.attn.to_q.bias"] = torch.zeros(3)
    model = Supernet.from_pretrained(case.folder).model
    door = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(ValueError, match=r"only plain LoRA can follow the sizes|fused projections cannot"):
        door.load_lora_adapter(state, prefix=None)
    assert torch.equal(output(model, case.inputs), case.plain) and not any("lora" in key for key in model.state_dict())


def test_a_lora_in_a_supernet_is_not_saved_for_the_original(case, tmp_path):
    model = Supernet.from_pretrained(case.folder).model
    model.load_lora_adapter(case.lora, prefix=None, adapter_name="style")
    with pytest.raises(ValueError, match="keep the file that it was loaded from"):
        model.save_lora_adapter(tmp_path, "style")


def test_ip_adapters_and_attention_processors_are_refused_by_every_denoiser(sd):
    pipeline = load(sd.checkpoint)
    for unet, what in (
        (pipeline.unet, "sizes of an OFA checkpoint"),
        (pipeline.extract(1.0).unet, "an extracted size"),
    ):
        with pytest.raises(ValueError, match=f"an IP-Adapter works with the original model only, not with .*{what}"):
            unet._load_ip_adapter_weights([])
        with pytest.raises(ValueError, match="attention processors with weights of the original do not fit"):
            unet.load_attn_procs({})


def test_a_lora_of_an_extracted_size_is_not_taken_for_one_of_the_original(sd):
    small = load(sd.checkpoint).extract(0.6)
    trained = copy.deepcopy(small.unet)
    trained.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q"]))
    lora = {f"unet.{key}": value for key, value in get_peft_model_state_dict(trained).items()}
    with pytest.raises(ValueError, match="trained on an extracted size acts there alone"):
        small.load_lora_weights(lora)


def test_hot_swapping_replaces_it(sd):
    pipeline = load(sd.checkpoint)
    other = {key: torch.randn_like(value) for key, value in sd.lora.items()}
    lora = {f"unet.{key}": value for key, value in other.items()}
    StableDiffusionPipeline.load_lora_into_unet(lora, None, pipeline.unet, "style")
    assert relative_error(output(pipeline.unet, sd.inputs), sd.expected[1.0]) > 1e-2
    pipeline.load_lora_weights(sd.file, weight_name=LORA, adapter_name="style", hotswap=True)
    sd.check(pipeline.unet)


@pytest.mark.parametrize("through", ["save", "copy", "hub"])
def test_an_extracted_model_keeps_its_basis_wherever_its_weights_go(sd, tmp_path, through):
    pipeline = load(sd.checkpoint)
    pipeline.extract(0.6).save_pretrained(tmp_path / "small", max_shard_size="100kB" if through == "hub" else "10GB")
    source = tmp_path / "small"
    if through == "copy":  # and once more
        StableDiffusionPipeline.from_pretrained(source, safety_checker=None).save_pretrained(tmp_path / "again")
        source = tmp_path / "again"
    if through == "hub":
        # Of a component's folder diffusers fetches the files that look like weights, and config.json.
        from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

        names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        fetched = variant_compatible_siblings(names)[0] | {"unet/config.json"}
        for name in names:
            if name.startswith("unet/") and name not in fetched:
                (source / name).unlink()
    loaded = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    loaded.load_lora_weights(sd.file, weight_name=LORA)
    assert relative_error(output(loaded.unet, sd.inputs), sd.expected[0.6]) < 1e-4
    one = OFAPipeline.from_pretrained(sd.checkpoint, size=0.6, safety_checker=None)
    for name, tensor in one.unet.ofa_basis.items():
        assert torch.equal(tensor, loaded.unet.ofa_basis[name])
        assert tensor.dtype in (torch.float16, torch.int16)


def test_an_extracted_model_without_basis_says_so(sd, tmp_path):
    small = load(sd.checkpoint).extract(0.6)
    small.unet.ofa_basis = None
    small.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    with pytest.raises(ValueError, match="hold no basis of its supernet"):
        loaded.load_lora_weights(sd.file, weight_name=LORA)


def test_weights_of_an_adapter_may_differ_from_block_to_block(sd):
    pipeline = load(sd.checkpoint)
    small = pipeline.extract(0.6)
    scales = {"down": 0.3, "mid": 0.0, "up": {"block_1": [0.7, 0.1]}}
    for each in (pipeline, small):
        each.load_lora_weights(sd.file, weight_name=LORA, adapter_name="style")
        each.set_adapters("style", scales)
    pipeline.set_size(0.6)
    expected = output(pipeline.unet, sd.inputs)
    assert relative_error(output(small.unet, sd.inputs), expected) < 1e-5
    pipeline.set_adapters("style", 0.3)
    assert relative_error(output(pipeline.unet, sd.inputs), expected) > 1e-3


def test_a_lora_that_is_fused_between_steps_acts_from_there_on(sd):
    pipeline = load(sd.checkpoint)
    pipeline.load_lora_weights(sd.file, weight_name=LORA, adapter_name="style")
    pipeline.set_adapters("style", 0.0)

    def fuse(pipe, step, timestep, tensors):
        if step == 0:
            pipe.set_adapters("style", 1.0)
            pipe.fuse_lora(components=["unet"])
        else:
            pipe.unfuse_lora(components=["unet"])
            pipe.set_adapters("style", 0.0)
        return tensors

    embeds = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    text = {"prompt": None, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}

    def sample(pipe, size):
        kwargs = {} if size is None else {"size": size}
        return image(pipe, num_inference_steps=2, callback_on_step_end=fuse, **text, **kwargs)

    extracted = load(sd.checkpoint).extract(0.6)
    extracted.load_lora_weights(sd.file, weight_name=LORA, adapter_name="style")
    extracted.set_adapters("style", 0.0)
    expected = sample(extracted, None)
    assert np.allclose(sample(pipeline, 0.6), expected, atol=1e-4)
    assert not np.allclose(image(pipeline, size=0.6, num_inference_steps=2, **text), expected, atol=1e-2)
