"""Claims a run folder for a new run: refuses what must not be lost, and empties the rest. Free of torch."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError, StorageFailed
from dfadc.run_folder import SCHEMA, RunFolder
from dfadc.storage import is_temporary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: The lock file of a run folder, see :mod:`dfadc.run_lock`.
LOCK = ".lock"


def check_claimable(path: Path, *, force: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Refuses, before any work is done, what :func:`claim_folder` would refuse; changes nothing.

    Args:
        path: of the folder.
        force: an existing run may be replaced.
        inputs: files that the run reads, by the name that a person gave them.

    Raises:
        DfadcError: the folder holds something that must not be lost, such as an input.
        StorageFailed: the folder cannot be read.
    """
    folder = RunFolder(path)
    try:
        if path.exists() and not path.is_dir():
            raise DfadcError(f"the output {path} is a file", "choose another --out")
        for name, file in (inputs or {}).items():
            if _lies_in(file, path):
                raise DfadcError(f"{name} {file} lies in the output folder {path}", "choose another --out")
        if not path.exists() or _is_unused(folder):
            return
        if _status(folder) is None:
            raise DfadcError(f"{path} is not empty and holds no run", "choose another --out")
    except OSError as exc:
        raise StorageFailed(f"cannot read {path}: {exc.strerror or exc}", "choose another --out") from exc
    if not force:
        raise DfadcError(
            f"{path} already holds a run",
            f"--resume {path} goes on with it, --force replaces it, or choose --out",
        )


def claim_folder(path: Path, *, force: bool) -> RunFolder:
    """An empty run folder at ``path``.

    Raises:
        DfadcError: the folder holds something that must not be lost.
        StorageFailed: the folder cannot be made.
    """
    check_claimable(path, force=force)
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The folder itself stays: it may be a mount point, or a shell's working directory.
        for entry in path.iterdir():
            if entry.name == LOCK:  # held by this process
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        folder.checkpoints.mkdir()
    except OSError as exc:
        raise StorageFailed(
            f"cannot create the run folder {path}: {exc.strerror or exc}", "choose a writable --out"
        ) from exc
    return folder


def _lies_in(file: Path, folder: Path) -> bool:
    """True if a file, or a link on the way to it, would be removed with the folder."""
    ways = (*(way.resolve() for way in (file.absolute(), *file.absolute().parents)), *file.resolve().parents)
    return folder.resolve() in ways


def _is_unused(folder: RunFolder) -> bool:
    """True if the folder is empty, or as a run leaves it that was stopped before its record was complete."""
    return _status(folder) == "starting" or all(
        entry.name == LOCK
        or is_temporary(entry)
        or (entry == folder.checkpoints and entry.is_dir() and not any(entry.iterdir()))
        for entry in folder.path.iterdir()
    )


def _status(folder: RunFolder) -> str | None:
    """Status of a run of any dfadc version; None without one, for another program may write a run.json too."""
    try:
        record = json.loads(folder.record_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_run = isinstance(record, dict) and str(record.get("schema")).startswith(SCHEMA.partition("/")[0] + "/")
    return str(record.get("status")) if is_run else None
