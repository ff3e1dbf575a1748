"""The gates of a recipe, and what a verification may change of them. Free of torch."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeVar

from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe
from dfadc.recipe.schema import GateSettings, Recipe
from dfadc.verification.thresholds import ExportLimits, Thresholds, default_export_limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Number = TypeVar("Number", int, float)
#: Drop of an artifact under its fp32 student that fails where p < .05 besides.
_MAX_STUDENT_DROP = 0.01


def recipe_to_judge_by(source: str | Path, gates: Sequence[str] = ()) -> Recipe:
    """A recipe whose gates are changed as the caller asks.

    Args:
        source: a shipped recipe's name or a TOML file.
        gates: assignments such as ``"verify.min_agreement=0.9"``; only gates can be changed once the samples are there.

    Raises:
        DfadcError: the recipe cannot be read, or an assignment is none or no gate's.
    """
    for assignment in gates:
        section, _, name = assignment.partition("=")[0].strip().partition(".")
        if section != "verify" or name not in GateSettings.model_fields:
            raise DfadcError(
                f"{assignment!r} sets no gate, and nothing else can be changed after the run",
                f"gates: {', '.join(f'verify.{field}' for field in GateSettings.model_fields)}",
            )
    return load_recipe(source, gates)


def gate_thresholds(recipe: Recipe) -> Thresholds:
    """The limits of a recipe as the gate takes them."""
    gates = recipe.verify
    return Thresholds(
        min_agreement=_limit(gates.min_agreement),
        min_coverage=_limit(gates.min_coverage),
        max_student_drop=_MAX_STUDENT_DROP if gates.compare_export else None,
        min_class_agreement=_limit(gates.min_class_agreement),
        min_accuracy=_limit(gates.min_accuracy),
        max_baseline_drop=_limit(gates.max_baseline_drop),
        boundary_width=gates.boundary_width,
        source=gates.gate_source,
        export=_export_limits(gates) if gates.compare_export else {},
    )


def _export_limits(gates: GateSettings) -> dict[str, ExportLimits]:
    """Limits of comparison A by precision. Those of fp32 and the signal to noise of fp16 hold for any network."""
    defaults = default_export_limits()
    return {
        "fp32": defaults["fp32"],
        "fp16": replace(defaults["fp16"], min_agreement=_limit(gates.min_fp16_agreement)),
        "int8": ExportLimits(
            min_agreement=_limit(gates.min_int8_agreement), min_sqnr_db=_limit(gates.min_int8_sqnr_db)
        ),
    }


def compares_export(thresholds: Thresholds, precision: str) -> bool:
    """True if any gate of comparison A is on for a precision."""
    limits = asdict(thresholds.export.get(precision, ExportLimits()))
    return any(limit is not None for limit in limits.values())


def _limit(value: Number | str) -> Number | None:
    """A number, or None where the recipe says "off"."""
    return None if isinstance(value, str) else value
