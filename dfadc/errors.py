"""Errors that a user can correct: each has a message with the value or path, a remedy and an exit code."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Texts by which general errors of torch, ONNX Runtime, OpenVINO, TensorRT and C++ report exhausted memory.
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "bad_alloc", "bad allocation", "ALLOC_FAILED")
#: The whole text of oneDNN's error without memory for its code; for unsupported operations it has another text.
_NO_PRIMITIVE = "could not create a primitive"


class DfadcError(Exception):
    """Base of every error that dfadc raises on purpose: wrong usage or input, exit code 2.

    Args:
        message: the fault, with the value or path.
        hint: the remedy; empty if the message already contains it.
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
    """A requirement (a backend, an artifact, a baseline) is missing or did not run."""

    exit_code = 4


class ExportFailed(DfadcError):
    """An artifact could not be exported or built."""

    exit_code = 5


class RuntimeRefused(DfadcError):
    """An installed runtime does not load an artifact: it does not support its operators or format version."""

    exit_code = 4


class TrainingDiverged(DfadcError):
    """Losses became NaN or infinite, and the training could not recover."""

    exit_code = 6


class OutOfMemory(DfadcError):
    """The machine or the device ran out of memory; earlier files are intact."""

    exit_code = 7


class StorageFailed(DfadcError):
    """Writing failed: disk full, read-only or not permitted. Earlier files are intact."""

    exit_code = 7


class ReaderGone(DfadcError):
    """The reader of a pipe has closed it, as ``| head`` does: no fault and no message; the exit code of SIGPIPE."""

    exit_code = 141


class Interrupted(DfadcError):
    """Ctrl-C, SIGTERM or SIGHUP; the state was saved first."""

    exit_code = 130


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first names of a message, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def ending_signals() -> list[signal.Signals]:
    """Signals besides Ctrl-C that end work cleanly; not SIGHUP if it is ignored, as under nohup."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    signals = [signal.Signals[name] for name in names]
    return [signum for signum in signals if signum == signal.SIGTERM or signal.getsignal(signum) is not signal.SIG_IGN]


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Converts every library's out-of-memory error to :class:`OutOfMemory` with a remedy; also as a decorator."""
    try:
        yield
    except OutOfMemory:
        raise
    except (DfadcError, MemoryError, RuntimeError) as exc:
        if (reason := _no_memory(exc)) is None:
            raise
        raise OutOfMemory(f"memory ran out: {reason}", remedy) from exc


def _no_memory(error: BaseException | None) -> str | None:
    """First line of the out-of-memory error among this one and its causes; None if there is none."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or text == _NO_PRIMITIVE or any(phrase in text for phrase in _NO_MEMORY):
            return (text.splitlines() or [type(error).__name__])[0]
        error = error.__cause__
    return None
