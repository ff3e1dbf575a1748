"""An .npz file of arrays and JSON metadata: sample sets and baselines. numpy only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.array_file import read_arrays
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: A file that unpacks to more than this is not read.
MAX_UNPACKED_BYTES = 2 * 2**30
REMAKE_HINT = "the file was changed or damaged: take it from the run again, or make the run's samples anew"


def write_archive(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes arrays and plain JSON values as one .npz, whole or not at all; the same values give the same bytes.

    Raises:
        StorageFailed: the file cannot be written.
    """
    text = np.array(json.dumps(metadata, sort_keys=True))
    # Uncompressed: generated images are noise to a compressor. An open file keeps numpy from adding a suffix.
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, metadata=text, **arrays)


def read_archive(
    path: Path, names: Sequence[str], *, schema: str, kind: str
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Reads metadata and named arrays of an .npz of :func:`write_archive`; checks the schema and nothing else.

    ``kind`` is the noun of the file in messages.

    Raises:
        DfadcError: it cannot be read, is something else or of another schema.
    """
    try:
        metadata = json.loads(str(read_arrays(path, ("metadata",), limit_bytes=MAX_UNPACKED_BYTES)["metadata"]))
        stated = metadata.get("schema") if isinstance(metadata, dict) else None
        if stated != schema:
            raise DfadcError(
                f"{path}: schema {stated!r}, this version reads {schema!r} in a {kind}",
                f"name a {kind}, and use the version that wrote it",
            )
        return metadata, read_arrays(path, names, limit_bytes=MAX_UNPACKED_BYTES)
    except KeyError as exc:
        raise DfadcError(f"{path} is not a dfadc {kind}: {exc.args[0]}", f"name a {kind} that dfadc wrote") from exc
    except (OSError, ValueError) as exc:
        raise DfadcError(f"{path} cannot be read as a {kind}: {exc}", REMAKE_HINT) from exc
