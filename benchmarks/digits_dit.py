"""A small diffusion transformer, trained on the digits, compressed and measured as the demo does it with a UNet.

    python benchmarks/digits_dit.py --output_dir digits_dit

takes the demo's other flags too, and ends in `digits_dit/report.html`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "recipes" / "demo.py"


def demo_words(words: list[str]) -> list[str]:
    """The demo's command line; a flag may be given once."""
    folder = [] if any(word.startswith("--output_dir") for word in words) else ["--output_dir", "digits_dit"]
    return ["--denoiser", "dit", *folder, *words]


if __name__ == "__main__":
    sys.exit(subprocess.run([sys.executable, str(DEMO), *demo_words(sys.argv[1:])]).returncode)
