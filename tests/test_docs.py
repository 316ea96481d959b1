"""The documentation and the code agree: the tree in docs/architecture.md is the tree of the package."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


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
