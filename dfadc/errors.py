"""What a user can get wrong: each error says what, which value or path, and how to fix it, and knows its exit code."""

from __future__ import annotations

from typing import ClassVar


class DfadcError(Exception):
    """Base of every error that dfadc raises on purpose: wrong usage or input, exit code 2.

    Args:
        message: what went wrong, naming the value or path.
        hint: how to fix it; empty where the message already says so.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class GateFailed(DfadcError):
    """A verification gate failed, or there was nothing to judge (no samples, NaN)."""

    exit_code = 3


class RuntimeCrashed(DfadcError):
    """A runtime ended its process while it opened or ran an artifact: in a verification, that artifact's FAIL."""

    exit_code = 3


class RequirementMissing(DfadcError):
    """Something that was required (a backend, an artifact, a baseline) is missing or did not run."""

    exit_code = 4


class ExportFailed(DfadcError):
    """An artifact could not be exported or built."""

    exit_code = 5


class TrainingDiverged(DfadcError):
    """The two-player game left the finite numbers and could not be brought back."""

    exit_code = 6


class StorageFailed(DfadcError):
    """Writing failed: disk full, read-only or not permitted. What was there before is intact."""

    exit_code = 7


class Interrupted(DfadcError):
    """Ctrl-C or SIGTERM; the state was saved first."""

    exit_code = 130
