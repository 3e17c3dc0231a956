"""CLIP score, and the evaluation of text-to-image pipelines."""

import json
import sys

import pytest
import torch
from conftest import make_supernet
from diffusers import StableDiffusionPipeline
from evaluation.random_images import random_images
from evaluation.tiny_clip import save_clip
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import save_stable_diffusion
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ofadiff import OFAPipeline, evaluate
from ofadiff.evaluation import ClipScorer, generate, read_prompts

PROMPTS = ["a cat", "two dogs", "the sea"]
QUICK = {"num_samples": 6, "num_shown": 2, "num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory):
    """An OFA checkpoint of a tiny Stable Diffusion, and the original."""
    folder = tmp_path_factory.mktemp("stable-diffusion") / "checkpoint"
    save_stable_diffusion(folder)
    original = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    unet = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    make_supernet(unet.eval(), sizes=(0.5, 1.0)).save_pretrained(folder / "unet")
    return OFAPipeline.from_pretrained(folder, safety_checker=None), original


def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # before and since transformers 5


@torch.no_grad()
def cosines(folder, images, prompts):
    """One image and one prompt at a time, from the features of each."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        x = features(model.get_image_features(pixel_values=processor(image, return_tensors="pt").pixel_values))[0]
        y = features(model.get_text_features(**tokenizer(prompt, return_tensors="pt")))
        found.append(torch.nn.functional.cosine_similarity(x, y[0], dim=0).item())
    return found


def test_the_score_is_the_mean_cosine_without_what_is_negative(clip):
    images = random_images(24, size=20)
    prompts = [word * n for n in range(1, 5) for word in ("a", "b", "cd", "x", "yy", "z")]
    expected = cosines(clip, images, prompts)
    assert min(expected) < 0 < max(expected)
    mean = sum(max(cosine, 0) for cosine in expected) / 24
    scorer = ClipScorer(str(clip))
    for batch_size in (24, 7):  # prompts of several lengths in a batch: padding is not looked at
        assert scorer.score(images, prompts, batch_size) == pytest.approx(mean, rel=1e-4)


def test_every_image_is_scored_with_its_own_prompt(clip):
    scorer, images = ClipScorer(str(clip)), random_images(3)
    ours = [scorer.score(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert scorer.score(images, PROMPTS) == pytest.approx(sum(ours) / 3, rel=1e-4)
    assert scorer.score(images.flip(0), PROMPTS[::-1]) == pytest.approx(sum(ours) / 3, rel=1e-4)
    assert scorer.score(images.flip(0), PROMPTS) != pytest.approx(sum(ours) / 3, rel=1e-3)


def test_prompts_longer_than_the_context_are_cut_off(clip):
    scorer, images = ClipScorer(str(clip)), random_images(1)
    assert scorer.score(images, ["a" * 10 + "b" * 30]) == scorer.score(images, ["a" * 10 + "b" * 50])


def test_every_size_of_a_text_to_image_checkpoint(text_to_image, clip):
    pipeline, original = text_to_image
    call = {"guidance_scale": 3.0}
    report = evaluate(
        pipeline, teacher=original, arguments={"prompt": PROMPTS}, call_arguments=call, clip_model=clip, **QUICK
    )
    assert [row.label for row in report.rows] == ["teacher", "1.0", "0.5"] and "clip_score" in report.columns
    for row, model in zip(report.rows, (original, pipeline.extract(1.0), pipeline.extract(0.5)), strict=True):
        images = generate(model, 6, num_inference_steps=2, arguments={"prompt": PROMPTS}, call_arguments=call)
        expected = [max(cosine, 0) for cosine in cosines(clip, images, PROMPTS * 2)]
        assert row.values["clip_score"] == pytest.approx(sum(expected) / 6, rel=1e-4) and sum(expected) > 0
    assert report.rows[1].values["psnr"] > 40 > report.rows[2].values["psnr"]
    assert report.rows[2].values["latency"] > 0 and report.rows[2].values["reached"] == pytest.approx(0.5, abs=0.02)
    protocol = report.protocol
    assert protocol["CLIP score"] == "mean cosine (w = 1), tiny-clip"  # and no path of this machine
    assert protocol["prompts"] == 3 and protocol["guidance scale"] == 3.0 and protocol["resolution"] == "16x16 pixels"


def test_call_arguments_reach_the_pipeline(text_to_image):
    def sample(**call):
        return generate(text_to_image[1], 1, num_inference_steps=2, arguments={"prompt": PROMPTS}, call_arguments=call)

    assert torch.equal(sample(), sample(guidance_scale=7.5))  # the pipeline's own
    assert not torch.equal(sample(), sample(guidance_scale=1.0))
    assert sample(height=32, width=24).shape == (1, 3, 32, 24)


def test_the_pipelines_own_guidance_is_stated_and_costs_need_no_clip(text_to_image):
    report = evaluate(text_to_image[1], metrics=["macs"], arguments={"prompt": PROMPTS}, **QUICK)
    assert report.protocol["guidance scale"] == 7.5 and report.protocol["prompts"] == 2
    assert "CLIP score" not in report.protocol


@pytest.fixture
def no_sampling(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr("ofadiff.evaluation.sampling.Sampling.draw_frames", refuse)


@pytest.mark.usefixtures("no_sampling")
def test_what_cannot_work_is_said_before_sampling(text_to_image, pipeline, clip, tmp_path):
    def fails(match, pipeline=text_to_image[0], **options):
        with pytest.raises(ValueError, match=match):
            evaluate(pipeline, **{"arguments": {"prompt": PROMPTS}, "clip_model": clip, **QUICK, **options})

    fails("'clip_score' cannot be measured: there are no prompts", metrics=["clip_score"], arguments={})
    fails("StableDiffusionPipeline makes images of prompts, and there are none", arguments=None)
    fails("'prompt' is the string 'a cat'; it must be a sequence", arguments={"prompt": "a cat"})
    fails("'prompt' has no values", arguments={"prompt": []})
    fails("StableDiffusionPipeline takes no argument 'style'; it takes prompt, height", call_arguments={"style": 1})
    fails("'prompt' is given both per image and for all images", call_arguments={"prompt": "a cat"})
    fails("'num_images_per_prompt' cannot be given", call_arguments={"num_images_per_prompt": 2})
    fails("takes no argument 'prompt'; it takes class_labels", pipeline=pipeline)
    fails("the CLIP model .*nowhere cannot be loaded", clip_model=tmp_path / "nowhere")


def test_a_model_that_is_no_clip_has_no_score(clip, tmp_path):
    folder = tmp_path / "text-only"
    save_clip(folder)
    weights = load_file(folder / "model.safetensors")
    text = {name: value for name, value in weights.items() if name.startswith("text_model.")}
    save_file(text, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"text-only holds no CLIP model: \d+ weights are missing, such as "):
        ClipScorer(str(folder))
    with pytest.raises(ValueError, match="there are 3 images and 2 prompts; each image takes one"):
        ClipScorer(str(clip)).score(random_images(3), PROMPTS[:2])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            ("tokenizer.json", "vocab.json"),
            "clip has no vocabulary|clip cannot be loaded",
        ),  # since, before transformers 5
        (("preprocessor_config.json",), "clip cannot be loaded"),
        (("model.safetensors",), "clip cannot be loaded"),
    ],
    ids=["tokenizer", "image processor", "model"],
)
def test_an_incomplete_folder_is_an_error(missing, message, tmp_path):
    folder = tmp_path / "clip"
    save_clip(folder)
    for file in missing:
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        ClipScorer(str(folder))


def test_without_transformers_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install ofadiff\[eval\]"):
        ClipScorer()


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \nö, the sea\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "two dogs", "ö, the sea"]
    lines = [{"file_name": "0.png", "text": "a cat"}, {"text": ["two dogs", "dogs"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_prompts(str(tmp_path / "metadata.jsonl")) == ["a cat", "two dogs"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", "\n \n", "there are no prompts in .*prompts.txt"),
        ("m.jsonl", '{"text": "a"}\nb', "m.jsonl, line 2 is not JSON"),
        ("m.jsonl", '{"caption": "a"}', 'm.jsonl, line 1 has no string under "text"'),
        ("m.jsonl", '{"text": []}', 'm.jsonl, line 1 has no string under "text"'),
    ],
)
def test_a_file_without_prompts_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere is not a file of prompts"):
        read_prompts(tmp_path / "nowhere")
