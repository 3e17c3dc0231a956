"""Measures every size of an OFA checkpoint and writes one report.

    accelerate launch recipes/evaluate.py --checkpoint OFA_DIR --teacher DIR --reference_dir IMAGES --output_dir OUT

makes `OUT/report.html` (one file that needs nothing else), `report.md`, `report.json`, `samples.png` and
`quality_vs_size.png`, and keeps the images it measured in `OUT/samples`. Run again after a kill, it goes on from those.
A plain diffusers pipeline folder, such as an extracted size, can be measured too. A text-to-image model needs
`--prompts_file FILE`, and gets a CLIP score. `ofadiff evaluate` is the same.
"""

from ofadiff.commands.command import main, script
from ofadiff.commands.evaluate import evaluate_checkpoint

if __name__ == "__main__":
    main(script(evaluate_checkpoint, __file__))
