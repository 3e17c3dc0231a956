"""Writes docs/architectures.md: which denoisers of the installed diffusers can be compressed, and how far.

    python recipes/architectures.py --output docs/architectures.md

`ofadiff architectures` is the same.
"""

from ofadiff.commands.architectures import write_architectures
from ofadiff.commands.command import main, script

if __name__ == "__main__":
    main(script(write_architectures, __file__))
