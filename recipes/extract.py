"""Cuts sizes out of an OFA checkpoint: a plain diffusers pipeline folder for each.

    python recipes/extract.py --checkpoint OFA_DIR --sizes 0.5 0.75 --output_dir OUT

makes `OUT/size-0.5` and `OUT/size-0.75`. Each reads only its own part of the checkpoint, has its size's adapter merged
if there is one, and loads with `DiffusionPipeline.from_pretrained` after `import ofadiff`. `ofadiff extract` is the
same.
"""

from ofadiff.commands.command import main, script
from ofadiff.commands.extract import extract

if __name__ == "__main__":
    main(script(extract, __file__))
