"""What the learning rate does, and how far the average of the weights reaches, where neither was asked for."""

from dataclasses import replace
from pathlib import Path

import pytest

from ofadiff.runs.checks import with_schedule
from ofadiff.runs.settings import Data, Model, OneSize, Optimization, Output, RunSettings
from ofadiff.training.checkpoint import check_same_run, read_state

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "written_before_the_move" / "run" / "checkpoint-2"


def settings(steps=1000, **options):
    return RunSettings(
        Model(pretrained_model_name_or_path="model"),
        Data(train_data_dir="images"),
        Output(output_dir="out"),
        optimization=Optimization(max_train_steps=steps, **options),
    )


def chosen(asked, checkpoint=None):
    optimization = with_schedule(asked, checkpoint).optimization
    return optimization.lr_scheduler, optimization.ema_decay


def test_all_sizes_have_a_line_to_zero_and_one_size_a_cosine():
    assert chosen(settings())[0] == "linear"
    one = replace(settings(), one_size=OneSize(size=0.5))
    assert chosen(one)[0] == "cosine"


@pytest.mark.parametrize("steps", [100, 1000, 50_000])
def test_the_average_reaches_over_a_twentieth_of_the_steps(steps):
    decay = chosen(settings(steps))[1]
    assert 1 / (1 - decay) == pytest.approx(steps / 20)


def test_the_average_is_never_longer_than_ten_thousand_steps_and_long_where_the_rate_stays():
    assert chosen(settings(10**6))[1] == 0.9999
    assert chosen(settings(lr_scheduler="constant_with_warmup")) == ("constant_with_warmup", 0.9999)
    assert chosen(settings(steps=3))[1] == 0  # the last weights themselves
    assert 0 <= chosen(settings(steps=0))[1] < 1


def test_what_was_asked_for_stays():
    assert chosen(settings(lr_scheduler="cosine", ema_decay=0.5)) == ("cosine", 0.5)


def test_a_run_begun_before_goes_on_with_its_cosine_and_its_average():
    assert chosen(settings(), CHECKPOINT) == ("cosine", 0.9999)


def test_noise_levels_are_stratified_but_where_a_run_was_begun_without():
    assert with_schedule(settings(), None).losses.stratify_timesteps is True
    assert with_schedule(replace(settings(), one_size=OneSize(size=0.5)), None).losses.stratify_timesteps is True
    assert with_schedule(settings(), CHECKPOINT).losses.stratify_timesteps is False
    run = read_state(CHECKPOINT, "run")["run"]
    check_same_run(CHECKPOINT, {**run, "stratify_timesteps": False})
    with pytest.raises(ValueError, match="its stratify_timesteps is False, this run's is True"):
        check_same_run(CHECKPOINT, {**run, "stratify_timesteps": True})
