"""The documentation and the code agree: every file is in the tree, and every link and path leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
NAME = re.compile(r"`((?:\w+\.)?(?:[A-Z]\w+|_?[a-z0-9]+(?:_[a-z0-9]+)+))`")
PATH = re.compile(r"`((?:[\w*]+/)*[\w*]+\.(?:py|c|h|md|txt|toml))`")


def paths_in(tree: str) -> set[str]:
    """The files of an indented listing: a folder ends in `/`, a file's name in its suffix; a description follows."""
    folders: list[str] = []
    found = set()
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found.add("".join(folders) + name)
    return found


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page.read_text())}


def test_the_tree_names_every_file() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```\n")[1]
    files = {
        str(file.relative_to(ROOT))
        for suffix in ("*.py", "*.c", "*.h")
        for file in (ROOT / "huarizo").rglob(suffix)
        if file.name not in ("__init__.py", "__main__.py")
    }
    assert paths_in(tree) == files


def test_every_line_of_the_tree_says_what_the_file_is_for() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```\n")[1]
    assert all(len(line.split()) > 2 for line in tree.splitlines()[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_named_exists(name: str) -> None:
    """A path is relative to the repository, to the package, or the name of a file in a folder below these."""
    text = (ROOT / name).read_text()
    for path in PATH.findall(text):
        places = [ROOT, ROOT / "huarizo"]
        deep = [] if "/" in path else [*(ROOT / "huarizo").rglob(path), *(ROOT / "tests").rglob(path)]
        assert deep or any(list(place.glob(path)) for place in places), path


def test_every_function_of_the_walks_exists() -> None:
    """Names of functions, classes and constants in the architecture page occur in the package."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    code = "\n".join(file.read_text() for file in (ROOT / "huarizo").rglob("*.py"))
    names = {part for name in NAME.findall(text) for part in name.split(".")}
    assert len(names) > 30
    assert names <= set(re.findall(r"\w+", code))
