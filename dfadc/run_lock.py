"""The lock of a run folder: one process writes into it at a time. Free of torch."""

from __future__ import annotations

import functools
import os
import platform
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from dfadc.errors import DfadcError, StorageFailed
from dfadc.run_claim import LOCK, check_claimable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from dfadc.run_folder import RunFolder

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def refuse_several_processes() -> None:
    """Refuses a launcher such as torchrun, each of whose processes would make a run of its own in one folder.

    Raises:
        DfadcError: the environment states several processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise DfadcError(
            f"a launcher started {size} processes (WORLD_SIZE), and a run is made by one",
            "call dfadc itself, without torchrun; elsewhere unset WORLD_SIZE",
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder; the thread that holds it may take it again.

    The system frees the lock of a process that dies. The lock file stays, empty while nobody holds it; a new one is
    removed if the block fails, because a refused command changes nothing.

    Raises:
        DfadcError: another process holds it; the message names it.
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
        with suppress(OSError):  # on a full disk the holder stays unnamed
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
    """Decorator: a function of a run holds the run's lock while it works."""

    @functools.wraps(function)
    def hold(run: RunFolder, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with locked(run.path):
            return function(run, *args, **kwargs)

    return hold


def holding_writable_run(
    function: Callable[Concatenate[RunFolder, Parameters], Result],
) -> Callable[Concatenate[RunFolder, Parameters], Result]:
    """Decorator as :func:`holding_run` for a function that can do without writing: a read-only folder needs no lock."""
    hold = holding_run(function)

    @functools.wraps(function)
    def hold_if_writable(run: RunFolder, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return (hold if is_writable(run.path) else function)(run, *args, **kwargs)

    return hold_if_writable


def is_writable(folder: Path) -> bool:
    """True if this process may write into a folder: not on a read-only disk, nor in another user's."""
    return os.access(folder, os.W_OK)


@contextmanager
def reserved_folder(path: Path, *, force: bool, inputs: Mapping[str, Path] | None = None) -> Iterator[None]:
    """Makes and locks the folder of a new run; its contents stay until it is claimed.

    If the block fails before a run has begun, the folders that were made are removed.

    Args:
        path: of the run folder.
        force: an existing run may be replaced.
        inputs: files that the new run reads, by the name that a person gave them; none may lie in the folder.

    Raises:
        DfadcError: the folder holds something that must not be lost, or another process holds it.
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
