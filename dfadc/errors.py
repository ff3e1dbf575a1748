"""What a user can get wrong: each error says what, which value or path, and how to fix it, and knows its exit code."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How torch, ONNX Runtime, OpenVINO, TensorRT and C++ say in a general error that memory ran out.
_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "bad_alloc", "bad allocation", "ALLOC_FAILED")
#: All that oneDNN says where it finds no memory for its code; what it does not know it words in another way.
_NO_PRIMITIVE = "could not create a primitive"


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


class RuntimeRefused(DfadcError):
    """A runtime that is here does not load an artifact, whose operators or format version it does not know."""

    exit_code = 4


class TrainingDiverged(DfadcError):
    """Training left the finite numbers and could not be brought back."""

    exit_code = 6


class OutOfMemory(DfadcError):
    """Memory ran out, the machine's or the device's; what was there before is intact."""

    exit_code = 7


class StorageFailed(DfadcError):
    """Writing failed: disk full, read-only or not permitted. What was there before is intact."""

    exit_code = 7


class ReaderGone(DfadcError):
    """The reader of a pipe has closed it, as ``| head`` does: no fault, and nothing is said; the code of SIGPIPE."""

    exit_code = 141


class Interrupted(DfadcError):
    """Ctrl-C, SIGTERM or SIGHUP; the state was saved first."""

    exit_code = 130


def ending_signals() -> list[signal.Signals]:
    """Signals besides Ctrl-C that end work cleanly; not SIGHUP where it is ignored, as under nohup."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    known = [signal.Signals[name] for name in names]
    return [signum for signum in known if signum == signal.SIGTERM or signal.getsignal(signum) is not signal.SIG_IGN]


@contextmanager
def memory_errors(way: str) -> Iterator[None]:
    """Tells that memory ran out, however a library said it; also as a decorator.

    Args:
        way: how to need less.

    Raises:
        OutOfMemory: memory ran out in the block.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (DfadcError, MemoryError, RuntimeError) as exc:
        if (reason := _no_memory(exc)) is None:
            raise
        raise OutOfMemory(f"memory ran out: {reason}", way) from exc


def _no_memory(error: BaseException | None) -> str | None:
    """The first line of the error, among this one and its causes, that says that memory ran out."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or text == _NO_PRIMITIVE or any(sign in text for sign in _NO_MEMORY):
            return (text.splitlines() or [type(error).__name__])[0]
        error = error.__cause__
    return None
