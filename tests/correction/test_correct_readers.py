"""Readers of cut branches fitted to the original's in closed form."""

import copy
import threading

import pytest
import torch
from conftest import (
    make_dropping_supernet,
    make_unet,
    output,
    plain_unet,
    random_inputs,
    relative_error,
    squared_output_loss,
)
from tiny_transformers import tiny, tiny_inputs
from torch import nn

from ofadiff import Supernet, allocate, find_channel_groups, score_channels
from ofadiff.correction import correct_readers
from ofadiff.correction.equations import NormalEquations
from ofadiff.correction.readers import active_columns, output_rows, patches
from ofadiff.cutting import kept_by_module

UNETS = {"plain": {}, "scale_shift": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 10}}
TRANSFORMERS = ("DiTTransformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel")


def call(model, inputs):
    """As a `loss_fn`: what it returns does not matter."""
    model(**inputs, return_dict=False)


def some(name, sizes=(0.7, 0.85, 1.0)):
    """A supernet, batches to correct it on, and others to judge it on."""
    if name in TRANSFORMERS:
        torch.manual_seed(0)
        model, inputs = tiny(name).eval(), lambda seed: tiny_inputs(name, 8, seed)
    else:
        torch.manual_seed(0)
        small = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "attention_head_dim": 8}
        model = plain_unet(**small, **UNETS[name]).eval()
        inputs = lambda seed: random_inputs(model, 8, seed)  # noqa: E731
    groups = find_channel_groups(model)
    scores = score_channels(model, groups, [inputs(1)], squared_output_loss)
    supernet = Supernet(model, groups, scores, allocate(model, groups, scores, sizes))
    return supernet, [inputs(seed) for seed in range(2, 6)], inputs(7)


def errors(supernet, expected, inputs):
    """Mean squared distance of every size's output to the original's."""
    found = {}
    for size in supernet.sizes:
        with supernet.at(size) as model:
            found[size] = float((output(model, inputs) - expected).square().mean())
    return found


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_every_size_comes_closer_to_the_original_on_inputs_it_did_not_see(name):
    supernet, batches, unseen = some(name)
    expected = output(supernet.model, unseen)
    before = errors(supernet, expected, unseen)
    left = correct_readers(supernet, batches, call)
    after = errors(supernet, expected, unseen)
    assert supernet.size == 1.0
    assert max(left.values()) <= 1 and min(left.values()) < 0.9
    for size in supernet.sizes[:-1]:
        assert after[size] < before[size]
    assert after[1.0] < 0.2 * before[supernet.sizes[0]]
    small = supernet.extract(supernet.sizes[0])
    with supernet.at(supernet.sizes[0]) as model:
        assert relative_error(output(small, unseen), output(model, unseen)) < 1e-5


@pytest.mark.parametrize("name", ["plain", "DiTTransformer2DModel"])
def test_what_the_kept_channels_can_say_of_the_others_is_recovered_at_every_size(name):
    """Channels come in equal pairs, one of each kept: then shared weights exist with which no size loses anything."""
    supernet, batches, unseen = some(name, (0.7, 1.0))
    model, subnet = supernet.model, supernet.subnets[0]
    with torch.no_grad():
        for group in supernet.groups:
            kept = subnet.widths[group.name]
            # Each dropped unit becomes a copy of a kept one, in what writes it and what is carried along.
            source = torch.arange(group.width)
            source[kept:] = torch.arange(group.width - kept) % kept
            for part in group.slices:
                layer = model.get_submodule(part.module)
                if part.axis == "out":
                    for parameter in layer.parameters(recurse=False):
                        own = parameter.narrow(0, part.start, part.length).clone()
                        parameter.narrow(0, part.start, part.length).copy_(own[part.indices(source)])
    # Attention of other head dimensions has other products of queries and keys, however its readers are fitted.
    exact = [group.name for group in supernet.groups if group.kind in ("convolution", "feed_forward")]
    for other in supernet.subnets:
        for group in supernet.groups:
            if group.name not in exact:
                other.widths[group.name] = group.width
    supernet._state.look_up_layers(model)
    expected = output(model, unseen)
    before = errors(supernet, expected, unseen)
    correct_readers(supernet, batches, call, ridge=1e-9)
    after = errors(supernet, expected, unseen)
    assert exact and before[0.7] > 1e-6
    assert after[0.7] < 1e-5 * before[0.7] and after[1.0] < 1e-5 * before[0.7]


@pytest.mark.parametrize("name", ["plain", "FluxTransformer2DModel"])
def test_the_shared_solution_is_the_least_squares_of_all_sizes_together(name):
    supernet, batches, _ = some(name)
    weights = {0.7: 2.0, 0.85: 0.5, 1.0: 3.0}
    corrected = copy.deepcopy(supernet.model)
    # Nothing is corrected before the first one, so sizes read what they read here.
    first = next(iter(correct_readers(Supernet.of(corrected), batches, call, weights, ridge=1e-3)))
    layer = supernet.model.get_submodule(first)
    width, reads, gives = layer.weight[0].numel(), {}, {}
    for size in supernet.sizes:
        calls = []
        handle = layer.register_forward_hook(lambda module, args, result, calls=calls: calls.append((args[0], result)))
        with supernet.at(size) as model:
            for batch in batches:
                output(model, batch)
        handle.remove()
        reads[size] = torch.cat([patches(layer, read) for read, _ in calls]).double()
        gives[size] = torch.cat([output_rows(layer, given) for _, given in calls]).double()
    stacked, lacking = [], []
    for size, rows in reads.items():
        padded = torch.zeros(len(rows), width + 1, dtype=torch.float64)
        columns = active_columns(layer, kept_by_module(supernet.groups, supernet.subnets.find(size).widths)[first])
        padded[:, columns], padded[:, -1] = rows, 1
        stacked.append(padded * weights[size] ** 0.5)
        lacking.append((gives[1.0] - gives[size]) * weights[size] ** 0.5)
    squares = sum(rows.square().sum(0)[:-1] for rows in stacked)
    pull = torch.eye(width, width + 1, dtype=torch.float64) * (1e-3 * squares.mean()) ** 0.5
    target = torch.cat([*lacking, torch.zeros(width, lacking[0].shape[1])])
    change = torch.linalg.lstsq(torch.cat([*stacked, pull]), target).solution
    own = corrected.get_submodule(first)
    moved = (own.weight - layer.weight).detach().flatten(1).T.double()
    assert relative_error(moved, change[:-1]) < 1e-3
    assert relative_error((own.bias - layer.bias).detach().double(), change[-1]) < 1e-3


def test_a_narrow_adapter_brings_each_size_closer_still(tmp_path):
    supernet, batches, unseen = some("plain")
    alone, expected = copy.deepcopy(supernet.model), output(supernet.model, unseen)
    correct_readers(Supernet.of(alone), batches, call)
    correct_readers(supernet, batches, call, weights={1.0: 10}, adapter_rank=4)
    shared, own = errors(Supernet.of(alone), expected, unseen), errors(supernet, expected, unseen)
    assert all(own[size] < shared[size] for size in supernet.sizes)
    assert set(supernet.size_adapters) == set(supernet.sizes)
    supernet.save_pretrained(tmp_path)
    small = Supernet.from_pretrained(tmp_path).extract(0.7)
    with supernet.at(0.7) as model:
        assert relative_error(output(small, unseen), output(model, unseen)) < 1e-5


def test_shares_of_several_processes_add_up():
    """Every second sample in each of two processes gives what all samples in one give: the same choice of positions and
    of the ridge."""
    supernet, batches, unseen = some("plain")
    halves = [copy.deepcopy(supernet.model) for _ in range(2)]
    few = {"max_positions": 16}
    correct_readers(supernet, batches, call, **few)
    barrier, shared = threading.Barrier(2, timeout=60), {}

    def reduce_of(process):
        def reduce(value):
            shared[process] = value
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        return reduce

    def work(process):
        with torch.random.fork_rng():
            own = [{name: value[process::2] for name, value in batch.items()} for batch in batches]
            joint = {"reduce": reduce_of(process), "share": (process, 2)}
            correct_readers(Supernet.of(halves[process]), own, call, **few, **joint)

    threads = [threading.Thread(target=work, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half in halves:
        for size in supernet.sizes:
            with supernet.at(size) as whole, Supernet.of(half).at(size) as part:
                assert relative_error(output(part, unseen), output(whole, unseen)) < 1e-4


def test_noise_that_the_loss_draws_is_the_same_for_all_sizes():
    supernet, batches, _ = some("plain")
    before = copy.deepcopy(supernet.model.state_dict())

    def noisy(model, inputs):
        inputs = {**inputs, "sample": inputs["sample"] + torch.randn_like(inputs["sample"])}
        model(**inputs, return_dict=False)

    state = torch.random.get_rng_state()
    correct_readers(supernet, batches, noisy, weights={0.7: 0, 0.85: 0})
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in supernet.model.state_dict().items():  # the original already gives what it gives
        assert torch.allclose(weight, before[name], atol=1e-6), name


def test_sizes_may_lack_the_full_one_and_may_drop_branches():
    supernet, batches, unseen = some("plain", (0.5, 0.7))
    whole, _, _ = some("plain")
    expected = output(whole.model, unseen)
    before = errors(supernet, expected, unseen)
    correct_readers(supernet, batches, call)
    after = errors(supernet, expected, unseen)
    assert supernet.size == 0.7 and all(after[size] < before[size] for size in supernet.sizes)

    dropping = make_dropping_supernet(make_unet("sd15"))
    inputs = [random_inputs(dropping.model, 4, seed) for seed in range(4)]
    expected = output(dropping.model, inputs[0])
    before = errors(dropping, expected, inputs[0])
    assert dropping.subnets[0].dropped
    correct_readers(dropping, inputs[1:], call, adapter_rank=2)
    after = errors(dropping, expected, inputs[0])
    assert all(after[size] < before[size] for size in dropping.sizes[:-1])


@pytest.mark.parametrize("name", ["plain", "DiTTransformer2DModel"])
def test_few_samples_do_no_harm(name):
    """The ridge is chosen on samples left out of the fit: what only a few of them ask for is not done."""
    inputs = {**some(name)[1][0]}
    two = {key: value[:2] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}

    def worse(ridge):
        supernet, _, unseen = some(name)
        before = errors(supernet, output(supernet.model, unseen), unseen)
        expected = output(supernet.model, unseen)
        left = correct_readers(supernet, [two], call, weights={1.0: 1}, ridge=ridge)
        after = errors(supernet, expected, unseen)
        return sum(after.values()) / sum(before.values()), left

    overfitted, chosen = worse(1e-6), worse(None)
    assert chosen[0] < 1 and chosen[0] < overfitted[0]
    # Fitted samples alone would tell the opposite.
    assert sum(overfitted[1].values()) < sum(chosen[1].values())


def test_one_sample_cannot_be_judged_by_others_and_changes_nothing():
    supernet, batches, _ = some("plain")
    before = copy.deepcopy(supernet.model.state_dict())
    one = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in batches[0].items()}
    left = correct_readers(supernet, [one], call, adapter_rank=2)
    assert set(left.values()) == {1.0} and not supernet.size_adapters
    assert all(torch.equal(weight, before[name]) for name, weight in supernet.model.state_dict().items())


def test_a_row_far_off_the_others_does_not_decide():
    """Such as those of a linear attention whose divisor comes close to zero."""
    torch.manual_seed(0)
    rows, wanted = torch.randn(200, 6), torch.randn(6, 3)
    found = []
    for outlier in (0.0, 1e6):
        equations = NormalEquations([torch.arange(6)], 6, 3, bias=True)
        output = torch.zeros(200, 3)
        output[7] = outlier
        equations.add(0, rows, rows @ wanted + 2, output, 1.0)
        found.append(equations.solve(1e-9))
    assert (
        relative_error(found[0][:-1], wanted.double()) < 1e-5 and relative_error(found[0][-1], torch.tensor(2)) < 1e-5
    )
    assert relative_error(found[1], found[0]) < 0.2


CONVOLUTIONS = [
    nn.Conv1d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False),
    nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    nn.Conv3d(3, 5, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
]


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), *CONVOLUTIONS])
def test_patches_times_the_weight_are_the_output(layer):
    shape = (2, 7, 4, 3) if isinstance(layer, nn.Linear) else (2, 3, *(7, 6, 5)[: layer.weight.ndim - 2])
    input = torch.randn(shape)
    result = layer(input)
    rows = result.reshape(2, -1, 5) if isinstance(layer, nn.Linear) else result.flatten(2).transpose(1, 2)
    bias = 0 if layer.bias is None else layer.bias
    assert torch.allclose(patches(layer, input) @ layer.weight.flatten(1).T + bias, rows.flatten(0, 1), atol=1e-5)
    chosen = torch.tensor([[3, 0, 2], [1, 2, 0]])  # of each sample
    expected = torch.cat([sample[own] for sample, own in zip(rows, chosen, strict=True)])
    assert torch.allclose(patches(layer, input, chosen) @ layer.weight.flatten(1).T + bias, expected, atol=1e-5)
    assert torch.equal(output_rows(layer, result, chosen), expected)


def test_bad_input_is_named_and_changes_nothing():
    supernet, batches, _ = some("plain")
    before = copy.deepcopy(supernet.model.state_dict())
    for options, message in [
        ({"ridge": 0}, "ridge is 0"),
        ({"adapter_rank": -1}, "adapter_rank is -1"),
        ({"readers_at_once": 0}, "readers_at_once is 0"),
        ({"weights": {0.3: 1}}, "0.3"),
        ({"weights": {0.7: -1}}, r"weights\[0.7\] is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            correct_readers(supernet, batches, call, **options)
    with pytest.raises(ValueError, match="read only once"):
        correct_readers(supernet, iter(batches), call)
    with pytest.raises(ValueError, match="no batch"):
        correct_readers(supernet, [], call)
    # Something breaks when half of the readers are corrected.
    calls: list[int] = []

    def breaking(model, inputs):
        calls.append(1)
        if len(calls) > 60:
            inputs = {**inputs, "sample": inputs["sample"] * float("nan")}
        model(**inputs, return_dict=False)

    with pytest.raises(ValueError, match="not finite"):
        correct_readers(supernet, batches, breaking, adapter_rank=2)
    assert supernet.size == 1.0 and not supernet.size_adapters
    for name, weight in supernet.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    correct_readers(supernet, batches, call, adapter_rank=2)
    with pytest.raises(ValueError, match="has an adapter already"):
        correct_readers(supernet, batches, call)
