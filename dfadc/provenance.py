"""Provenance of a run: command, versions, platform and commit. Free of torch."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Packages whose versions decide the results of a run.
RECORDED_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "keras",
    "onnx2fx",
    "numpy",
    "onnx",
    "onnxruntime",
)


def environment() -> dict[str, Any]:
    """Command, versions, platform and, from a checkout, the commit of dfadc: the record that a repetition needs."""
    program = Path(sys.argv[0])
    # As a person types it: without its folder. `python -m package` names the file inside the package.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return {
        "command": shlex.join([name, *sys.argv[1:]]),
        # dfadc itself need not be installed.
        "versions": {"dfadc": __version__, **dict.fromkeys(RECORDED_PACKAGES), **installed(RECORDED_PACKAGES)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
