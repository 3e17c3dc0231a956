"""The command line: `ofadiff compress | heal | extract | evaluate | record | app | architectures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from cyclopts import App

from ofadiff.commands import command
from ofadiff.commands.architectures import write_architectures
from ofadiff.commands.compress import compress
from ofadiff.commands.evaluate import evaluate_checkpoint
from ofadiff.commands.extract import extract
from ofadiff.commands.heal import heal
from ofadiff.commands.page import open_page
from ofadiff.commands.record import record_calls

# A new command is one file and one line here.
COMMANDS: dict[str, Callable[..., Any]] = {
    "compress": compress,
    "heal": heal,
    "extract": extract,
    "evaluate": evaluate_checkpoint,
    "record": record_calls,
    "app": open_page,
    "architectures": write_architectures,
}


def make_app() -> App:
    """The application with all commands."""
    app = command.make_app("ofadiff", "Compress a pretrained diffusion model once, for every device.")
    app.version_flags, app.version = ("--version",), version("ofadiff")
    for name, function in COMMANDS.items():
        app.command(function, name=name)
    return app


def main(words: Sequence[str] | None = None) -> Any:
    """Runs the command that some words name, by default those of the command line."""
    command.main(make_app(), words)
