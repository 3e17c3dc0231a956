"""The schedule of sizes that is found for a budget."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from conftest import make_supernet
from diffusers import DDIMScheduler, DDPMPipeline, StableDiffusionImg2ImgPipeline, UNet2DModel
from tiny_pipelines import PICTURE, load, make_checkpoint

from ofadiff import OFAPipeline, SizeSchedule, find_schedule
from ofadiff.pipelines.schedule_search import _Steps, best_sizes

SIZES = (0.6, 0.8, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels") / "ofa"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()
    make_supernet(unet, sizes=SIZES)
    DDPMPipeline(unet, DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder):
    return OFAPipeline.from_pretrained(folder)


def search(pipeline, budget, **options):
    return find_schedule(pipeline, [{"batch_size": 2}] * 2, budget, 5, progress=False, **options)


def test_the_solution_is_the_best_of_all_within_the_budget():
    draw = random.Random(0)
    sizes = (0.4, 0.6, 1.0)
    for _ in range(20):
        errors = [{size: draw.random() * (1.1 - size) for size in sizes} for _ in range(6)]
        costs = [{size: size * draw.choice((1, 2)) for size in sizes} for _ in range(6)]
        budget = sum(draw.uniform(0.4, 1.5) for _ in range(6))
        cheapest = sum(min(each.values()) for each in costs)
        if cheapest > budget:
            with pytest.raises(ValueError, match="less than the cheapest sizes cost"):
                best_sizes(errors, costs, budget)
            continue
        every = [
            (sum(own[size] for own, size in zip(errors, chosen, strict=True)), chosen)
            for chosen in itertools.product(sizes, repeat=6)
            if sum(own[size] for own, size in zip(costs, chosen, strict=True)) <= budget
        ]
        found = best_sizes(errors, costs, budget)
        assert sum(own[size] for own, size in zip(errors, found, strict=True)) == pytest.approx(min(every)[0])


@pytest.mark.parametrize("budget", [0.65, 0.85, 1.0])
def test_it_keeps_the_budget_and_reports_what_its_calls_cost(pipeline, budget):
    before = pipeline.size
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    schedule = search(pipeline, budget)
    assert torch.equal(torch.random.get_rng_state(), state) and pipeline.size == before
    measured = schedule.measured
    counted = []
    table = {subnet.size: subnet.macs for subnet in pipeline.subnets}
    pipeline.unet.register_forward_hook(lambda *call: counted.append(table[pipeline.size]))
    pipeline(size=schedule, num_inference_steps=5)
    assert measured["cost"] == pytest.approx(np.mean(counted) / table[1.0]) and measured["cost"] <= budget
    assert set(measured["constants"]) == {"0.6", "0.8", "1"} and measured["constants"]["1"]["distance"] == 0
    if budget == 1.0:
        assert set(schedule) == {1.0} and measured["distance"] == 0
    else:
        assert 0 < measured["distance"] <= measured["constants"]["0.6"]["distance"]
        assert measured["ratio"] == measured["distance"] / measured["constant_distance"]


def test_it_is_kept_by_name_and_adapts_to_other_numbers_of_steps(pipeline, tmp_path):
    schedule = search(pipeline, 0.85)
    pipeline.set_schedule("fast", schedule)
    pipeline.save_pretrained(tmp_path)
    again = OFAPipeline.from_pretrained(tmp_path)
    assert again.schedules == {"fast": schedule} and again.schedules["fast"].measured == schedule.measured
    options = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    expected = pipeline(size=schedule, **options).images
    options["generator"].manual_seed(0)
    assert np.array_equal(again(size="fast", **options).images, expected)
    again(size="fast", num_inference_steps=3)
    with pytest.raises(ValueError, match=r"size is 'slow'; it must be one of 0\.6, 0\.8, 1, 'smallest', .*'fast'"):
        again(size="slow")
    for name in ("", "largest", 3):
        with pytest.raises(ValueError, match="cannot have the name"):
            again.set_schedule(name, schedule)
    with pytest.raises(ValueError, match=r"size is 0\.7"):
        again.set_schedule("other", SizeSchedule([0.7]))
    again.set_schedule("fast", None)
    assert not again.schedules
    one = OFAPipeline.from_pretrained(tmp_path, size=0.6)
    with pytest.raises(ValueError, match="one size alone"):
        one.set_schedule("fast", schedule)
    path = tmp_path / "unet" / "ofa_config.json"
    values = json.loads(path.read_text())
    for broken in ([1], {"fast": [0.6]}, {"fast": {"sizes": ["0.6"]}}, {"fast": {"sizes": [0.7]}}):
        path.write_text(json.dumps({**values, "schedules": broken}))
        with pytest.raises(ValueError, match=r"schedule|size is"):
            OFAPipeline.from_pretrained(tmp_path)


def test_a_latency_is_a_budget_too(pipeline):
    schedule = search(pipeline, 1.0, unit="latency")
    assert schedule.measured["cost"] <= 1 and set(schedule) <= set(SIZES)


def test_evaluations_are_a_budget_too(pipeline):
    by_share, by_count = search(pipeline, 0.85), search(pipeline, 0.85 * 5, unit="evaluations")
    assert [*by_share] == [*by_count] and by_count.measured["budget"] == 0.85 * 5
    assert by_count.measured["evaluations"] == pytest.approx(5 * by_share.measured["cost"])
    with pytest.raises(ValueError, match=r"budget is 6 evaluations, and a call has 5; give at most that"):
        search(pipeline, 6, unit="evaluations")


def test_steps_that_image_to_image_leaves_out_cost_nothing(tmp_path):
    base = load(make_checkpoint(tmp_path / "sd"))
    made = OFAPipeline.from_pipe(base, StableDiffusionImg2ImgPipeline)
    arguments = {"prompt": "a b", "image": PICTURE, "strength": 0.5}
    schedule = find_schedule(made, [arguments], 0.8, 4, progress=False)
    table = {subnet.size: subnet.macs for subnet in made.subnets}
    counted = []
    made.unet.register_forward_hook(lambda *call: counted.append(table[made.size]))
    made.set_progress_bar_config(disable=True)
    made(**arguments, num_inference_steps=4, size=schedule)
    assert len(counted) == 2 and np.mean(counted) / table[1.0] == pytest.approx(schedule.measured["cost"])
    assert len(schedule) == 4 and schedule.measured["cost"] <= 0.8


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_images_that_are_not_finite_are_said_to_be(pipeline):
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the images of SizeSchedule\(.*\) or of the largest size have values that"):
        search(pipeline, 0.8)


def test_steps_with_more_forwards_weigh_more():
    steps = _Steps(3, [(1, "unet"), (1, "unet"), (2, "unet")], {"unet": {0.5: 5, 1.0: 10}})
    assert steps.visited == [1, 2] and steps.cost([1.0, 0.5, 1.0]) == pytest.approx(2 / 3)
    # Of two denoisers each costs what it costs itself.
    both = _Steps(2, [(0, "one"), (1, "other")], {"one": {0.5: 6, 1.0: 10}, "other": {0.5: 8, 1.0: 30}})
    assert [both.cost(sizes) for sizes in ([0.5, 1.0], [1.0, 0.5])] == [36 / 40, 18 / 40]
    assert both.costs == {0.5: 14 / 40, 1.0: 1.0}


def test_bad_input_is_one_sentence_before_anything_is_sampled(pipeline, folder, monkeypatch):
    one = OFAPipeline.from_pretrained(folder, size=0.6)
    monkeypatch.setattr(type(pipeline.unet), "forward", None)
    for budget, options, message in [
        (0, {}, "budget is 0; it must be above 0"),
        (1.2, {}, r"budget is 1\.2"),
        (True, {}, "budget is True"),
        ("0.6", {}, r"budget is '0\.6'; it must be above 0"),
        (float("nan"), {}, "budget is nan"),
        (None, {"unit": "evaluations"}, "budget is None; it must be a number of evaluations"),
        (0.1, {}, r"budget is 0\.1, and the cheapest size, 0\.6, costs"),
        (0, {"unit": "evaluations"}, "budget is 0; it must be a number of evaluations above 0"),
        (0.8, {"unit": "watts"}, "unit is 'watts'"),
        (0.8, {"arguments": {"prompt": "a"}}, "'prompt', which DDPMPipeline does not take"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(pipeline, budget, **options)
    with pytest.raises(ValueError, match="call 1 has the argument 'size'"):
        find_schedule(pipeline, [{"size": 0.6}], 0.8)
    with pytest.raises(ValueError, match="one size alone"):
        search(one, 0.8)
    for other in (pipeline.extract(0.6), DDPMPipeline.from_pretrained(folder)):
        with pytest.raises(ValueError, match="the pipeline, of DDPMPipeline, has no sizes; pass what OFAPipeline"):
            search(other, 0.8)
    with pytest.raises(ValueError, match="call 1 has a generator"):
        find_schedule(pipeline, [{"generator": torch.Generator()}], 0.8)
