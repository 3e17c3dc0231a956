"""`ofadiff architectures`: which denoisers of the installed diffusers can be compressed, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import diffusers
from cyclopts import Parameter

from ofadiff.architectures import Architecture, architectures
from ofadiff.storage.output import check_folder
from ofadiff.values import Bundle


@Parameter(name="*", group="output")
@dataclass(frozen=True, kw_only=True)
class Page(Bundle):
    """Where the page goes."""

    output: Path | None = None
    """file to write, by default the terminal"""


def write_architectures(*, where: Page = Page()) -> None:
    """Say which denoisers of the installed diffusers can be compressed, and how far, as a Markdown page.

    Raises:
        ValueError: If the page is to go where a folder is; before anything is counted.
    """
    if where.output is not None and where.output.is_dir():
        raise ValueError(f"--output {where.output} is a folder; it must be a file")
    if where.output is not None:
        check_folder("the folder of --output", where.output.parent)
    text = page(architectures())
    if where.output is None:
        print(text, end="")
        return
    where.output.parent.mkdir(parents=True, exist_ok=True)
    where.output.write_text(text, encoding="utf-8")
    print(f"wrote {where.output}")


def page(rows: list[Architecture]) -> str:
    """The table as a Markdown page."""
    elastic = sum(row.elastic_share >= 0.6 for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Denoisers of diffusers {diffusers.__version__} at their default configurations: {elastic} of {len(rows)} "
        "have 60 % or more of their parameters in layers that can be cut.",
        "`ofadiff architectures` writes this page.",
        "",
        "- *elastic*: share of the parameters in layers that can be cut.",
        "- *smallest*: share of the parameters that the smallest subnet keeps, where every width keeps a quarter.",
        "- *stays as it is*: blocks that hold the rest, with their share of all parameters, and why blocks of a known "
        "kind are not cut.",
        "",
        "| denoiser | parameters | elastic | smallest | proven end to end | stays as it is |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {row.params / 1e6:,.1f} M | {row.elastic_share:.0%} | {row.smallest_size:.0%} | "
        f"{proven(row)} | {rest(row)} |"
        for row in rows
    ]
    lines += [
        "",
        "*Proven end to end* says what a test does with a tiny pipeline of the class: *by a family*, trained on "
        "images; *by recording*, recorded, compressed, sampled at every size, extracted and loaded in plain diffusers.",
        "Any other class with layers that can be cut is expected to work from recordings too, but has no such test.",
    ]
    return "\n".join(lines) + "\n"


def proven(row: Architecture) -> str:
    return " and ".join(f"by {way}" for way in row.proven)


def rest(row: Architecture) -> str:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row.rigid.items())
    return ". ".join(part for part in (shares, row.skipped) if part)
