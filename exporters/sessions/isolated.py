"""Session in a child process: a runtime that crashes ends the child, and the caller gets an error.

The child imports numpy and one runtime, no torch. Requests and replies are one line of JSON each, followed by the
bytes of an array if there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from dfadc import errors
from dfadc.errors import DfadcError, RuntimeCrashed
from exporters.sessions.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from exporters.benchmark import Timing

#: The child uses its parent's sys.path: a device kit is not installed.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); "
    "from exporters.sessions.isolated import serve; serve()"
)


class IsolatedSession(Session):
    """A session that runs in another process.

    Args:
        opener: opens the session there, called with ``path`` and ``settings``: a function or class of a module.
        settings: JSON values, such as ``threads``.

    Raises:
        RuntimeCrashed: the process died.
        DfadcError: and its children, as the opener raises them.
    """

    def __init__(self, opener: Callable[..., Session], path: Path, **settings: Any) -> None:
        self._path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        self._stdin = cast("BinaryIO", self._process.stdin)
        self._stdout = cast("BinaryIO", self._process.stdout)
        session = {"opener": [opener.__module__, opener.__qualname__], "path": str(path), "settings": settings}
        try:
            _send(self._stdin, list(map(str, sys.path)))
            opened, _ = self._request(session, doing="opening")
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        self.device: str = opened["device"]
        self.batch_size: int = opened["batch_size"]
        self.remark: str = opened["remark"]

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :meth:`Session.run`; raises RuntimeCrashed if the process died."""
        _, logits = self._request({"do": "run"}, images, doing="running")
        return logits

    def benchmark(self, images: NDArray[np.float32], *, seconds: float) -> Timing:
        """As :func:`exporters.benchmark.benchmark`, timed in the child: the transfer between processes is not timed."""
        from exporters.benchmark import Timing  # noqa: PLC0415 - a device kit does not carry it

        reply, _ = self._request({"do": "benchmark", "seconds": seconds}, images, doing="timing")
        return Timing(**reply["timing"])

    def close(self) -> None:
        """Ends the child, which holds nothing that must be saved."""
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._log):
            with contextlib.suppress(OSError):  # a request that the dead child never read
                stream.close()

    def _request(
        self, header: Mapping[str, Any], array: NDArray[Any] | None = None, *, doing: str
    ) -> tuple[dict[str, Any], NDArray[Any]]:
        try:
            _send(self._stdin, header, array)
            reply, result = _receive(self._stdout)
        except (BrokenPipeError, EOFError) as exc:
            raise self._death(doing) from exc
        if "error" in reply:
            kind, message, hint = reply["error"]
            raise getattr(errors, kind)(message, hint)
        return reply, result

    def _death(self, doing: str) -> Exception:
        """The error of a child that ended without a reply."""
        code = self._process.wait()
        self._log.seek(0)
        output = self._log.read().decode(errors="replace").strip()
        if code == 1 and "Traceback" in output:  # a bug of ours, not the runtime's
            return RuntimeError(f"the process that was {doing} {self._path} failed:\n{output}")
        how = f"signal {-code}" if code < 0 else f"exit code {code:#x}"
        last = f": {output.splitlines()[-1]}" if output else ""
        return RuntimeCrashed(
            f"the runtime crashed ({how}) while {doing} {self._path.name}{last}",
            "another release of the runtime may run it; dfadc doctor says which is here",
        )


def serve() -> None:
    """Main function of the child: opens the session that the first request names, then serves requests until EOF."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a runtime that prints must not write among the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    try:
        opening, _ = _receive(requests)
        module, name = opening["opener"]
        with getattr(import_module(module), name)(Path(opening["path"]), **opening["settings"]) as session:
            _send(replies, {"device": session.device, "batch_size": session.batch_size, "remark": session.remark})
            with contextlib.suppress(EOFError):
                while True:
                    _serve_one(session, *_receive(requests), replies)
    except DfadcError as exc:
        kind = next(base for base in type(exc).__mro__ if base.__module__ == errors.__name__)
        _send(replies, {"error": [kind.__name__, exc.message, exc.hint]})


def _serve_one(session: Session, request: Mapping[str, Any], images: NDArray[Any], replies: BinaryIO) -> None:
    if request["do"] == "run":
        _send(replies, {}, session.run(images))
        return
    from exporters.benchmark import benchmark  # noqa: PLC0415 - a device kit does not carry it

    _send(replies, {"timing": asdict(benchmark(session, images, seconds=request["seconds"]))})


def _send(stream: BinaryIO, header: Any, array: NDArray[Any] | None = None) -> None:
    """Writes a line of JSON, then the bytes of an array, whose shape and dtype are in the line."""
    if array is not None:
        array = np.ascontiguousarray(array)
        header = {**header, "shape": array.shape, "dtype": array.dtype.str}
    stream.write(json.dumps(header).encode() + b"\n")
    if array is not None:
        stream.write(array.data if array.size else b"")
    stream.flush()


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], NDArray[Any]]:
    """Reads what :func:`_send` wrote; an empty array where it sent none.

    Raises:
        EOFError: the other side has ended.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header: dict[str, Any] = json.loads(line)
    array = np.empty(header.get("shape", 0), np.dtype(header.get("dtype", "f4")))
    view, start = array.reshape(-1).view(np.uint8).data, 0
    while start < len(view):
        count = stream.readinto(view[start:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        start += count
    return header, array
