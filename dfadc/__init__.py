"""dfadc compiles a trained image network into a small one for an edge device, without one image of training data."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfadc.api.baseline import write_baseline
    from dfadc.api.distil import Observer, load_teacher, plan_distillation, resume_distillation, run_distillation
    from dfadc.api.export import export_student
    from dfadc.api.verify import VerifySettings, verify_file, verify_run
    from dfadc.contract import ContractFields, ImageContract
    from dfadc.errors import DfadcError
    from dfadc.recipe import load_recipe
    from dfadc.run import open_run
    from dfadc.settings import Recipe

__version__ = "0.1.0"

#: Public name -> module that defines it. Imported on first use, so that ``import dfadc`` loads no torch.
_PUBLIC = {
    "ContractFields": "dfadc.contract",
    "DfadcError": "dfadc.errors",
    "ImageContract": "dfadc.contract",
    "Observer": "dfadc.api.distil",
    "Recipe": "dfadc.settings",
    "VerifySettings": "dfadc.api.verify",
    "export_student": "dfadc.api.export",
    "load_recipe": "dfadc.recipe",
    "load_teacher": "dfadc.api.distil",
    "open_run": "dfadc.run",
    "plan_distillation": "dfadc.api.distil",
    "resume_distillation": "dfadc.api.distil",
    "run_distillation": "dfadc.api.distil",
    "verify_file": "dfadc.api.verify",
    "verify_run": "dfadc.api.verify",
    "write_baseline": "dfadc.api.baseline",
}

__all__ = [
    "ContractFields",
    "DfadcError",
    "ImageContract",
    "Observer",
    "Recipe",
    "VerifySettings",
    "export_student",
    "load_recipe",
    "load_teacher",
    "open_run",
    "plan_distillation",
    "resume_distillation",
    "run_distillation",
    "verify_file",
    "verify_run",
    "write_baseline",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dfadc' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
