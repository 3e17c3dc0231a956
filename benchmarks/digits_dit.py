"""A small diffusion transformer, trained on the digits, compressed and measured as the demo does it with a UNet.

    python benchmarks/digits_dit.py --output_dir digits_dit

takes the demo's other flags too, and ends in `digits_dit/report.html`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "recipes" / "demo.py"

if __name__ == "__main__":
    command = [sys.executable, str(DEMO), "--denoiser", "dit", "--output_dir", "digits_dit", *sys.argv[1:]]
    sys.exit(subprocess.run(command).returncode)
