"""The gates of a recipe, and what a verification may change of them. Free of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe
from dfadc.recipe.schema import GateSettings, Recipe
from dfadc.verification.thresholds import ExportLimits, Thresholds, default_export_limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Drop of an artifact under its fp32 student that fails where p < .05 besides.
_MAX_STUDENT_DROP = 0.01


def recipe_to_judge_by(source: str | Path, gates: Sequence[str] = ()) -> Recipe:
    """A shipped recipe, or a TOML file's, with changed gates, such as ``"verify.min_agreement=0.9"``.

    Only gates can be changed once the samples are there.

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
    gates: dict[str, Any] = {name: None if value == "off" else value for name, value in recipe.verify}
    compares_export = recipe.verify.compare_export
    # Those of fp32 and the signal to noise of fp16 hold for any network.
    export = default_export_limits() | {
        "fp16": replace(default_export_limits()["fp16"], min_agreement=gates["min_fp16_agreement"]),
        "int8": ExportLimits(min_agreement=gates["min_int8_agreement"], min_sqnr_db=gates["min_int8_sqnr_db"]),
    }
    return Thresholds(
        min_agreement=gates["min_agreement"],
        min_coverage=gates["min_coverage"],
        min_class_agreement=gates["min_class_agreement"],
        min_accuracy=gates["min_accuracy"],
        max_baseline_drop=gates["max_baseline_drop"],
        boundary_width=gates["boundary_width"],
        max_student_drop=_MAX_STUDENT_DROP if compares_export else None,
        source=gates["gate_source"],
        export=export if compares_export else {},
    )
