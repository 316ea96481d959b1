"""The commands that tell something: what this machine can do, and what a recipe can say."""

from typing import Annotated

import typer

from huarizo.console import quiet_libraries
from huarizo.recipe import Recipe
from huarizo.recipe_help import fields, type_of

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Tell what this machine can do, measured, and what that means for training."""
    quiet_libraries()
    from huarizo.doctor import diagnosis

    for title, line in diagnosis().items():
        print(f"{title:<14} {line}")


@app.command("recipe")
def show_recipe(markdown: Annotated[bool, typer.Option("--markdown", help="as a table, for the docs")] = False) -> None:
    """Print every setting of a recipe: type, range, default, help."""
    if markdown:
        print(
            "# The recipe\n\nWritten by `make docs`.\n\n"
            "| key | type and range | default | what it is |\n|---|---|---|---|"
        )
    for key, field in fields(Recipe):
        default = field.get_default(call_default_factory=True)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        if markdown:
            cells = (f"`{key}`", type_of(field), f"`{shown}`", field.description or "")
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        else:
            print(f"{key}  ({type_of(field)}; default {shown})\n    {field.description}")
