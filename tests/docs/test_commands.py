"""Command lines of the pages are such as the commands themselves read: flags exist, values are valid, nothing runs."""

import ast
import importlib
import json
import re
import shlex

import pytest
import side_by_side
from commands.test_flags import FROZEN
from cyclopts import CycloptsError
from digits_dit import demo_words
from docs.snippets import BENCHMARKS, PAGES, Block, blocks, blocks_of, read
from recipes.conftest import load_recipe
from versions import skip_if_older

from ofadiff.commands.app import make_app
from ofadiff.commands.command import script

SHELL = ("", "bash")
LANGUAGES = (*SHELL, "python", "json")
BLOCKS = blocks(*PAGES, BENCHMARKS)


def parse(app, words):
    """Raises CycloptsError where words do not fit the flags, or a value is not valid."""
    app.parse_args(words, exit_on_error=False, print_error=False)


def python(words):
    """Parses what a recipe or a benchmark is given."""
    path, *words = words
    folder, _, name = path.rpartition("/")
    assert folder in ("recipes", "benchmarks"), f"{path}: no test knows how to read its flags"
    if path == "benchmarks/digits_dit.py":  # hands its flags on
        name, words = "demo.py", demo_words(words)
    if name == "demo.py" or folder == "recipes":
        return parse(load_recipe(name), words)
    try:
        module = importlib.import_module(f"benchmarks.{name[:-3]}")
    except ImportError as error:
        skip_if_older("diffusers", str(error.name))
        raise
    tree = ast.parse(read(path))
    calls = [each for each in ast.walk(tree) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)]
    for call in calls:
        if call.func.id == "script":
            return parse(script(getattr(module, call.args[0].id), path), words)
    if path == "benchmarks/emoji.py":
        return module.make_parser().parse_args(words)
    assert module.main is side_by_side.main
    side_by_side.main(lambda comparison: None, "", words)  # its flags are read, and nothing is compared


def make(words):
    targets = re.search(r"^\.PHONY: (.*)$", read("Makefile"), flags=re.MULTILINE)[1].split()
    assert set(words) <= set(targets), words


def pip(words):
    assert words[:2] == ["install", "-e"] and len(words) == 3, words
    extras = re.fullmatch(r"\.\[(.*)\]", words[2])[1].split(",")
    assert all(re.search(rf"^{extra} = \[", read("pyproject.toml"), flags=re.MULTILINE) for extra in extras), words


def apt(words):
    assert words == ["install", "fonts-noto-color-emoji"], words


def launched(words):
    """What accelerate starts."""
    assert words[0] == "launch", words
    return ["ofadiff", *words[3:]] if words[1:3] == ["-m", "ofadiff"] else ["python", *words[1:]]


PROGRAMS = {
    "make": make,
    "pip": pip,
    "apt-get": apt,
    "ofadiff": lambda words: parse(make_app(), words),
    "python": python,
}


def check(text):
    """Raises where a block holds a line that its program would not take."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["accelerate"]:
            words = launched(words[1:])
        if words:
            assert words[0] in PROGRAMS, f"no test knows what takes {line!r}"
            PROGRAMS[words[0]](words[1:])


def test_every_block_says_in_what_it_is_written():
    assert not [block for block in BLOCKS if block.language not in LANGUAGES]


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS])
def test_command_lines_are_read(page):
    for block in BLOCKS:
        if block.page == page and block.language in SHELL:
            check(block.text)
        elif block.page == page and block.language == "json":
            assert all(json.loads(line) for line in block.text.splitlines())


COMPRESS = "ofadiff compress --pretrained_model_name_or_path a --output_dir b"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (f"{COMPRESS} --size 0.5", CycloptsError),
        (f"{COMPRESS} \\\n    --sizes 0.5 1.5", CycloptsError),
        (f"{COMPRESS} --budget money", CycloptsError),
        ("accelerate launch -m ofadiff compress --output_dir b", CycloptsError),
        ("accelerate launch recipes/compress_sd.py --pretrained_model_name_or_path a --output_dir", CycloptsError),
        ("python benchmarks/latency.py --size 3", SystemExit),
        ("python benchmarks/quality.py --seed 0", CycloptsError),
        ("make coffee", AssertionError),
        ("curl example.org", AssertionError),
        ('pip install -e ".[training]"', AssertionError),
    ],
)
def test_a_line_that_would_not_be_taken_is_found(line, error):
    with pytest.raises(error):
        check(line)
    check(f"{COMPRESS} --sizes 0.5 1.0  # as it should be")


def test_blocks_are_found_wherever_they_stand():
    text = "# A\n```python\nx = 1\n```\n- b\n\n  ```bash\n  make c\n  ```\n## D\n~~~\ne\n~~~\n"
    assert blocks_of("p", text) == [
        Block("p", "A", "python", "x = 1\n"),
        Block("p", "A", "bash", "  make c\n"),
        Block("p", "D", "", "e\n"),
    ]


def test_flags_in_the_text_exist():
    frozen = {line.split()[-1] for line in FROZEN.read_text(encoding="utf-8").splitlines()}
    for page in PAGES:
        code = re.findall(r"`([^`\n]+)`", read(page))
        named = {flag for each in code for flag in re.findall(r"--[a-z][\w-]*", each)}
        assert named <= frozen | {"--help", "--config", "--debug"}, page
