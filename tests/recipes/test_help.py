"""Every recipe is a command: it reads the command line, explains itself, and refuses what it does not know."""

import runpy

import pytest
from recipes.conftest import FUNCTIONS, ROOT


def run(name, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [f"recipes/{name}", *words])
    runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_explains_itself_and_refuses_what_it_does_not_know(name, monkeypatch, capsys):
    run(name, monkeypatch, "--help")
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: {name}") and "--output" in text and "--config FILE" in text
    with pytest.raises(SystemExit) as stop:
        run(name, monkeypatch, "--no_such_flag", "1")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"{name}: error: ") and error.count("\n") == 1


def test_every_recipe_is_tried():
    assert {path.name for path in (ROOT / "recipes").glob("*.py")} == FUNCTIONS.keys()
