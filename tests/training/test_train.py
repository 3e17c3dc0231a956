import functools

import pytest
import torch
from diffusers.optimization import get_scheduler

from ofadiff.denoisers.prepare import prepare_pixels
from ofadiff.reweight import STRATEGIES
from training.tiny_run import make_supernet, make_teacher, train_with


@pytest.fixture
def run(data, noise_scheduler, make_accelerator, tmp_path):
    """Trains a fresh supernet for a few steps; options go to `train` or, by name, elsewhere."""

    def run(supernet=None, accelerator=None, optimizer=torch.optim.AdamW, lr=1e-3, **options):
        supernet = supernet or make_supernet()
        accelerator = accelerator or make_accelerator()
        settings = {"max_train_steps": 4, "train_batch_size": 4, "validation_samples": 8, "seed": 5}
        settings |= {"teacher": make_teacher(), "feature_distill_weight": 0.1, "output_dir": tmp_path}
        settings |= options
        optimizer = optimizer(supernet.model.parameters(), lr=lr)
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
        prepare = functools.partial(prepare_pixels, noise_scheduler=noise_scheduler)
        return supernet, train_with(supernet, data, prepare, optimizer, lr_scheduler, accelerator, **settings)

    return run


def same(left, right):
    right = right.model.state_dict()
    return all(torch.equal(value, right[name]) for name, value in left.model.state_dict().items())


def close(left, right, **tolerance):
    torch.testing.assert_close(left.model.state_dict(), right.model.state_dict(), **tolerance)


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_as_if_nothing_had_happened(run, make_accelerator, tmp_path):
    def kill(step):
        if step == 5:
            raise KilledError

    options = {"max_train_steps": 7, "checkpointing_steps": 2, "validation_steps": 5}

    def accelerator():
        return make_accelerator(gradient_accumulation_steps=2)

    whole, expected = run(make_supernet(dropout=0.2), accelerator(), output_dir=tmp_path / "whole", **options)
    with pytest.raises(KilledError):
        run(make_supernet(dropout=0.2), accelerator(), output_dir=tmp_path / "killed", on_validation=kill, **options)
    torch.rand(3)  # whatever else has drawn random numbers must not matter
    resumed, result = run(
        make_supernet(dropout=0.2),
        accelerator(),
        output_dir=tmp_path / "killed",
        resume_from=tmp_path / "killed" / "checkpoint-4",
        **options,
    )
    assert same(whole, resumed)
    assert result.history == expected.history and set(result.history) == {0, 5, 7}
    assert result.steps == 7
    untrained = make_supernet(dropout=0.2)
    assert not same(whole, untrained)


def test_a_step_trains_only_what_its_size_uses(run, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "smallest", lambda sizes, step, seed: sizes[0])
    before = make_supernet()
    # Plain gradient descent without averaging: a weight without a gradient stays as it was, to the bit.
    after, _ = run(optimizer=torch.optim.SGD, lr=0.1, strategy="smallest", ema_decay=0.0)
    widths = after.subnets["smallest"].widths
    for group in after.groups:
        kept = widths[group.name]
        assert kept < group.width
        for part in group.slices:
            old, new = (net.model.get_submodule(part.module).weight.detach() for net in (before, after))
            entries = (new - old).abs().movedim(0 if part.axis == "out" else 1, 0)
            change = part.per_unit(entries).reshape(group.width, -1).sum(1)
            assert (change[kept:] == 0).all() and (change[:kept] > 0).all(), part


def test_the_teacher_is_not_touched(run):
    teacher = make_teacher()
    run(teacher=teacher)
    expected = make_teacher().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_the_full_size_starts_at_the_teachers_loss_and_sizes_compare(run):
    _, result = run()
    start = result.history[0]
    assert start[1.0] == pytest.approx(result.teacher_loss, rel=1e-5)
    assert start[0.5] != start[0.75] != start[1.0]


@pytest.mark.slow
def test_training_lowers_the_loss_of_every_size(run):
    _, result = run(max_train_steps=40, train_batch_size=14, lr=3e-3, feature_distill_weight=0.0)
    assert all(result.history[40][size] < result.history[0][size] for size in (0.5, 0.75, 1.0))


@pytest.mark.parametrize("stratify", [False, True])
def test_accumulated_micro_steps_make_the_same_step(run, make_accelerator, stratify):
    options = {"optimizer": torch.optim.SGD, "lr": 0.1, "stratify_timesteps": stratify}
    whole, _ = run(**options)
    micro, _ = run(accelerator=make_accelerator(gradient_accumulation_steps=4), train_batch_size=1, **options)
    close(whole, micro, atol=1e-6, rtol=1e-4)


def test_stratified_noise_levels_train_otherwise_and_resume_only_as_they_were(run, tmp_path):
    options = {"checkpointing_steps": 2, "stratify_timesteps": True}
    whole, _ = run(output_dir=tmp_path / "run", **options)
    assert not same(whole, run()[0])
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert same(whole, run(output_dir=tmp_path / "run", resume_from=checkpoint, **options)[0])
    with pytest.raises(ValueError, match="its stratify_timesteps is True, this run's is False"):
        run(output_dir=tmp_path / "run", resume_from=checkpoint)


def test_gradient_checkpointing_makes_the_same_steps(run):
    options = {"optimizer": torch.optim.SGD, "lr": 0.1}
    plain, _ = run(**options)
    recomputing = make_supernet()
    recomputing.model.enable_gradient_checkpointing()
    close(plain, run(recomputing, **options)[0], atol=1e-6, rtol=1e-4)


def test_mixed_precision_leaves_a_plain_float32_model_in_eval_mode_at_full_size(run, make_accelerator):
    supernet, _ = run(accelerator=make_accelerator(mixed_precision="bf16"))
    assert "forward" not in vars(supernet.model)
    assert not supernet.model.training and supernet.size == 1.0
    assert {parameter.dtype for parameter in supernet.model.parameters()} == {torch.float32}


def test_where_the_average_is_kept_changes_nothing(run):
    assert same(run(offload_ema=True)[0], run()[0])


def test_a_teacher_in_half_precision_teaches_nearly_the_same(run):
    teacher = make_teacher().to(torch.bfloat16)
    _, half = run(teacher=teacher)
    _, full = run()
    assert half.teacher_loss == pytest.approx(full.teacher_loss, rel=0.01)
    assert half.history[4] == pytest.approx(full.history[4], rel=0.01)


def test_without_a_teacher_or_validation_images_there_is_nothing_to_report(run, data):
    _, result = run(teacher=None)
    assert result.teacher_loss is None and set(result.history) == {0, 4}


def test_the_callback_sees_averaged_weights(run):
    supernet, seen = make_supernet(), []
    final, _ = run(
        supernet,
        max_train_steps=3,
        on_validation=lambda step: seen.append((step, supernet.model.conv_in.weight.detach().clone())),
    )
    assert [step for step, _ in seen] == [0, 3]
    assert torch.equal(seen[-1][1], final.model.conv_in.weight)


def test_a_run_that_has_left_all_bounds_stops_with_advice(run):
    """Its steps are skipped, but its weights are lost: no later loss is finite."""
    options = {"lr": 1e30, "max_train_steps": 10, "max_grad_norm": 1e30, "max_skipped_steps": 3}
    with pytest.raises(
        RuntimeError, match=r"the loss is nan .* at step \d.*last of 3 such steps.*lower --learning_rate"
    ):
        run(optimizer=torch.optim.SGD, **options)


def test_an_unknown_strategy_stops_before_the_first_step(run):
    seen = []
    with pytest.raises(ValueError, match="accepted: spread, linear"):
        run(strategy="largest", on_validation=seen.append)
    assert not seen
