"""The README and the code agree: every file that the layout names is there, and every package file is named."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("readme", ["README.md", "README.ko.md"])
def test_the_layout_names_every_file(readme: str) -> None:
    text = (ROOT / readme).read_text()
    for file in sorted((ROOT / "huarizo").rglob("*.py")):
        if file.name not in ("__init__.py", "__main__.py"):
            assert f"`{file.name}`" in text or f"/{file.name}`" in text, f"{readme} does not name {file.name}"
    assert "@@" not in text
