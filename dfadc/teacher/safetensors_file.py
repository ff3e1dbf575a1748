"""Reader of safetensors files, alone or in shards that an index names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.networks.network_file import read_safetensors, read_safetensors_metadata
from dfadc.teacher.file_kind import FileKind, sniff_kind
from dfadc.teacher.teacher_file import TeacherFile
from dfadc.teacher.weights import find_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_safetensors_file(path: Path, *, weights: str | None = None) -> TeacherFile:
    """Reads a safetensors file.

    Raises:
        DfadcError: it is damaged, or holds no weights.
    """
    metadata = read_safetensors_metadata(path)
    found = find_weights(read_safetensors(path), path, weights)
    return TeacherFile(path, FileKind.SAFETENSORS, found.tensors, metadata=metadata, notes=found.notes)


def read_shards(path: Path, *, weights: str | None = None) -> TeacherFile:
    """Reads the shards that an index ``*.index.json`` names, in the index's own folder.

    Raises:
        DfadcError: the index is no index, or a shard is missing, lies elsewhere or is damaged.
    """
    from dfadc.teacher.checkpoint_file import read_checkpoint  # noqa: PLC0415 -- shards of either format

    index = json.loads(path.read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    names = sorted({str(name) for name in index["weight_map"].values()})
    for name in names:
        shard = path.parent / name
        if shard.parent != path.parent or not shard.is_file():
            raise DfadcError(
                f"{path} names the shard {name}, which is not beside it", "copy all shards into one folder"
            )
        kind = sniff_kind(shard)
        if kind is FileKind.SAFETENSORS:
            tensors |= read_safetensors(shard)
        else:
            tensors |= read_checkpoint(shard, kind, trust=False).state_dict or {}
    missing = [name for name in index["weight_map"] if name not in tensors]
    if missing:
        raise DfadcError(f"{path} lists {missing[0]}, which none of its shards holds", "copy the shards again")
    found = find_weights(tensors, path, weights)
    return TeacherFile(path, FileKind.SHARDS, found.tensors, notes=(f"{len(names)} shards read", *found.notes))
