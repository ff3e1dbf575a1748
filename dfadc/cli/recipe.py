"""`dfadc recipe`: the shipped recipes and every field they can set."""

from __future__ import annotations

from typing import Annotated

import typer

from dfadc.cli.console import print_line
from dfadc.cli.streams import keeping_stdout_for_results
from dfadc.cli.tables import print_table

recipe_app = typer.Typer(help="List and show recipes.", no_args_is_help=True)


@recipe_app.command("list")
@keeping_stdout_for_results
def list_recipes() -> None:
    """List the shipped recipes."""
    from dfadc.recipe.load import load_recipe, recipe_names  # noqa: PLC0415 -- keeps `--help` light

    rows = [(name, f"{load_recipe(name).steps:,}", load_recipe(name).description) for name in recipe_names()]
    print_table(("recipe", "steps", "what it is"), rows)


@recipe_app.command("show")
@keeping_stdout_for_results
def show(name: Annotated[str, typer.Argument(help="Shipped recipe or TOML file.")]) -> None:
    """Show every setting of a recipe: its value, default, bounds and meaning."""
    import json  # noqa: PLC0415

    from dfadc.recipe.load import describe_fields, load_recipe  # noqa: PLC0415

    recipe = load_recipe(name).model_dump(mode="json")
    print_line(f'recipe "{recipe["name"]}": {recipe["description"]}')
    rows = []
    for path, bounds, default, description in describe_fields():
        value = recipe
        for part in path.split("."):
            value = value[part]
        rows.append((path, json.dumps(value), default, bounds, description))
    print_table(("field", "value", "default", "bounds", "meaning"), rows)
