"""The documentation site, without building it: its links, its table of contents, and pages that must be complete."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from aphrodite_jax import errors, testing
from aphrodite_jax.testing.conformance import CLAUSES

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REPOSITORY = "aphrodite-jax/aphrodite_jax"
IN_REPOSITORY = re.compile(
    rf"https://(?:github\.com|colab\.research\.google\.com/github)/{REPOSITORY}/(?:blob|tree)/main/([^)\s#]+)"
)


def text(page: Path) -> str:
    return page.read_text("utf-8")


def site() -> dict:
    return yaml.safe_load(text(ROOT / "mkdocs.yml"))


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def section(page: str, heading: str) -> str:
    """What stands under a heading of a page, up to the next one of its level."""
    level = heading.partition(" ")[0]
    found = re.split(rf"^{re.escape(heading)}$", text(DOCS / page), flags=re.MULTILINE)
    assert len(found) == 2, f"{page} has {heading!r} {len(found) - 1} times"
    return re.split(rf"^{level} ", found[1], flags=re.MULTILINE)[0]


def rows(table: str) -> list[list[str]]:
    """Cells of a table's body."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_nav_has_every_page_and_every_page_is_in_nav():
    nav = pages_of(site()["nav"])
    assert len(nav) == len(set(nav))
    assert sorted(nav) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_links_into_the_repository_lead_somewhere():
    found = {(page, path) for page in PAGES for path in IN_REPOSITORY.findall(text(page))}
    assert len(found) > 10
    assert not [f"{page.name}: {path}" for page, path in sorted(found) if not (ROOT / path).exists()]


def test_the_readme_leads_somewhere():
    found = re.findall(r"\]\((?!https?://)([^)#\s]+)", text(ROOT / "README.md"))
    assert len(found) > 5
    assert not [path for path in found if not (ROOT / path).exists()]


def test_the_site_asks_for_nothing_from_elsewhere():
    settings = site()
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False
    assert not settings.keys() & {"extra_css", "extra_javascript", "hooks"}
    for section_of in settings["validation"].values():
        assert set(section_of.values()) == {"warn"}  # an error under strict
    templates = "".join(text(path) for path in DOCS.rglob("templates/**/*.html"))
    assert "data-md-component" not in templates  # with which the theme would ask GitHub for the stars


def test_names_of_the_reference_exist():
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", text(page), flags=re.MULTILINE)]
    assert len(names) == len(set(names)) > 30
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_explained_and_shown(name):
    explained = section("errors.md", f"## {name}")
    if name == "AphroditeError":  # of which none is raised as such
        return
    shown = "".join(re.findall(r"^```python\n.*?^```\n\n```text\n(.*?)^```$", explained, re.MULTILINE | re.DOTALL))
    assert re.search(rf"^{name}: .{{20}}", shown, flags=re.MULTILINE), f"no message of a {name} is made on the page"


def test_every_clause_is_listed():
    listed = [[cell.replace("`", "") for cell in row[-2:]] for row in rows(section("testing.md", "## The clauses"))]
    assert listed == [["", "the registration is complete"], *map(list, CLAUSES.items())]


def test_every_name_for_tests_is_told():
    page = text(DOCS / "testing.md")
    assert not [name for name in testing.__all__ if name not in page]


def test_every_notebook_is_listed():
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    linked = re.findall(rf"https://colab[^)]*{REPOSITORY}/blob/main/notebooks/([^)]+)", text(DOCS / "notebooks.md"))
    assert sorted(linked) == sorted(notebooks)
