"""Choice of the session for a file. Imports no torch and no runtime; not used in device kits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dfadc.errors import DfadcError, ExportFailed, RequirementMissing
from exporters.registry import load, target_of
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.session import DEFAULT_BATCH_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from exporters.sessions.session import Session


def open_session(path: Path, *, threads: int = 0, batch_size: int = DEFAULT_BATCH_SIZE) -> Session:
    """The session for an artifact, by its extension.

    Raises:
        DfadcError: no target has the extension, or the file is missing or damaged.
        RequirementMissing, RuntimeRefused: this machine cannot run it; the message is the reason for a verdict NOT RUN.
    """
    session: Session = load(target_of(path).session)(path, threads=threads, batch_size=batch_size)
    return session


def check_runs(path: Path, input_size: tuple[int, int, int]) -> None:
    """Runs an artifact that was just written on one black image, in a separate process, if its runtime is here.

    Raises:
        ExportFailed: its runtime refuses it or crashes.
    """
    try:
        with IsolatedSession(open_session, path, threads=1, batch_size=1) as session:
            session.run(np.zeros((1, *input_size), np.float32))
    except RequirementMissing:
        return
    except DfadcError as exc:
        raise ExportFailed(f"{path.name} was built and does not run: {exc.message}", exc.hint) from exc
