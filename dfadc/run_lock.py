"""The lock of a run folder: one process writes into it at a time. Free of torch."""

from __future__ import annotations

import functools
import os
import platform
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from dfadc.errors import DfadcError, StorageFailed
from dfadc.run_folder import LOCK, RunFolder, check_claimable, refuse_several_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder; the thread that holds it may take it again.

    The system frees the lock of a process that dies. The lock file stays, empty where nobody holds it; a new one is
    removed where the block fails, for what is refused changes nothing.

    Raises:
        DfadcError: another process holds it; the message says which.
        StorageFailed: the folder is not writable.
    """
    refuse_several_processes()
    path = folder.resolve() / LOCK
    lock, is_new = FileLock(path, timeout=0, is_singleton=True), not path.exists()
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(folder, path) from None
    except OSError as exc:
        raise StorageFailed(f"cannot lock {folder}: {exc.strerror or exc}", "make the folder writable") from exc
    try:
        with suppress(OSError):  # on a full disk nobody is told who holds it
            path.write_text(f"{os.getpid()} {platform.node()}\n", encoding="utf-8")
        yield
    except BaseException:  # Ctrl-C too
        if is_new:
            path.unlink(missing_ok=True)
        raise
    finally:
        if lock.lock_counter == 1 and path.exists():
            with suppress(OSError):
                path.write_text("", encoding="utf-8")
        lock.release()


def holding_run(
    function: Callable[Concatenate[RunFolder, Parameters], Result],
) -> Callable[Concatenate[RunFolder, Parameters], Result]:
    """A function of a run that holds the run's lock while it works."""

    @functools.wraps(function)
    def hold(run: RunFolder, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with locked(run.path):
            return function(run, *args, **kwargs)

    return hold


def holding_writable_run(
    function: Callable[Concatenate[RunFolder, Parameters], Result],
) -> Callable[Concatenate[RunFolder, Parameters], Result]:
    """The same for a function that can do without writing: a folder that nobody here can write needs no lock."""
    hold = holding_run(function)

    @functools.wraps(function)
    def hold_if_writable(run: RunFolder, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return (hold if is_writable(run.path) else function)(run, *args, **kwargs)

    return hold_if_writable


def is_writable(folder: Path) -> bool:
    """Whether this process may write into a folder: not on a read-only disk, nor in somebody else's."""
    return os.access(folder, os.W_OK)


@contextmanager
def reserved_folder(path: Path, *, force: bool, inputs: Mapping[str, Path] | None = None) -> Iterator[None]:
    """Holds the folder of a new run, which is made where there is none; what lies in it stays until it is claimed.

    Where nothing came of it, the folders that were made are removed.

    Args:
        path: of the run folder.
        force: whether a run that lies there may be replaced.
        inputs: what the new run reads, by the name that a person gave it; none may lie in the folder.

    Raises:
        DfadcError: something is there that must not be lost, or another process is at work there.
        StorageFailed: the folder cannot be made.
    """
    refuse_several_processes()
    check_claimable(path, force=force, inputs=inputs)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageFailed(
            f"cannot create the run folder {path}: {exc.strerror or exc}", "choose a writable --out"
        ) from exc
    try:
        with locked(path):
            check_claimable(path, force=force, inputs=inputs)
            yield
    except BaseException:
        with suppress(OSError):  # they are not empty once a run has begun
            for folder in made:
                folder.rmdir()
        raise


def _in_use(folder: Path, path: Path) -> DfadcError:
    pid, node = "", ""
    with suppress(OSError, ValueError, IndexError):
        pid, node, *_ = [*path.read_text(encoding="utf-8").split(), ""]
    where = f" on {node}" if node and node != platform.node() else ""
    holder = f"process {pid}{where}" if pid.isdecimal() else "another process"
    end = f", or end it: kill {pid}" if pid.isdecimal() and not where else ""
    return DfadcError(f"the run {folder} is in use by {holder}", f"wait until that is done{end}")
