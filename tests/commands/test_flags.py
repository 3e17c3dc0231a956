"""Flags: frozen, explained, the same from a command line, a file and Python."""

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclopts import CycloptsError
from recipes.conftest import FUNCTIONS, load_recipe

from ofadiff.commands import architectures, evaluate, extract, page
from ofadiff.commands.app import COMMANDS, make_app
from ofadiff.commands.command import call
from ofadiff.denoisers.kind import CAPTIONS
from ofadiff.denoisers.table import trainable_kinds
from ofadiff.runs import Compression, Data, Model, OneSize, Optimization, Output, RunSettings, settings

FROZEN = Path(__file__).parent / "flags.txt"


def flags_of(command, parent=None):
    """Names of the flags of a command."""
    parameter = (parent or command).default_parameter
    arguments = command.assemble_argument_collection(default_parameter=parameter)
    return sorted({name for each in arguments if each.parse and not each.children for name in each.names})


def listing():
    """Every flag of every command and recipe, a line each."""
    app = make_app()
    found = {f"ofadiff {name}": flags_of(app[name], app) for name in COMMANDS}
    for recipe in FUNCTIONS:
        loaded = load_recipe(recipe)
        command = loaded.default_command
        assert command is not None
        found[recipe] = flags_of(loaded)
    return "".join(f"{command} {flag}\n" for command, flags in found.items() for flag in flags)


def test_adding_a_flag_is_a_decision():
    """To add one, add its line to flags.txt, which this prints where they differ."""
    assert listing() == FROZEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [settings, architectures, evaluate, extract, page])
def test_every_flag_is_explained(module):
    for node in ast.parse(inspect.getsource(module)).body:
        decorators = getattr(node, "decorator_list", [])
        if isinstance(node, ast.ClassDef) and any("Parameter" in ast.unparse(each) for each in decorators):
            for field, help in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    explained = isinstance(help, ast.Expr) and isinstance(help.value, ast.Constant) and help.value.value
                    assert explained, f"{node.name}.{field.target.id}"


def test_help_lists_every_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = make_app()
    call(app, ["compress", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags_of(app["compress"], app))
    assert "[default: 16]" in text and "--config FILE" in text


def test_the_version_is_said(capsys):
    call(make_app(), ["--version"])
    assert capsys.readouterr().out.strip() == version("ofadiff")


def test_what_is_not_asked_for_has_the_default_of_the_kind():
    """Runs that were asked for less are asked for the same when they are resumed by a later version."""
    assert {kind.training_defaults.get("resolution") for kind in trainable_kinds(CAPTIONS)} == {512}
    asked = RunSettings(Model(pretrained_model_name_or_path="a"), Data(validation_fraction=0.0), Output(output_dir="b"))
    made = asked.with_defaults({"validation_fraction": 0.5, "learning_rate": 1.0, "train_batch_size": 3})
    assert made.data.validation_fraction == 0.0 and made.optimization.learning_rate == 1.0
    assert made.optimization.train_batch_size == Optimization().train_batch_size
    assert made.flags()["learning_rate"] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compression(sizes=()), "--sizes: there has to be at least one value"),
        (lambda: Compression(sizes=(0.5, 0.0)), "--sizes: '0' is not a size; sizes are fractions"),
        (lambda: Compression(budget="money"), "--budget: 'money' is none of params, macs"),
        (lambda: Optimization(train_batch_size=0), "--train_batch_size: '0' is not a whole number of at least 1"),
        (lambda: OneSize(size=1.5), r"--size: '1.5' is not a size"),
        (lambda: Optimization(mixed_precision="fp8"), "--mixed_precision: 'fp8' is none of no, fp16, bf16"),
    ],
)
def test_bundles_are_checked_whoever_makes_them(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert OneSize(size="smallest").size == "smallest"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compress --output_dir b", "--pretrained_model_name_or_path requires"),
        ("compress --pretrained_model_name_or_path a --output_dir b --learning_rat 1", "Unknown option.*learning_rat"),
        ("compress --pretrained_model_name_or_path a --output_dir b --sizes", "--sizes.*at least one value"),
        ("compress --pretrained_model_name_or_path a --output_dir b --max_train_steps 1.5", "'1.5' is not a whole"),
        ("heal --pretrained_model_name_or_path a --output_dir b --size tiny", "--size.*tiny"),
        ("shrink", "Unknown command.*compress"),
    ],
)
def test_a_wrong_line_is_an_error(line, message):
    with pytest.raises(CycloptsError, match=message):
        call(make_app(), line.split())
