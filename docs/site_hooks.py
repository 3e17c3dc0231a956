"""What the site has that does not lie in docs/ as it is: the benchmarks' page, links that leave docs/, and the flags.

Links are written as GitHub follows them, from file to file of the repository.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File

from ofadiff.commands.app import make_app

# Pages that lie elsewhere, by their name on the site.
ELSEWHERE = {"benchmarks.md": "benchmarks/README.md", "index.md": "README.md"}
FLAGS = "<!-- every flag -->"
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the benchmarks' page."""
    name = "benchmarks.md"
    files.append(File.generated(config, name, abs_src_path=ELSEWHERE[name]))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Leads links to where the site has them, and writes the flags."""
    name = page.file.src_uri
    source = ELSEWHERE[name] if name == "benchmarks.md" else f"docs/{name}"
    markdown = LINK.sub(lambda link: link[1] + site_link(link[2], source, name), markdown)
    return markdown.replace(FLAGS, flags()) if FLAGS in markdown else markdown


def site_link(link: str, source: str, name: str) -> str:
    """A link of a file of the repository, as the page of that name on the site has it."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    there = next((page for page, file in ELSEWHERE.items() if file == target), target.removeprefix("docs/"))
    return posixpath.relpath(there, posixpath.dirname(name) or ".")


def flags() -> str:
    """Every command with its flags and their defaults, as Markdown."""
    text = make_app().generate_docs()
    return text[text.index("## ofadiff ") :]


class Examples(Extension):
    """Shows the examples of docstrings as code; griffe knows their section by its plural."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Renames the section of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
