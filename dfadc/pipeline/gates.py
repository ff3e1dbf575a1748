"""The gates of a recipe, and what a verification may change of them. Free of torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe
from dfadc.recipe.schema import GateSettings, Recipe
from dfadc.verification.thresholds import ExportLimits, Thresholds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Number = TypeVar("Number", int, float)


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
        max_student_drop=_limit(gates.max_student_drop),
        min_class_agreement=_limit(gates.min_class_agreement),
        min_accuracy=_limit(gates.min_accuracy),
        max_baseline_drop=_limit(gates.max_baseline_drop),
        boundary_width=gates.boundary_width,
        source=gates.gate_source,
        export={
            "fp32": ExportLimits(
                min_agreement=_limit(gates.min_fp32_agreement),
                max_disagreements=_limit(gates.max_fp32_disagreements),
                max_logit_error=_limit(gates.max_fp32_logit_error),
            ),
            "fp16": ExportLimits(
                min_agreement=_limit(gates.min_fp16_agreement), min_sqnr_db=_limit(gates.min_fp16_sqnr_db)
            ),
            "int8": ExportLimits(
                min_agreement=_limit(gates.min_int8_agreement), min_sqnr_db=_limit(gates.min_int8_sqnr_db)
            ),
        },
    )


def export_gates(thresholds: Thresholds, precision: str) -> list[str]:
    """Names of the gates of comparison A that are on for a precision, such as ``verify.min_fp16_agreement``."""
    limits = asdict(thresholds.export.get(precision, ExportLimits()))
    parts = [name.partition("_") for name, limit in limits.items() if limit is not None]
    return [f"verify.{kind}_{precision}_{measure}" for kind, _, measure in parts]


def _limit(value: Number | str) -> Number | None:
    """A number, or None where the recipe says "off"."""
    return None if isinstance(value, str) else value
