"""The recipes refuse what means nothing, before anything is loaded; processes fail and score together."""

import re

import pytest
import torch
from recipes.conftest import load_recipe
from recipes.test_compress_ddpm import files, flags, run  # noqa: F401

from ofadiff import Supernet
from ofadiff.commands import command
from ofadiff.runs import (
    Calls,
    Captions,
    Classes,
    Compression,
    Data,
    Losses,
    Model,
    OneSize,
    Optimization,
    Output,
    Watching,
)
from ofadiff.runs.checks import COMPARED_ELSEWHERE, MAY_CHANGE
from ofadiff.runs.settings import RunSettings

pytestmark = pytest.mark.slow

BUNDLES = (Calls, Captions, Classes, Compression, Data, Losses, Optimization, Watching)


@pytest.mark.parametrize(
    ("flag", "wrong", "where"),
    [
        ("learning_rate", "0", "greater than 0"),
        ("learning_rate", "nan", "greater than 0"),
        ("adam_beta1", "1", r"in \[0, 1\)"),
        ("adam_beta2", "-0.1", r"in \[0, 1\)"),
        ("adam_epsilon", "0", "greater than 0"),
        ("adam_weight_decay", "-1", "of at least 0"),
        ("ema_decay", "1", r"in \[0, 1\)"),
        ("max_grad_norm", "0", "greater than 0"),
        ("distill_weight", "-1", "of at least 0"),
        ("feature_distill_weight", "inf", "of at least 0"),
        ("importance_loss_threshold", "1", r"in \[0, 1\)"),
        ("reweight_m", "0", "greater than 0"),
        ("snr_gamma", "0", "greater than 0"),
        ("noise_offset", "-1", "of at least 0"),
        ("max_unreadable_fraction", "2", r"in \[0, 1\]"),
    ],
)
def test_numbers_without_meaning_are_refused(capsys, flag, wrong, where):
    line = ["--pretrained_model_name_or_path", "a", "--output_dir", "b", f"--{flag}={wrong}"]
    with pytest.raises(SystemExit):
        command.main(load_recipe("compress_sd.py"), line)
    assert re.search(f"--{flag}: '{wrong}' is not a number {where}", capsys.readouterr().err)
    bundle = next(each for each in BUNDLES if flag in each.__dataclass_fields__)
    with pytest.raises(ValueError, match=f"--{flag}: '{wrong}' is not a number {where}"):  # from Python too
        bundle(**{flag: float(wrong)})


def test_every_flag_either_may_change_or_is_compared():
    """Those that may change are named; a new flag is compared unless it is put there."""
    every = {name for bundle in (*BUNDLES, Model, OneSize, Output) for name in bundle.__dataclass_fields__}
    assert {*MAY_CHANGE, *COMPARED_ELSEWHERE} <= every
    assert {"learning_rate", "adam_weight_decay", "random_flip", "mixed_precision"} <= every - {*MAY_CHANGE}
    settings = RunSettings(Model(pretrained_model_name_or_path="a"), Data(), Output(output_dir="b"))
    assert settings.flags().keys() == every - OneSize.__dataclass_fields__.keys()


def test_a_resumed_run_honours_what_may_change_and_refuses_the_rest(run, tmp_path):  # noqa: F811
    run()
    out = tmp_path / "out"
    changes = {"learning_rate": 1e-3, "adam_weight_decay": 0.1, "ema_decay": 0.5, "random_flip": True}
    for name, value in changes.items():
        message = rf"its --{name} is .*, not {value}; a resumed run is the same run, only .*max_train_steps"
        with pytest.raises(ValueError, match=message):
            run(resume_from_checkpoint="latest", **{name: value})
    with pytest.raises(ValueError, match=r"checkpoint-9 is not a checkpoint .* there is checkpoint-2"):
        run(resume_from_checkpoint="checkpoint-9")
    result = run(resume_from_checkpoint="checkpoint-2", checkpointing_steps=5, max_train_steps=5)
    assert result.steps == 5 and (out / "checkpoint-5").is_dir() and not (out / "checkpoint-4").exists()


def test_options_of_equation_6_and_of_the_criterion_arrive(run, tmp_path):  # noqa: F811
    run(reweight_m=7, importance_loss_threshold=0.5)
    made = Supernet.from_pretrained(tmp_path / "out" / "unet").provenance
    assert made["m"] == 7 and made["loss_threshold"] == 0.5
    with pytest.raises(ValueError, match=r"its m is 7.0, this run's is 2.0|its m is 7"):
        run(reweight_m=2, importance_loss_threshold=0.5, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="--reweight uniform takes no option 'm'"):
        run(reweight="uniform", reweight_m=2, output_dir=tmp_path / "b")
    with pytest.raises(ValueError, match="--criterion random takes no option 'loss_threshold'"):
        run(criterion="random", importance_loss_threshold=0.5, output_dir=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_classes_of_folders(run, files, tmp_path, capsys):  # noqa: F811
    """Folders 0, 1 and 2 are the model's classes; names that are fewer than its classes say nothing."""
    conditional = {"pretrained_model_name_or_path": files / "conditional", "max_train_steps": 0}
    run(**conditional)
    assert "Classes: 0 = 0, 1 = 1, 2 = 2" in capsys.readouterr().out
    for name, folders, message in (
        ("two", ["cat", "dog"], "the images have 2 classes, cat, dog, and the model 3; name the folders by"),
        ("high", ["1", "7"], "label 7 of the images is not one of the model's 3 classes"),
        ("loose", ["0", "."], r"put each class in a subfolder, named by its number; .*loose/./x.png lies in none"),
    ):
        for folder in folders:
            target = tmp_path / name / folder / "x.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((files / "images" / "0" / "0.png").read_bytes())
        with pytest.raises(ValueError, match=message.replace("/./", "/")):
            run(train_data_dir=tmp_path / name, output_dir=tmp_path / "refused", **conditional)


def test_fewer_scoring_images_than_processes(run, fork, flags, tmp_path):  # noqa: F811
    """One image is scored by one of two processes; both get its scores, as one process does."""
    options = {"importance_samples": 1, "correction_samples": 1, "max_train_steps": 0, "validation_samples": 1}
    ended, log = fork("compress_ddpm.py", flags(output_dir=tmp_path / "two", **options))
    assert ended == [0, 0], log
    run(output_dir=tmp_path / "one", **options)
    one, other = (Supernet.from_pretrained(tmp_path / name / "unet") for name in ("one", "two"))
    assert one.subnets == other.subnets
    assert all(torch.equal(one.basis[name], other.basis[name]) for name in one.basis)


@pytest.mark.parametrize(
    ("ranks", "said"), [("1", "process 1: the disk of process 1 is full"), ("0,1", "the disk of process 0 is full")]
)
def test_an_error_of_any_process_is_said_once_and_ends_all(launch, flags, ranks, said):  # noqa: F811
    """As a launcher has it, which ends the others when one has failed."""
    failing = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    failing += [__file__.replace("test_meaning", "failing_recipe"), ranks]
    done = launch("compress_ddpm.py", flags(), failing, ACCELERATE_USE_CPU="true")
    errors = [line for line in done.stderr.splitlines() if "is full" in line]
    assert done.returncode != 0 and len(errors) == 1 and errors[0].endswith(f"error: {said}")
