"""Python on the pages runs as it stands there, on tiny models in the place of large ones; what differs is listed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import make_supernet, plain_unet, random_inputs, squared_output_loss
from diffusers import ControlNetModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from docs.snippets import PAGES, blocks
from peft import LoraConfig
from recipes.tiny_stable_diffusion import make_unet, save_stable_diffusion, save_stable_diffusion_xl
from recipes.tiny_text_to_image import TEXT_WIDTH
from recipes.tiny_text_to_image import save_pipeline as save_text_to_image
from recordings.conftest import WARNINGS
from recordings.tiny_pipelines import save_pipeline
from tiny_pipelines import MASK, PICTURE
from versions import skip_if_older

import ofadiff
from ofadiff import OFAPipeline, Supernet, allocate, find_channel_groups, score_channels

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(warning) for warning in WARNINGS)]

SIZES = (0.4, 0.6, 0.8, 1.0)
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"

# A UNet that is made, cut and run in no time.
ONE_BLOCK = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}

# Calls of real pipelines take fifty steps and a graphics card.
FEW = "num_inference_steps=2"
TINY_VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}
ON_CPU = {'.to("cuda")': '.to("cpu")'}
RECORDED = {"seed=0)": f"seed=0, arguments={TINY_VIDEO}, progress=False)", "sizes=(0.4, 1.0)": "sizes=(0.6, 1.0)"}


def save_sizes(folder="sd-ofa", component="unet", sizes=SIZES, inputs=None):
    """Puts a supernet in the place of a saved pipeline's denoiser, which drops branches where it is too tiny to cut."""
    denoiser = DiffusionPipeline.from_pretrained(folder).components[component].eval()
    groups = find_channel_groups(denoiser)
    scores = score_channels(denoiser, groups, criterion="magnitude")
    subnets = allocate(denoiser, groups, scores, sizes, min_keep=0, inputs=inputs)
    Supernet(denoiser, groups, scores, subnets).save_pretrained(f"{folder}/{component}")


def pixels():
    torch.manual_seed(0)
    DDPMPipeline(plain_unet(), DDPMScheduler()).save_pretrained("ddpm-ofa")
    save_sizes("ddpm-ofa")
    OFAPipeline.from_pretrained("ddpm-ofa").extract(0.4).save_pretrained("ddpm-small/size-0.4")
    return {}


def stable_diffusion(sizes=SIZES, **changes):
    save_stable_diffusion(Path("sd-ofa"), **(changes or ONE_BLOCK))
    save_sizes(sizes=sizes)
    return {}


def two_sizes():
    """As many as a schedule needs; every one more takes seconds."""
    return stable_diffusion((0.6, 1.0))


def stable_diffusion_and_edges():
    stable_diffusion(block_out_channels=(16, 32))
    unet = DiffusionPipeline.from_pretrained("sd-ofa").unet
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    controlnet.save_pretrained("lllyasviel/sd-controlnet-canny")
    # What the page leaves to the reader to import.
    classes = ("AutoPipelineForImage2Image", "ControlNetModel", "StableDiffusionControlNetPipeline")
    imported = {"torch": torch, "OFAPipeline": OFAPipeline, **{name: getattr(diffusers, name) for name in classes}}
    return {**imported, "picture": PICTURE, "edges": PICTURE}


def loaded_stable_diffusion():
    two_sizes()
    return {"pipeline": OFAPipeline.from_pretrained("sd-ofa"), "prompts": ["a cat"]}


def sdxl():
    save_stable_diffusion_xl(Path("sdxl-ofa"))
    save_sizes("sdxl-ofa")
    return {"mask": MASK}


def flux():
    save_text_to_image("flux", Path("flux-ofa"))
    save_sizes("flux-ofa", "transformer", (0.7, 1.0))
    return {}


def wan():
    Path("Wan-AI").mkdir()
    save_pipeline("wan", Path(WAN))
    save_pipeline("wan", Path("wan-ofa"))
    frames = {"hidden_states": torch.zeros(1, 4, 2, 4, 4), "timestep": torch.zeros(1)}
    save_sizes("wan-ofa", "transformer", SIZES, {**frames, "encoder_hidden_states": torch.zeros(1, 16, TEXT_WIDTH)})
    return {}


def loaded_wan():
    Path("Wan-AI").mkdir()
    save_pipeline("wan", Path(WAN))
    pipeline = DiffusionPipeline.from_pretrained(WAN)
    scores = score_channels(pipeline.transformer, find_channel_groups(pipeline.transformer), criterion="magnitude")
    return {**vars(ofadiff), "ofadiff": ofadiff, "pipeline": pipeline, "scores": scores}


def plain_denoiser():
    torch.manual_seed(0)
    unet = plain_unet().eval()
    return {"unet": unet, "batches": [random_inputs(unet)], "loss_fn": squared_output_loss}


def ranked_denoiser():
    torch.manual_seed(0)
    unet = make_unet(**ONE_BLOCK)
    groups = find_channel_groups(unet)
    scores = score_channels(unet, groups, criterion="magnitude")
    subnets = allocate(unet, groups, scores, sizes=(0.6, 1.0), min_keep=0)
    given = {"batches": [random_inputs(unet)], "loss_fn": squared_output_loss}
    return {**vars(ofadiff), **given, "unet": unet, "groups": groups, "scores": scores, "subnets": subnets}


def supernet():
    return {"supernet": make_supernet(make_unet(), SIZES), "LoraConfig": LoraConfig}


def is_smaller(names):
    assert names["small"].num_parameters() == pytest.approx(0.6 * names["unet"].num_parameters(), rel=0.02)


def keeps_the_schedule(names):
    assert names["pipeline"].schedules["fast"] == names["schedule"] and len(names["images"]) == 1
    assert names["schedule"].measured["cost"] <= 0.7


def is_at_its_size(names):
    assert names["pipeline"].sizes == (0.4, 0.6, 0.8, 1.0) and names["image"].size == (16, 16)


def answers_as_recorded(names):
    # Two calls of two steps, with and without the prompt.
    assert len(names["recordings"]) == 8 and names["subnets"].sizes == (0.6, 1.0)


def fits(names):
    assert names["pipeline"].fitted == names["size"] == 1.0


@dataclass(frozen=True)
class Run:
    """Sections whose blocks run one after the other.

    Attributes:
        sections: Headings of one page, which go on from one another.
        prepare: Makes what the blocks find in their folder; returns the names that they find.
        instead: What runs in the place of some of their text.
        check: Raises where the names that they leave are not what the page says.
    """

    sections: tuple[str, ...]
    prepare: Callable[[], dict[str, Any]]
    instead: dict[str, str] = field(default_factory=dict)
    check: Callable[[dict[str, Any]], None] = lambda names: None


SCHEDULE = {"[1.0] * 5 + [0.6] * 15": "[1.0] * 1 + [0.6] * 1", "num_inference_steps=20": FEW}

# A machine may be busy, and the page's text-to-image model is tiny here.
FITTING = {
    '"ofa"': '"sd-ofa"',
    "latency_ms=3000)": "latency_ms=1e9, device='cpu', call={'prompt': 'a', 'num_inference_steps': 2})",
    "latency_ms=3000,": "latency_ms=1e9,",
    '"num_inference_steps": 20': '"num_inference_steps": 2',
}

RUNS = {
    "README.md": (
        Run(("Use",), pixels, {"size=0.6).images": f"size=0.6, {FEW}).images"}, is_at_its_size),
        Run(("Text-to-image",), stable_diffusion_and_edges, {**ON_CPU, "size=0.6)": f"size=0.6, {FEW})"}),
        Run(
            ("Sizes over the steps of an image",),
            loaded_stable_diffusion,
            {**SCHEDULE, 'size="fast")': f'size="fast", {FEW})', "=2)   # mean": "=2, progress=False)  # mean"},
            keeps_the_schedule,
        ),
        Run(
            ("A small size for guidance",), loaded_stable_diffusion, {"guidance_size=0.4": f"guidance_size=0.6, {FEW}"}
        ),
        Run(("A size that fits",), two_sizes, FITTING, fits),
        Run(("Any other pipeline, without data",), loaded_wan, RECORDED, answers_as_recorded),
        Run(("Sizes without training",), ranked_denoiser),
        Run(
            ("One size by itself",),
            supernet,
            {"# put a peft LoRA into it": "; small.add_adapter(LoraConfig(target_modules=['to_q']))  #"},
        ),
        Run(("Use as a library",), plain_denoiser, check=is_smaller),
    ),
    "docs/index.md": (
        Run(
            ("Sample at any size",),
            pixels,
            {"size=0.6)": f"size=0.6, {FEW})", "pipeline().images": f"pipeline({FEW}).images"},
        ),
    ),
    "docs/stable_diffusion.md": (
        Run(
            ("Sample",),
            stable_diffusion,
            {
                **ON_CPU,
                "size=0.6)": f"size=0.6, {FEW})",
                "size=0.4)": f"size=0.4, {FEW})",
                'pipeline("a cat")': f'pipeline("a cat", {FEW})',
            },
        ),
    ),
    "docs/sdxl.md": (
        Run(
            ("SDXL",),
            sdxl,
            {
                **ON_CPU,
                "size=0.6)": f"size=0.6, {FEW})",
                "size=0.4)": f"size=0.4, {FEW})",
                'pipeline("a cat")': f'pipeline("a cat", {FEW})',
            },
        ),
    ),
    "docs/flux.md": (
        Run(
            ("Flux",),
            flux,
            {
                **ON_CPU,
                "size=0.5": "size=0.7",
                "num_inference_steps=28": f"{FEW}, height=32, width=32, max_sequence_length=16",
            },
        ),
    ),
    "docs/any_pipeline.md": (
        Run(
            ("Sample", "In Python"),
            wan,
            {**RECORDED, "num_frames=33)": f"**{TINY_VIDEO})"},
            answers_as_recorded,
        ),
    ),
    "docs/choosing_sizes.md": (
        Run(
            ("How many, and which", "The size that fits", "A size for guidance", "Sizes over the steps"),
            two_sizes,
            {"latency_ms=3000": "latency_ms=1e9", '": 20}': '": 2}', "guidance_size=0.4": f"guidance_size=0.6, {FEW}"}
            | {**SCHEDULE, "=2)  # give": "=2, progress=False)  # give", '["a cat", "a dog"]': '["a cat"]'},
            keeps_the_schedule,
        ),
    ),
    "docs/reference/index.md": (Run(("The path",), plain_denoiser, check=is_smaller),),
}
# Pages that have a test module of their own.
ELSEWHERE = {"docs/deployment.md": "test_deployment.py", "docs/own_model.md": "test_own_model.py"}

BLOCKS = [block for block in blocks(*PAGES) if block.language == "python"]
CASES = [(page, run) for page, runs in RUNS.items() for run in runs]


@pytest.mark.parametrize(("page", "run"), CASES, ids=[f"{page}, {run.sections[0]}" for page, run in CASES])
def test_it_runs(page, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for constant in ("ROUNDS", "REPEATS", "WARM_UP"):
        monkeypatch.setattr(f"ofadiff.profiling.timing.{constant}", 1)
    monkeypatch.setattr("ofadiff.pipelines.fitting.HF_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    names = run.prepare()
    if "ControlNetModel" in names:
        skip_if_older("diffusers", "argument dtype, but torch_dtype,")
    text = "\n".join(block.text for block in BLOCKS if block.page == page and block.heading in run.sections)
    for written, instead in run.instead.items():
        assert written in text, f"{page} no longer says {written!r}"
        text = text.replace(written, instead)
    exec(compile(text, page, "exec"), names)
    run.check(names)


def test_every_block_is_run():
    """A section with Python gets a line in RUNS, or a test module of its own for its page."""
    run = {(page, section) for page, runs in RUNS.items() for each in runs for section in each.sections}
    assert {(block.page, block.heading) for block in BLOCKS if block.page not in ELSEWHERE} == run
    for page, module in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / module).read_text(encoding="utf-8")
        assert page.rpartition("/")[2] in text and r"```python\n(.*?)```" in text
