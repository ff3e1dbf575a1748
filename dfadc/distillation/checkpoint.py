"""Checkpoints: whole or absent, the one before kept, and nothing in them but tensors and plain values."""

from __future__ import annotations

import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from dfadc.errors import DfadcError, StorageFailed
from dfadc.storage import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

LAST, PREVIOUS = "last.pt", "previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes ``last.pt``; what was there before becomes ``previous.pt``.

    Raises:
        StorageFailed: the disk is full or not writable; the checkpoints that were there are intact.
    """
    last = folder / LAST
    with atomic_write(last) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as exc:
            # torch's zip writer reports a full disk as a RuntimeError that does not say so.
            raise StorageFailed(
                f"cannot write checkpoint {last}: the disk is full or not writable ({str(exc).splitlines()[0]})",
                "free some space, then go on with --resume; the checkpoint before is unchanged",
            ) from exc
        if last.exists():
            last.replace(folder / PREVIOUS)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Loads the newest readable checkpoint of a run, without running code from it.

    Raises:
        DfadcError: there is none, or none can be read.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return _read(path)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as exc:
            reason = (str(exc).splitlines() or ["the file ends early"])[0]
            problems.append(f"{name}: {reason}")
    found = "; ".join(problems) or "it holds no checkpoint yet"
    raise DfadcError(f"cannot resume from {folder}: {found}", "start again with --force")


def _read(path: Path) -> dict[str, Any]:
    # torch does not look at the archive's checksums: a damaged byte would pass for a weight.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
