"""A recipe one of whose processes meets an error of its own: `failing_recipe.py RANKS RECIPE WORD …`."""

import os
import runpy
import sys

import ofadiff.data.order

if __name__ == "__main__":
    ranks = sys.argv[1].split(",")
    del sys.argv[:2]
    decode = ofadiff.data.order.hold_out

    def hold_out(*arguments):
        if os.environ["RANK"] in ranks:
            raise ValueError(f"the disk of process {os.environ['RANK']} is full")
        return decode(*arguments)

    ofadiff.data.order.hold_out = hold_out
    runpy.run_path(sys.argv[0], run_name="__main__")
