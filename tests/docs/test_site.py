"""The site holds every page, leads every link somewhere, and shows every flag and public name. It is not built here.

`make docs` builds it, which takes longer than these tests together, and stops at a warning.
"""

import importlib
import re

import pytest
import yaml
from docs.snippets import BENCHMARKS, PAGES, ROOT, read

import ofadiff
from ofadiff.commands.app import COMMANDS

DOCS = [page for page in PAGES if page != "README.md"]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^]]*\]\(")
REFERENCE = re.compile(r"^::: ([\w.]+)$", flags=re.MULTILINE)
COMMAND = re.compile(r"make \w+|python benchmarks/\w+\.py")
USED = ("evaluation", "profiling", "recordings", "runs", "pipelines")


def settings():
    """mkdocs.yml."""
    return yaml.safe_load(read("mkdocs.yml"))


def pages_of(nav):
    for entry in nav:
        for value in entry.values():
            yield from pages_of(value) if isinstance(value, list) else [value]


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them of words."""
    headings = re.findall(r"^#+ (.*)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages_of(settings()["nav"])) == sorted(
        ["benchmarks.md", *(page.removeprefix("docs/") for page in DOCS)]
    )


def test_a_warning_stops_the_build_and_nothing_is_fetched():
    site = settings()
    assert site["strict"] and site["theme"]["font"] is False
    checks = [check for group in site["validation"].values() for check in group.values()]
    assert len(checks) == 7 and set(checks) == {"warn"}
    plugins = {plugin if isinstance(plugin, str) else next(iter(plugin)) for plugin in site["plugins"]}
    assert plugins == {"search", "mkdocstrings"} and not re.search(r"https?:", read("mkdocs.yml"))


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS])
def test_links_lead_somewhere_on_github(page):
    """From file to file; `docs/site_hooks.py` says where the site has them."""
    for link in LINK.findall(read(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if page != "README.md" and ROOT / "docs" not in target.resolve().parents:
            assert target.resolve() in (ROOT / "README.md", ROOT / BENCHMARKS), f"{page}: the site has no {link}"
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), f"{page}: {link}"


def test_pages_with_a_picture_name_the_command_that_makes_it():
    with_pictures = [page for page in (*PAGES, BENCHMARKS) if PICTURE.search(read(page))]
    assert len(with_pictures) >= 4 and all(COMMAND.search(read(page)) for page in with_pictures)


def test_the_reference_has_every_public_name():
    shown = {name for page in DOCS for name in REFERENCE.findall(read(page))}
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    documented = {name.rpartition(".")[2] for name in shown}
    assert set(ofadiff.__all__) <= documented
    for room in USED:
        assert set(importlib.import_module(f"ofadiff.{room}").__all__) <= documented, room


def test_the_page_of_flags_is_written_from_the_commands():
    assert "<!-- every flag -->" in read("docs/flags.md")
    pytest.importorskip("mkdocs", reason="pip install ofadiff[docs]")
    hooks = load_hooks()
    text = hooks.on_page_markdown(read("docs/flags.md"), page=Named("flags.md"))
    assert all(f"## ofadiff {command}\n" in text for command in COMMANDS)
    for line in read("tests/commands/flags.txt").splitlines():
        command, _, flag = line.rpartition(" ")
        if command.startswith("ofadiff "):
            section = text.partition(f"## {command}\n")[2].partition("\n## ofadiff")[0]
            assert re.search(rf"`.*{flag}\b.*`", section), line


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("quality.md", "../benchmarks/README.md#emoji", "benchmarks.md#emoji"),
        ("reference/runs.md", "../flags.md", "../flags.md"),
        ("log.md", "../README.md", "index.md"),
        ("own_model.md", "u_vit.py", "u_vit.py"),
        ("benchmarks.md", "../docs/quality.png", "quality.png"),
        ("index.md", "https://arxiv.org/abs/2209.12152", "https://arxiv.org/abs/2209.12152"),
        ("index.md", "#further", "#further"),
    ],
)
def test_links_of_files_become_links_of_the_site(page, link, expected):
    pytest.importorskip("mkdocs", reason="pip install ofadiff[docs]")
    assert load_hooks().on_page_markdown(f"[x]({link})", page=Named(page)) == f"[x]({expected})"


class Named:
    """A page of mkdocs that has no more than its name."""

    def __init__(self, name):
        self.file = self
        self.src_uri = name


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
