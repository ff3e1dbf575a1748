"""Pages that mkdocs generates: every command's help, and every setting of a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import resources

import mkdocs_gen_files

from dfadc.recipe.load import describe_fields, recipe_names

COMMANDS = ("distill", "export", "verify", "baseline", "inspect", "students", "bench", "report", "doctor")
SUBCOMMANDS = ("recipe list", "recipe show")


_RECIPES = """For whoever changes a setting: `--set path.to.field=value`, or a TOML file for `--recipe`. Generated from
the schema. Nobody who ships a student has to open this page: `auto` adapts to the teacher."""


def help_of(command: str) -> str:
    """Text of ``dfadc COMMAND --help`` at 100 columns, without colours."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    arguments = [sys.executable, "-m", "dfadc", *command.split(), "--help"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def commands_page() -> str:
    """Help of each command, as it is printed."""
    helps = [f"## dfadc {command}\n\n```text\n{help_of(command)}\n```" for command in (*COMMANDS, *SUBCOMMANDS)]
    return "\n\n".join(["# Commands", "For everyone: what each command takes. Generated from `--help`.", *helps]) + "\n"


def recipes_page() -> str:
    """A table of all settings, and the files of the shipped recipes."""
    parts = ["# Recipes", _RECIPES, "## Settings"]
    rows = [
        f"| `{path}` | {bounds.replace('|', chr(92) + '|')} | `{default}` | {text.replace('|', chr(92) + '|')} |"
        for path, bounds, default, text in describe_fields()
    ]
    parts.append("\n".join(["| setting | values | default | meaning |", "|---|---|---|---|", *rows]))
    for name in recipe_names():
        text = (resources.files("dfadc.recipe.shipped") / f"{name}.toml").read_text(encoding="utf-8")
        parts.append(f"## Recipe {name}\n\n{tomllib.loads(text)['description']}\n\n```toml\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


for page, text in (("cli.md", commands_page()), ("recipes.md", recipes_page())):
    with mkdocs_gen_files.open(page, "w") as stream:
        stream.write(text)
