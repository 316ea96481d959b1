"""What the machine can do, and what a recipe can contain."""

from pathlib import Path

from tests.commands.make import call


def test_the_doctor_tells_what_the_machine_can_do(tmp_path: Path) -> None:
    done = call("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "device",
        "threads",
        "GB free",
        "torch 2.",
        "compiler",
        "tier  ",
        "int8 in C",
        "attention in C",
        "dropout in C",
        "precision      auto takes ",
        "int8 products",
        "tokens/s of TinyLlama",
    ):
        assert word in done.stdout


def test_the_recipe_command_prints_every_setting(tmp_path: Path) -> None:
    done = call("recipe", cwd=tmp_path)
    assert done.returncode == 0
    assert all(key in done.stdout for key in ("data.max_length", "lora.target_modules", "trainer", "default 512"))


def test_the_docs_list_the_settings_as_they_are(tmp_path: Path) -> None:
    done = call("recipe", "--markdown", cwd=tmp_path)
    assert done.stdout == (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
