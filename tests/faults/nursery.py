"""Starts recipes in processes of their own, forked from this one, which has imported all that they need: seconds count.

Reads a JSON line for each start and answers with the process ids, and again with how they ended. A process is told to
wait at a moment by the name of a function of the library: at the n-th call of it, it makes a file and waits until that
is gone, or the process is killed from outside.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch.utils.tensorboard
from diffusers import DDPMPipeline, StableDiffusionPipeline  # noqa: F401  loads what it imports late
from training.fsdp_on_cpu import make_sharded_accelerator

import ofadiff.commands.compress
import ofadiff.runs.checks

RECIPES = Path(__file__).parents[2] / "recipes"


def wait_at(moment, count, reached):
    """Lets the process wait at the n-th call of a function."""
    module, _, name = moment.rpartition(".")
    module = importlib.import_module(module)
    function, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            Path(reached).touch()
            while Path(reached).exists():
                time.sleep(0.005)
        return function(*arguments, **options)

    setattr(module, name, call)


def become(order, rank):
    """What a new process does: runs the recipe as `python recipes/… WORDS` would."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"]), "ACCELERATE_USE_CPU": "true"}
    if order["sharded"]:
        ofadiff.runs.checks.Accelerator = make_sharded_accelerator
    if order["moment"] is not None and rank == 0:
        wait_at(*order["moment"], order["reached"])
    torch.set_num_threads(1)
    # As a shell starts it, whatever this process was told to ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = [str(RECIPES / order["recipe"]), *order["words"]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main():
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order, children = json.loads(line), []
        for rank in range(order["processes"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    become(order, rank)
                    code = 0
                except SystemExit as end:
                    code = end.code or 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main()
