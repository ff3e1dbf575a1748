"""Recipes read, changed and written.

TOML files, ``--set path=value``, Python and the saved run all become one frozen :class:`dfadc.recipe.schema.Recipe`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import BaseModel, ValidationError

from dfadc.errors import DfadcError
from dfadc.recipe.removed import RECIPES, SECTIONS, SETTINGS, VALUES
from dfadc.recipe.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SHIPPED = resources.files("dfadc.recipe.shipped")
#: Fields of a recipe that label it and set nothing.
_LABELS = ("name", "description")


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, ``auto`` first."""
    names = sorted(entry.name.removesuffix(".toml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".toml"))
    return tuple(sorted(names, key=lambda name: name != "auto"))


def load_recipe(source: str | Path = "auto", overrides: Sequence[str] = ()) -> Recipe:
    """Loads a shipped recipe by name or a TOML file by path, then applies ``path=value`` overrides.

    Overrides, and all that a file states, count as chosen by the user: no overlay changes them.

    Args:
        source: a name from :func:`recipe_names`, or a path that ends in ``.toml``.
        overrides: e.g. ``"student.optimizer.learning_rate=0.05"``; the value is read as TOML, else as text.

    Raises:
        DfadcError: unknown recipe, unreadable file, unknown key (with its dotted path) or a value out of bound.
    """
    values = _read_toml(source)
    assigned = set(_leaves(values)) if str(source).endswith(".toml") else set()
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise DfadcError(f"--set {override!r} is not path=value", "e.g. --set student.steps=10")
        _assign(values, path.strip(), _parse_value(text.strip()))
        assigned.add(path.strip())
    return _validate(values, str(source)).with_assigned(frozenset(assigned))


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A copy of ``recipe`` with values replaced by dotted path, validated as a whole; they count as the user's.

    Raises:
        DfadcError: unknown path or a value out of bound.
    """
    values = recipe.model_dump(mode="json")
    for path, value in changes.items():
        _assign(values, path, value)
    return _validate(values, recipe.name).with_assigned(recipe.assigned | set(changes))


def lay_over(recipe: Recipe, overlay: str) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with a shipped overlay wherever the user chose nothing, and what that changed, by dotted path."""
    text = (_SHIPPED / "overlays" / f"{overlay}.toml").read_text(encoding="utf-8")
    values = recipe.model_dump(mode="json")
    changes = {
        path: value
        for path, value in _leaves(tomllib.loads(text)).items()
        if not recipe.is_assigned(path) and _at(values, path) != value
    }
    return change_recipe(recipe, changes).with_assigned(recipe.assigned), changes


def recipe_from_dict(values: Mapping[str, Any], origin: str) -> Recipe:
    """Rebuilds a recipe from saved JSON values; ``origin`` names the file in errors."""
    return _validate(dict(values), origin)


def recipe_to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, one ``[section]`` for each nested part; :func:`load_recipe` reads it back."""
    return tomli_w.dumps(recipe.model_dump(mode="json"))


def describe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted path, bounds or choices, default, description) of every setting; name and description are none."""
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if not prefix and name in _LABELS:
            continue
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from describe_fields(kind, f"{prefix}{name}.")
            continue
        schema = schemas[name]
        yield f"{prefix}{name}", _bounds(schema), json.dumps(schema.get("default")), field.description or ""


def _bounds(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_bounds(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    signs = (("minimum", "≥ "), ("exclusiveMinimum", "> "), ("maximum", "≤ "), ("exclusiveMaximum", "< "))
    limits = [f"{sign}{schema[key]:g}" for key, sign in signs if key in schema]
    return " ".join([str(schema.get("type", "")), *limits])


def _read_toml(source: str | Path) -> dict[str, Any]:
    try:
        if str(source).endswith(".toml"):
            return tomllib.loads(Path(source).read_text(encoding="utf-8"))
        if str(source) in recipe_names():
            return tomllib.loads((_SHIPPED / f"{source}.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise DfadcError(f"cannot read recipe {source}: {exc}", "a recipe is a TOML file") from exc
    if str(source) in RECIPES:
        raise DfadcError(f"there is no recipe {str(source)!r} any more", RECIPES[str(source)])
    raise DfadcError(f"unknown recipe {str(source)!r}", f"known: {', '.join(recipe_names())}; a file must end in .toml")


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise DfadcError(f"recipe field {'.'.join(sections[: depth + 1])} is a value, not a section (in {path})")
    values[last] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path, sections taken apart."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values


def _validate(values: dict[str, Any], origin: str) -> Recipe:
    try:
        # JSON mode: strict types, but lists still fit tuples. TOML's dates are no JSON: they count as text.
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as exc:
        problems = [_explain(error) for error in exc.errors()]
        raise DfadcError(
            f"recipe {origin}: " + "; ".join(problems), "`dfadc recipe show auto` lists every field"
        ) from exc


def _explain(error: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if path in SETTINGS:
        return f"there is no setting {path} any more: {SETTINGS[path]}"
    if path in SECTIONS and isinstance(error["input"], dict):
        return f"there is no section {path} any more: {SECTIONS[path]}"
    if advice := VALUES.get((path, str(error["input"]))):
        return f"{path} = {error['input']} is gone: {advice}"
    if error["type"] == "extra_forbidden":
        known = [name for name, *_ in describe_fields()]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        return f"unknown field {path!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
    return f"{path} = {json.dumps(error['input'], default=str)}: {error['msg']}"
