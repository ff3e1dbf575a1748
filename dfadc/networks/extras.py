"""Optional packages, which the extras of dfadc install."""

from __future__ import annotations

import importlib
from typing import Any

from dfadc.errors import RequirementMissing


def import_extra(package: str, extra: str, problem: str = "") -> Any:
    """A package that an extra installs.

    Args:
        package: its name for ``import``.
        extra: as in ``dfadc[extra]``.
        problem: the error's message; by default that the package is not installed.

    Raises:
        RequirementMissing: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as exc:
        missing = f"{package.replace('_', '-')} is not installed"
        raise RequirementMissing(problem or missing, f"pip install 'dfadc[{extra}]'") from exc
