"""A function as a command: its bundles are flags, what the user got wrong is one sentence."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from cyclopts import App, CycloptsError, Parameter, ValidationError
from cyclopts.config import Yaml

from ofadiff.commands.processes import end_by_signal, preemption_as_ctrl_c, who_fails
from ofadiff.storage.finite import NotFiniteError

EPILOGUE = (
    "`--config FILE` reads flags from a YAML file of `flag: value` lines; flags on the command line win. "
    "`--debug` shows where an error comes from."
)

# What a user can get wrong, or a machine lack.
MISTAKES = (CycloptsError, ImportError, OSError, ValueError, MemoryError, torch.OutOfMemoryError, NotFiniteError)

# What a shell says of a process that wrote to a pipe whose reader was gone: 128 + SIGPIPE.
NOBODY_READS = 141


def _as_it_is(name: str) -> str:
    """Flags have the names of their fields, as in diffusers' examples."""
    return name


def make_app(name: str, help: str | None = None) -> App:
    """An application whose flags are named as their fields, and lists take several words."""
    parameter = Parameter(name_transform=_as_it_is, negative_bool=(), negative_iterable=(), consume_multiple=True)
    return App(
        name=name,
        help=help,
        default_parameter=parameter,
        help_epilogue=EPILOGUE,
        version_flags=[],
        suppress_keyboard_interrupt=False,
    )


def call(app: App, words: Sequence[str]) -> Any:
    """Calls the command that some words name, and returns what it does.

    Raises:
        CycloptsError: If the words do not fit its flags.
        ValueError: If there is no `--config` file.
    """
    words, path = [word for word in words if word != "--debug"], None
    for index, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            rest = words[index + 1 : index + 2] if word == "--config" else [word.partition("=")[2]]
            path, words = "".join(rest), [*words[:index], *words[index + 1 + (word == "--config") :]]
            break
    if path == "":
        raise ValueError("--config needs a file")
    if path is not None and not Path(path).is_file():
        raise ValueError(f"cannot read --config {path}: there is no such file")
    if path is not None:
        check_yaml(path)
    app.config = () if path is None else (Yaml(path, use_commands_as_keys=False),)
    return app(words, exit_on_error=False, print_error=False, result_action="return_value")


def check_yaml(path: str) -> None:
    """Raises ValueError unless a file is YAML with flags and their values."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"cannot read --config {path}: it is no YAML: {error}") from error
    if not (values is None or isinstance(values, dict)):
        raise ValueError(f"cannot read --config {path}: it holds a {type(values).__name__}, not lines of `flag: value`")
    for name, value in (values or {}).items():
        # No more than that: a list of lists of lists, each named once, has more values than any memory.
        nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)
        )
        if not isinstance(name, str) or nested:
            what = "a value that is nested" if isinstance(name, str) else "a name that is no word"
            raise ValueError(
                f"cannot read --config {path}: {name} has {what}; lines are `flag: value`, or a list of values"
            )


def main(app: App, words: Sequence[str] | None = None) -> Any:
    """A command from the command line; ends the process with status 2 and one sentence where a user got it wrong.

    After a signal the status is 128 and its number: 130 after Ctrl-C, 143 after SIGTERM; 141 where nobody reads what it
    prints.

    Args:
        app: With one command or several.
        words: By default those of the command line.
    """
    words = sys.argv[1:] if words is None else list(words)
    try:
        with preemption_as_ctrl_c():
            result = call(app, words)
            sys.stdout.flush()
            return result
    except BrokenPipeError as error:
        if not close_unread_outputs():
            fail(app.name[0], error)
        raise SystemExit(NOBODY_READS) from None
    except MISTAKES as error:
        if "--debug" in words:
            raise
        fail(app.name[0], error)
    except KeyboardInterrupt as stop:
        if "--debug" in words:
            raise
        end_by_signal(app.name[0], stop)


def close_unread_outputs() -> bool:
    """Whether standard output or errors go to a pipe that nobody reads, as behind `| head`; they lead nowhere then.

    Otherwise Python would complain once more when it ends.
    """
    unread = False
    for stream in (sys.stdout, sys.stderr):
        if stream.closed or not _nobody_reads(stream.fileno()):
            continue
        unread = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return unread


def _nobody_reads(file: int) -> bool:
    poll = select.poll()
    poll.register(file, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(name: str, error: Exception) -> NoReturn:
    """Ends the process with what was wrong, in one sentence; of several processes the first one speaks."""
    print(f"{name}: error: {who_fails()}{sentence(error)}", file=sys.stderr)
    raise SystemExit(2)


def sentence(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, ValidationError) and error.argument is not None and error.exception_message:
        return f"{error.argument.name}: {error.exception_message}"
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory for what was asked"
    return " ".join(str(error).split()) or type(error).__name__


def script(function: Callable[..., Any], path: str) -> App:
    """The application of a recipe: one function, called as its file is."""
    app = make_app(Path(path).name, function.__doc__)
    app.default(function)
    return app
