"""Standard streams of a command: only results go to stdout, whatever its encoding; a full stdout is an error."""

from __future__ import annotations

import codecs
import errno
import functools
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from typing import ParamSpec, TextIO, TypeVar

from dfadc.errors import ReaderGone, StorageFailed

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

#: Name of the error handler that replaces characters missing in a stream's encoding by ASCII.
_SPELLED = "dfadc.spelled"
_SPELLINGS = {"–": "-", "—": "-", "…": "...", "×": "x", "→": "->", "≥": ">=", "≤": "<=", "•": "*"}
_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


def result_stream() -> TextIO:
    """The stdout that the command was started with, for its results."""
    return _results.get() or sys.stdout


def keeping_stdout_for_results(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: during the command, prints of libraries and of the user's own code go to stderr."""

    @functools.wraps(command)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        token = _results.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                return command(*args, **kwargs)
        finally:
            _results.reset(token)

    return call


def take_over_streams() -> None:
    """Prepares the streams of this process, before anything is printed.

    Descriptor 1 becomes a second stderr, for C++ libraries and child processes; ``sys.stdout`` is the stdout of before.
    """
    codecs.register_error(_SPELLED, _spell)
    encodings = [stream.encoding if stream else "utf-8" for stream in (sys.stdout, sys.stderr)]
    _fill_closed_descriptors()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = _ResultStream(_bytes_to(results), encodings[0], _SPELLED)
    sys.stderr = _MessageStream(_bytes_to(2), encodings[1], _SPELLED, line_buffering=True)


class _ResultStream(io.TextIOWrapper):
    """The process's stdout. Errors of the system become errors of dfadc, and the text that caused them is dropped."""

    def write(self, text: str, /) -> int:
        """Writes text, perhaps into a buffer."""
        with self._our_errors():
            return super().write(text)

    def flush(self) -> None:
        """Flushes the buffer."""
        with self._our_errors():
            super().flush()

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what is still buffered must not fail again when Python ends
            os.close(nowhere)
            if exc.errno == errno.EPIPE:
                raise ReaderGone("the reader of the result has closed the pipe") from exc
            reason = "it is closed" if exc.errno == errno.EBADF else exc.strerror or exc
            raise StorageFailed(
                f"cannot write the result to stdout: {reason}", "send it to a file or pipe that can take it"
            ) from exc


class _MessageStream(io.TextIOWrapper):
    """The process's stderr. A message that cannot be written, to a full disk or a closed terminal, ends no work."""

    def write(self, text: str, /) -> int:
        """Writes text if possible."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the buffer if possible."""
        with suppress(OSError):
            super().flush()


def _bytes_to(descriptor: int) -> io.BufferedWriter:
    return io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))


def _fill_closed_descriptors() -> None:
    """Opens closed descriptors 0, 1 and 2, so that no other file gets them; writing to a closed stdout still fails."""
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replaces characters by ASCII: plain dashes, letters without accents, surrogates escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spell_character, error.object[error.start : error.end])), error.end


def _spell_character(character: str) -> str:
    if "\ud800" <= character <= "\udfff":  # of a file name that is not UTF-8
        return character.encode("ascii", "backslashreplace").decode()
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _SPELLINGS.get(character) or plain or "?"
