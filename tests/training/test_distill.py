import copy

import pytest
import torch

from ofadiff.denoisers.prepare import prepare_pixels
from ofadiff.training.distill import block_outputs, distillation_loss, feature_loss
from ofadiff.training.losses import predict

STAGES = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")


@pytest.fixture
def inputs(noise_scheduler):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"pixel_values": images, "seeds": torch.arange(4), "class_labels": torch.arange(4) % 3}
    return prepare_pixels(batch, noise_scheduler)


def distance(supernet, teacher, inputs, **weights):
    with block_outputs(supernet.model, STAGES) as features:
        prediction = predict(supernet.model, inputs)
    return distillation_loss(teacher, inputs, prediction, features, **weights)


def test_the_original_has_nothing_to_learn_from_itself(teacher, inputs):
    student = copy.deepcopy(teacher)
    with block_outputs(student, STAGES) as features:
        prediction = predict(student, inputs)
    loss = distillation_loss(teacher, inputs, prediction, features, weight=1.0, feature_weight=1.0)
    assert torch.equal(loss, torch.zeros(4))


def test_smaller_subnets_are_further_from_the_teacher(supernet, teacher, inputs):
    teacher.requires_grad_(False)
    weights = ({"weight": 1.0, "feature_weight": 0.0}, {"weight": 0.0, "feature_weight": 1.0})
    for choice in weights:
        losses = []
        for size in supernet.sizes:
            with supernet.at(size):
                losses.append(distance(supernet, teacher, inputs, **choice).mean().item())
        assert losses[0] > losses[1] > 100 * losses[2]


def test_features_count_alike_whatever_their_scale():
    generator = torch.Generator().manual_seed(0)
    teacher = {"a": (torch.randn(2, 4, 3, 3, generator=generator), torch.randn(2, 8, generator=generator))}
    student = {"a": tuple(value + 0.1 * value.roll(1, 0) for value in teacher["a"])}
    scaled = [{"a": (1e3 * side["a"][0], 1e-3 * side["a"][1])} for side in (student, teacher)]
    torch.testing.assert_close(feature_loss(*scaled, 2), feature_loss(student, teacher, 2))


def test_blocks_of_frames_count_with_their_mean():
    generator = torch.Generator().manual_seed(0)
    samples, frames = torch.randn(2, 8, generator=generator), torch.randn(6, 4, generator=generator)
    student = {"a": (samples * 1.1,), "b": (frames * 1.2,)}
    loss = feature_loss(student, {"a": (samples,), "b": (frames,)}, 2)
    torch.testing.assert_close(loss, torch.full((2,), (0.1**2 + 0.2**2) / 2))


def test_gradients_reach_the_student_and_not_the_teacher(supernet, teacher, inputs):
    supernet.set_size("smallest")
    distance(supernet, teacher, inputs, weight=0.0, feature_weight=1.0).mean().backward()
    assert supernet.model.mid_block.resnets[0].conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradient_checkpointing_changes_no_gradient(supernet, teacher, inputs):
    supernet.set_size("smallest")
    supernet.model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            supernet.model.enable_gradient_checkpointing()
        supernet.model.zero_grad()
        distance(supernet, teacher, inputs, weight=1.0, feature_weight=1.0).mean().backward()
        gradients.append([parameter.grad.clone() for parameter in supernet.model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_hooks_are_gone_afterwards_also_on_an_error(teacher, inputs):
    with pytest.raises(RuntimeError, match="stop"), block_outputs(teacher, STAGES) as outputs:
        predict(teacher, inputs)
        assert tuple(outputs) == STAGES
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in teacher.modules())
