"""Writes docs/architectures.md: which denoisers of the installed diffusers can be compressed, and how far.

python recipes/architectures.py --output docs/architectures.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers

from ofadiff.architectures import Architecture, architectures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"), help="file to write")
    args = parser.parse_args()
    args.output.write_text(page(architectures()), encoding="utf-8")
    print(f"wrote {args.output}")


def page(rows: list[Architecture]) -> str:
    """The table as a Markdown page."""
    elastic = sum(row.elastic_share >= 0.6 for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Denoisers of diffusers {diffusers.__version__} at their default configurations: {elastic} of {len(rows)} "
        "have 60 % or more of their parameters in layers that can be cut.",
        "`python recipes/architectures.py` writes this page.",
        "",
        "- *elastic*: share of the parameters in layers that can be cut.",
        "- *smallest*: share of the parameters that the smallest subnet keeps, where every width keeps a quarter.",
        "- *stays as it is*: blocks that hold the rest, with their share of all parameters, and why blocks of a known "
        "kind are not cut.",
        "",
        "| denoiser | parameters | elastic | smallest | stays as it is |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row.name} | {row.params / 1e6:,.1f} M | {row.elastic_share:.0%} | {row.smallest_size:.0%} | {rest(row)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def rest(row: Architecture) -> str:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row.rigid.items())
    return ". ".join(part for part in (shares, row.skipped) if part)


if __name__ == "__main__":
    main()
