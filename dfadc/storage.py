"""Files that are whole or absent: atomic writes, hashes, and storage errors with their own exit code. Free of torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.errors import StorageFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

#: ``.NAME.`` and eight random characters, then the suffix of NAME again: how :func:`atomic_write` names temporaries.
_TEMPORARY = re.compile(r"\..+(\.[A-Za-z0-9]+)\.[a-z0-9_]{8}\1")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and moves it over ``path`` once the block has succeeded.

    A reader, or a process started after a crash, sees the old file or the new one, never a part.

    Raises:
        StorageFailed: the disk is full, read-only or not permitted; ``path`` is as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as exc:
        raise StorageFailed(
            f"cannot write {path}: {exc.strerror or exc}",
            "free some space or choose a writable --out; what was there before is unchanged",
        ) from exc
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of :func:`atomic_write` that a killed process left in a folder, not below it.

    Raises:
        StorageFailed: the folder is not writable.
    """
    try:
        for path in folder.glob(".*"):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()
    except OSError as exc:
        raise StorageFailed(f"cannot clear {folder}: {exc.strerror or exc}") from exc


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` as UTF-8, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; NaN and infinity are refused, for they are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:  # hashlib.file_digest is not in Python 3.10, which a device may have.
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
