import pytest
import torch
from conftest import plain_unet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
)
from tiny_stable_diffusion import save_stable_diffusion
from torch import nn

from ofadiff.evaluation import generate
from ofadiff.pipelines import ClassConditionalDDPMPipeline


def difference(images, others):
    return (images.int() - others.int()).abs().max().item()


def test_an_image_depends_on_its_seed_and_not_on_the_batch(pipeline):
    whole = generate(pipeline, 5, batch_size=5, seed=7, num_inference_steps=2)
    parts = generate(pipeline, 5, batch_size=2, seed=7, num_inference_steps=2)
    assert whole.dtype == torch.uint8 and whole.shape == (5, 3, 16, 16)
    assert difference(whole, parts) <= 1  # kernels round differently from batch size to batch size
    last = generate(pipeline, 2, seed=10, num_inference_steps=2, arguments={"class_labels": [3, 4]})
    assert difference(whole[3:], last) <= 1
    shifted = generate(pipeline, 5, batch_size=5, seed=8, num_inference_steps=2)
    assert all(difference(image, other) > 1 for image, other in zip(whole, shifted, strict=True))


def unconditional(folder):
    torch.manual_seed(0)
    return DDPMPipeline(plain_unet(), DDPMScheduler()), {}


def class_conditional(folder):
    torch.manual_seed(0)
    unet = plain_unet(num_class_embeds=3)
    return ClassConditionalDDPMPipeline(unet, EulerAncestralDiscreteScheduler()), {}


def text_to_image(folder):
    save_stable_diffusion(folder / "sd")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    return pipeline, {"arguments": {"prompt": ["a cat", "two dogs"]}}


# diffusers' Euler schedulers make NumPy arrays of tensors in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("make", [unconditional, class_conditional, text_to_image])
def test_noise_of_every_step_depends_on_the_seed_alone(make, tmp_path):
    """A model that predicts nothing leaves noise alone, and that is the same to the last bit."""
    pipeline, options = make(tmp_path)
    options |= {"num_inference_steps": 3}
    images = [generate(pipeline, 3, batch_size=batch_size, **options) for batch_size in (3, 2)]
    assert difference(*images) <= 1
    seen = []
    for parameter in pipeline.unet.conv_out.parameters():
        nn.init.zeros_(parameter)
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    noise = []
    for batch_size in (3, 2):
        seen.clear()
        generate(pipeline, 3, batch_size=batch_size, **options)
        copies = len(seen[0]) // batch_size  # two with guidance
        steps = [torch.cat([part.chunk(copies)[0] for part in seen[step::3]]) for step in range(3)]
        noise.append(torch.stack(steps))
    assert torch.equal(*noise)
    assert noise[0].diff(dim=1).abs().min() > 0  # every image has its own


def test_a_sampler_with_noise_of_its_own_is_refused():
    class Careless(DDIMScheduler):
        def step(self, *args, **kwargs):
            out = super().step(*args, **kwargs)
            out.prev_sample += torch.randn_like(out.prev_sample)
            return out

    torch.manual_seed(0)
    pipeline = DDPMPipeline(plain_unet(), DDPMScheduler())
    pipeline.scheduler = Careless()
    with pytest.raises(ValueError, match=r"DDPMPipeline draws noise from PyTorch's global generator .* a Careless"):
        generate(pipeline, 1, num_inference_steps=1)


def test_arguments_are_used_in_turn(pipeline):
    labels = {"class_labels": [0, 1, 2]}
    turns = generate(pipeline, 4, num_inference_steps=2, arguments=labels, batch_size=4)
    every = generate(pipeline, 4, num_inference_steps=2, batch_size=4)  # by default, every class in turn
    assert torch.equal(turns[:3], every[:3]) and difference(turns[3:], every[3:]) > 1
    last = generate(pipeline, 1, seed=3, num_inference_steps=2, arguments={"class_labels": [0]})
    assert difference(turns[3:], last) <= 1
    assert difference(last, generate(pipeline, 1, seed=3, num_inference_steps=2, arguments={"class_labels": [1]})) > 1


def test_size_is_what_the_extracted_model_gives(pipeline):
    small = generate(pipeline, 2, size=0.5, num_inference_steps=2)
    assert difference(small, generate(pipeline.extract(0.5), 2, num_inference_steps=2)) <= 1
    assert difference(small, generate(pipeline, 2, num_inference_steps=2)) > 1
    assert pipeline.size == 1.0


def test_the_pipeline_is_left_as_it_was(teacher):
    teacher.set_progress_bar_config(desc="mine")
    teacher.unet.train()
    teacher.unet.mid_block.eval()
    generate(teacher, 1, num_inference_steps=1)
    assert teacher.unet.training and not teacher.unet.mid_block.training
    assert teacher.progress_bar(range(1)).desc == "mine"
    teacher.unet.eval()


def test_dropout_is_off(teacher):
    torch.manual_seed(0)
    unet = plain_unet(dropout=0.5).train()
    pipeline = DDPMPipeline(unet, teacher.scheduler)
    images = [generate(pipeline, 1, num_inference_steps=1) for _ in range(2)]
    assert torch.equal(*images)


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "num_inference_steps"])
def test_numbers_below_one_are_errors(pipeline, name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        generate(pipeline, **{"num_samples": 1, name: 0})


def test_bad_arguments_are_errors(pipeline, teacher):
    with pytest.raises(ValueError, match="'class_labels' has no values"):
        generate(pipeline, 1, arguments={"class_labels": []})
    with pytest.raises(ValueError, match=r"size is 0\.3; it must be one of 0\.5, 1"):
        generate(pipeline, 1, size=0.3)
    with pytest.raises(ValueError, match="ClassConditionalDDPMPipeline is no OFAPipeline"):
        generate(teacher, 1, size=0.5)
