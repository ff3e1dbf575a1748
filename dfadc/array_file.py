"""Named arrays of an .npz file; the size of each is checked by its header before it is unpacked. numpy only."""

from __future__ import annotations

import math
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import numpy.typing as npt

#: Largest ratio of unpacked to packed size of a large array: a decompression bomb has 1000, a mask 100.
_MAX_RATIO = 200
_UNSUSPECTED_BYTES = 2**30
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_NAMED = 5


def read_arrays(
    path: Path, names: Collection[str], *, optional: Collection[str] = (), limit_bytes: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Reads the named arrays of an .npz; unpacks no others, and no pickle.

    Args:
        path: the file.
        names: arrays that must be there.
        optional: arrays that are read if they are there.
        limit_bytes: largest sum of the arrays' sizes; None leaves only the bound against decompression bombs.

    Raises:
        KeyError: an array is missing; the message lists those that are there.
        OSError, ValueError: the file cannot be read, is damaged, or unpacks to more than the limit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if missing := [name for name in names if name not in entries]:
                there = list(entries)
                more = ", …" if len(there) > _NAMED else ""
                raise KeyError(f"no `{missing[0]}` (found: {', '.join(there[:_NAMED]) or 'nothing'}{more})")
            chosen = {name: entries[name] for name in (*names, *optional) if name in entries}
            file_bytes = path.stat().st_size
            sizes = {name: _checked_size(archive, entry, file_bytes) for name, entry in chosen.items()}
            if limit_bytes is not None and sum(sizes.values()) > limit_bytes:
                raise ValueError(f"unpacks to {sum(sizes.values())} bytes, more than {limit_bytes}")
            arrays = {}
            for name, entry in chosen.items():
                with archive.open(entry) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
            return arrays
    except MemoryError as exc:
        raise ValueError("its arrays do not fit into memory") from exc
    # zipfile raises RuntimeError for an encrypted entry, and its subclass NotImplementedError for a compression.
    except (EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
        raise ValueError(str(exc) or type(exc).__name__) from exc


def _checked_size(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file_bytes: int) -> int:
    """Bytes of an array by its header, which must match the archive's size and a plausible compression."""
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADER_READERS:
            raise ValueError(f"arrays of format {version} are not read")
        shape, _, dtype = _HEADER_READERS[version](stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects")
        if min(shape, default=0) < 0 or stream.tell() + size != entry.file_size:
            raise ValueError(f"{entry.filename} is {shape} {dtype} by its header, and has another length")
    packed = min(entry.compress_size, file_bytes)
    if size > max(_UNSUSPECTED_BYTES, _MAX_RATIO * packed):
        raise ValueError(f"{entry.filename} unpacks from {packed} to {size} bytes: a decompression bomb")
    return size
