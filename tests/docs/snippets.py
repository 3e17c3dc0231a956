"""The fenced blocks of the pages: where they stand, and in which language."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))))
BENCHMARKS = "benchmarks/README.md"  # a page of the site as well

HEADING = re.compile(r"#+ (.*)")
FENCE = re.compile(r"( *)(```+|~~~+)(\S*)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Its file, from the repository's root on.
        heading: The one that it stands under.
        language: As the fence says; empty if it does not.
        text: Without the fences.
    """

    page: str
    heading: str
    language: str
    text: str


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page, text):
    """Every fenced block of a page, in order."""
    found, heading, fence, language, lines = [], "", None, "", []
    for line in text.splitlines():
        match = FENCE.match(line)
        if fence is not None:
            if match and line.strip() == fence:
                found.append(Block(page, heading, language, "".join(lines)))
                fence = None
            else:
                lines.append(f"{line}\n")
        elif match:
            _, fence, language = match.groups()
            lines = []
        elif match := HEADING.match(line):
            heading = match[1]
    assert fence is None, f"{page}: a block under {heading!r} does not end"
    return found


def blocks(*pages):
    """Every fenced block of some pages."""
    return [block for page in pages for block in blocks_of(page, read(page))]
