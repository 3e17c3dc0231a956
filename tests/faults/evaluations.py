"""Evaluations in several processes, as a launcher would start them, but forked from one that has all of it imported."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from unittest import mock

from recipes.conftest import load_recipe
from recipes.test_evaluate import Means

from ofadiff.commands import command
from ofadiff.evaluation import register_extractor

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


def start(words: list[str], log: Path, processes: int = 2) -> list[multiprocessing.Process]:
    """Starts `recipes/evaluate.py` in processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [SERVER.Process(target=_evaluate, args=(words, log, rank, processes, port)) for rank in range(processes)]
    # The server looks there for what it imports once.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        for process in started:
            process.start()
    return started


def finish(words: list[str], log: Path, processes: int = 2) -> None:
    """Starts an evaluation and waits until it has come to its end."""
    started = start(words, log, processes)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes, log.read_text()


def _evaluate(words: list[str], log: Path, rank: int, processes: int, port: int) -> None:
    with log.open("a", buffering=1) as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()}, ACCELERATE_USE_CPU="true")
    register_extractor("means", Means())
    command.main(load_recipe("evaluate.py"), words)
