"""dfadc compiles a trained image network into a small one for an edge device, without one image of training data."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfadc._version import __version__ as __version__

if TYPE_CHECKING:
    from dfadc.contract import ContractFields as ContractFields
    from dfadc.contract import ImageContract as ImageContract
    from dfadc.errors import DfadcError as DfadcError
    from dfadc.pipeline.baseline import write_baseline as write_baseline
    from dfadc.pipeline.distill import Observer as Observer
    from dfadc.pipeline.distill import load_teacher as load_teacher
    from dfadc.pipeline.distill import plan_distillation as plan_distillation
    from dfadc.pipeline.distill import resume_distillation as resume_distillation
    from dfadc.pipeline.distill import run_distillation as run_distillation
    from dfadc.pipeline.export import export_student as export_student
    from dfadc.pipeline.verify import VerifySettings as VerifySettings
    from dfadc.pipeline.verify import verify_file as verify_file
    from dfadc.pipeline.verify import verify_run as verify_run
    from dfadc.recipe.load import load_recipe as load_recipe
    from dfadc.recipe.schema import Recipe as Recipe
    from dfadc.run_folder import open_run as open_run

#: Public name -> module that defines it. Imported on first use, so that ``import dfadc`` loads no torch.
_PUBLIC = {
    "ContractFields": "dfadc.contract",
    "DfadcError": "dfadc.errors",
    "ImageContract": "dfadc.contract",
    "Observer": "dfadc.pipeline.distill",
    "Recipe": "dfadc.recipe.schema",
    "VerifySettings": "dfadc.pipeline.verify",
    "export_student": "dfadc.pipeline.export",
    "load_recipe": "dfadc.recipe.load",
    "load_teacher": "dfadc.pipeline.distill",
    "open_run": "dfadc.run_folder",
    "plan_distillation": "dfadc.pipeline.distill",
    "resume_distillation": "dfadc.pipeline.distill",
    "run_distillation": "dfadc.pipeline.distill",
    "verify_file": "dfadc.pipeline.verify",
    "verify_run": "dfadc.pipeline.verify",
    "write_baseline": "dfadc.pipeline.baseline",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dfadc' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
