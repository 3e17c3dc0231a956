"""Arguments of types that nothing takes: each public function names the argument, its value and what is accepted."""

import dataclasses
import functools
import inspect

import pytest
import torch
from faults.conftest import tiny_unet

from ofadiff import (
    OFAPipeline,
    SizeSchedule,
    Supernet,
    allocate,
    correct_readers,
    evaluate,
    find_channel_groups,
    find_schedule,
    record,
    rotate_attention,
    score_channels,
)
from ofadiff.evaluation import EvaluationSettings

pytestmark = pytest.mark.slow

# What may be anything that is true or false, or is handed on to a library as it is.
ANYTHING = {"progress", "overwrite_samples", "options", "kwargs", "changes", "self", "cls"}


class Nothing:
    """Of a type that no argument is of."""


@functools.cache
def parts():
    model = tiny_unet()
    groups = find_channel_groups(model)
    return model, groups, score_channels(model, groups, criterion="random")


@functools.cache
def sizes():
    return allocate(*parts(), sizes=(0.6, 1.0))


@functools.cache
def supernet():
    model = tiny_unet()
    return Supernet(model, *parts()[1:], sizes())


def loss(model, batch):
    return model(**batch).sample.square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def pipeline(whole):
    return OFAPipeline.from_pretrained(whole / "checkpoint")


CALL = {"batch_size": 1, "num_inference_steps": 1}
BATCHES = ({"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.tensor([3])},)


def model_and_groups(pipeline):
    return dict(zip(("model", "groups", "scores"), parts(), strict=True))


# Each function with arguments that work. They are not reached: the wrong one is found before.
FUNCTIONS = {
    find_channel_groups: lambda pipeline: {"model": tiny_unet()},
    rotate_attention: lambda pipeline: {"model": parts()[0], "groups": parts()[1]},
    score_channels: lambda pipeline: {"model": parts()[0], "groups": parts()[1], "batches": BATCHES, "loss_fn": loss},
    allocate: model_and_groups,
    Supernet: lambda pipeline: {**model_and_groups(pipeline), "subnets": sizes()},
    Supernet.from_pretrained: lambda pipeline: {"directory": f"{pipeline.config._name_or_path}/unet"},
    Supernet.set_size: lambda pipeline: {"self": supernet()},
    Supernet.extract: lambda pipeline: {"self": supernet()},
    Supernet.save_pretrained: lambda pipeline: {"self": supernet()},
    correct_readers: lambda pipeline: {"supernet": supernet(), "batches": BATCHES, "loss_fn": loss},
    SizeSchedule: lambda pipeline: {"sizes": [0.6]},
    OFAPipeline.from_pretrained: lambda pipeline: {"pretrained_model_name_or_path": pipeline.config._name_or_path},
    OFAPipeline.size_for: lambda pipeline: {"self": pipeline, "memory": "1GB"},
    OFAPipeline.extract: lambda pipeline: {"self": pipeline},
    OFAPipeline.set_size: lambda pipeline: {"self": pipeline},
    record: lambda pipeline: {"pipeline": pipeline, "calls": [CALL], "output_dir": "out"},
    find_schedule: lambda pipeline: {"pipeline": pipeline, "calls": [CALL], "budget": 0.8},
    evaluate: lambda pipeline: {"pipeline": pipeline, "metrics": ["macs"]},
}


def parameters(function):
    names = [name for name in inspect.signature(function).parameters if name not in ANYTHING]
    if function is evaluate:
        names += [each.name for each in dataclasses.fields(EvaluationSettings) if each.name not in ANYTHING]
    return names


@pytest.mark.parametrize(
    ("function", "name"),
    [
        pytest.param(function, name, id=f"{function.__qualname__}-{name}")
        for function in FUNCTIONS
        for name in parameters(function)
    ],
)
@pytest.mark.parametrize("value", [Nothing(), torch.zeros(2, 2, 2)], ids=["an object", "a tensor"])
def test_an_argument_of_no_type_that_is_taken(function, name, value, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = FUNCTIONS[function](pipeline)
    with pytest.raises(ValueError, match=name) as failed:
        function(**{**arguments, name: value})
    said = str(failed.value)
    assert "\n" not in said and len(said) < 400
    assert not [*tmp_path.iterdir()]
