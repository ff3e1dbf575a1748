"""Provenance of a run: command, versions, platform and commit. Free of torch."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dfadc._version import __version__

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
    versions: dict[str, str | None] = {"dfadc": __version__}  # it need not be installed
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": _command(),
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def _command() -> str:
    """The command line of this process as a person types it: without the folder of its program."""
    program = Path(sys.argv[0])
    # `python -m package` names the file inside the package.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


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
