"""Locks and claims of run folders: one process writes at a time, and no earlier work is lost. Free of torch."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from dfadc.errors import DfadcError, StorageFailed
from dfadc.run_folder import SCHEMA, RunFolder
from dfadc.storage import is_temporary, storage_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

#: Name of the lock file in a run folder.
LOCK = ".lock"

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

    If the block fails before a run has begun, the folders that were made are removed. ``force`` allows to replace a
    run; ``inputs`` are files that the new run reads, by the name that a person gave them: none may lie in the folder.

    Raises:
        DfadcError: the folder holds something that must not be lost, or another process holds it.
        StorageFailed: the folder cannot be made.
    """
    refuse_several_processes()
    check_claimable(path, force=force, inputs=inputs)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    with storage_errors(f"create the run folder {path}", "choose a writable --out"):
        path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path):
            check_claimable(path, force=force, inputs=inputs)
            yield
    except BaseException:
        with suppress(OSError):  # they are not empty once a run has begun
            for folder in made:
                folder.rmdir()
        raise


def check_claimable(path: Path, *, force: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Refuses, before any work is done, what :func:`claim_folder` would refuse; changes nothing.

    The arguments are those of :func:`reserved_folder`.

    Raises:
        DfadcError: the folder holds something that must not be lost, such as an input.
        StorageFailed: the folder cannot be read.
    """
    folder = RunFolder(path)
    with storage_errors(f"read {path}", "choose another --out"):
        if path.exists() and not path.is_dir():
            raise DfadcError(f"the output {path} is a file", "choose another --out")
        for name, file in (inputs or {}).items():
            if _lies_in(file, path):
                raise DfadcError(f"{name} {file} lies in the output folder {path}", "choose another --out")
        if not path.exists() or _is_unused(folder):
            return
        if _status(folder) is None:
            raise DfadcError(f"{path} is not empty and holds no run", "choose another --out")
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
    with storage_errors(f"create the run folder {path}", "choose a writable --out"):
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


def _in_use(folder: Path, path: Path) -> DfadcError:
    pid, node = "", ""
    with suppress(OSError, ValueError, IndexError):
        pid, node, *_ = [*path.read_text(encoding="utf-8").split(), ""]
    where = f" on {node}" if node and node != platform.node() else ""
    holder = f"process {pid}{where}" if pid.isdecimal() else "another process"
    end = f", or end it: kill {pid}" if pid.isdecimal() and not where else ""
    return DfadcError(f"the run {folder} is in use by {holder}", f"wait until that is done{end}")
