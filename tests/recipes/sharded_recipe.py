"""A recipe under FSDP on CPUs: `sharded_recipe.py RECIPE WORD …` on several processes."""

import runpy
import sys

from accelerate import DistributedType, PartialState
from training.fsdp_on_cpu import make_sharded_accelerator

import ofadiff.runs.checks

if __name__ == "__main__":
    del sys.argv[0]
    ofadiff.runs.checks.Accelerator = make_sharded_accelerator
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert PartialState._shared_state["distributed_type"] == DistributedType.FSDP
