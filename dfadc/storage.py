"""Atomic file writes, hashes, and storage errors with their own exit code. Free of torch."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, StorageFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Names of the temporary files of :func:`atomic_write`: ``.NAME.``, eight random characters, the suffix of NAME.
_TEMPORARY = re.compile(r"\..+(\.[A-Za-z0-9]+)\.[a-z0-9_]{8}\1")

#: System errors of a full disk, and of one that may not be written.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def storage_errors(doing: str, hint: str = "") -> Iterator[None]:
    """Turns an error of the system into StorageFailed: "cannot DOING", with its reason."""
    try:
        yield
    except OSError as exc:
        raise StorageFailed(f"cannot {doing}: {exc.strerror or exc}", hint) from exc


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and moves it over ``path`` once the block has succeeded.

    A reader, or a process started after a crash, sees the old file or the new one, never a part. The file's mode is
    0666 less the umask.

    Raises:
        StorageFailed: the disk is full, read-only or not permitted; ``path`` is unchanged.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
        draft.touch(exist_ok=False)
        temporary = draft
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as exc:
        raise StorageFailed(f"cannot write {path}: {exc.strerror or exc}", _remedy(exc, path.parent)) from exc
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _remedy(error: OSError, folder: Path) -> str:
    """Remedy for a failed write, the same for every command."""
    if error.errno in FULL:
        return f"free some space for {folder}; the earlier file is unchanged"
    if error.errno in _FORBIDDEN:
        return f"make {folder} writable; the earlier file is unchanged"
    return "the earlier file is unchanged"


def replace_together(drafts: dict[Path, Path], aside: Path) -> None:
    """Moves files or folders to their places: all of them, or none, and then the earlier ones are back.

    The earlier ones are moved away in the given order, and the drafts in the opposite one: name first the file of a
    pair that a reader opens first.

    Args:
        drafts: place -> file or folder to move there, on the same disk.
        aside: an empty folder on that disk, for the earlier files.

    Raises:
        OSError: a file could not be moved.
    """
    for draft in drafts.values():
        for path in draft.rglob("*") if draft.is_dir() else (draft,):
            _sync(path)
    earlier = {place: aside / place.name for place in drafts if place.exists()}
    try:
        for place, refuge in earlier.items():
            place.rename(refuge)
        for place, draft in reversed(drafts.items()):
            draft.rename(place)
    except BaseException:  # Ctrl-C too; moved files are found on the disk, not remembered
        _restore(drafts, earlier)
        raise
    for folder in {place.parent for place in drafts}:
        _sync(folder)


def _restore(drafts: dict[Path, Path], earlier: dict[Path, Path]) -> None:
    """Undoes a partial replacement: moves drafts back from their places, and earlier files back to theirs."""
    for place, draft in drafts.items():
        if not draft.exists():
            place.rename(draft)
    for place, refuge in earlier.items():
        if refuge.exists():
            refuge.rename(place)


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk, so that a move survives a power cut."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """True for a temporary file of :func:`atomic_write` that was not moved to its place."""
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of :func:`atomic_write` that a killed process left in a folder, not below it.

    Raises:
        StorageFailed: the folder is not writable.
    """
    with storage_errors(f"clear {folder}"):
        for path in folder.glob(".*"):
            if is_temporary(path):
                path.unlink()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` as UTF-8, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def without_nan(value: Any) -> Any:
    """The same values as JSON can hold them: null for NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; refuses NaN and infinity, which are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, schema: str | None = None, hint: str = "") -> Any:
    """Values of a JSON file, which must state the schema if there is one.

    Raises:
        DfadcError: it cannot be read, or is of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DfadcError(f"cannot read {path}: {exc}", hint) from exc
    stated = document.get("schema") if isinstance(document, dict) else None
    if schema is not None and stated != schema:
        raise DfadcError(f"{path} has schema {stated!r}, this dfadc reads {schema!r}", hint)
    return document


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:  # hashlib.file_digest is not in Python 3.10, which a device may have.
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
