"""Opening a teacher file under the safety policy: bytes -> kind -> its reader, and no code unless it is trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dfadc.errors import DfadcError
from dfadc.networks.network_file import read_safetensors, read_safetensors_metadata
from dfadc.networks.state_dict import strip_wrapper_prefixes
from dfadc.teacher.checkpoint_file import read_checkpoint
from dfadc.teacher.exported_file import read_exported_program, read_torchscript
from dfadc.teacher.file_kind import FileKind, sniff_kind
from dfadc.teacher.hub_folder import describe_timm, read_hub_config, read_transformers
from dfadc.teacher.sidecar import stated_output
from dfadc.teacher.teacher_file import TeacherFile
from dfadc.teacher.unknown_file import describe_unknown, weights_in_folder
from dfadc.teacher.weights import find_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


class _Request(NamedTuple):
    path: Path
    kind: FileKind
    trust: bool
    weights: str | None
    architecture: str | None
    output: str | None


def _read_safetensors(request: _Request) -> TeacherFile:
    path = request.path
    metadata = read_safetensors_metadata(path)
    found = find_weights(read_safetensors(path), path, request.weights)
    return TeacherFile(path, FileKind.SAFETENSORS, found.tensors, metadata=metadata, notes=found.notes)


def _read_shards(request: _Request) -> TeacherFile:
    """Reads the shards that an index ``*.index.json`` names, in the index's own folder."""
    path = request.path
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
    found = find_weights(tensors, path, request.weights)
    return TeacherFile(path, FileKind.SHARDS, found.tensors, notes=(f"{len(names)} shards read", *found.notes))


def _read_checkpoint(request: _Request) -> TeacherFile:
    code = request.architecture if request.trust else None
    return read_checkpoint(request.path, request.kind, trust=request.trust, weights=request.weights, code=code)


def _read_onnx(request: _Request) -> TeacherFile:
    from dfadc.teacher.onnx_teacher import read_onnx  # noqa: PLC0415 -- onnx and ONNX Runtime take half a second

    return read_onnx(request.path, output=request.output)


def _read_keras(request: _Request) -> TeacherFile:
    from dfadc.teacher.keras_teacher import read_keras  # noqa: PLC0415 -- with the extra alone

    return read_keras(request.path, trust=request.trust)


def _refuse_unknown(request: _Request) -> TeacherFile:
    description, remedy = describe_unknown(request.path)
    raise DfadcError(f"{request.path} is {description}, not a teacher file", remedy)


#: Kind -> its reader; a kind more is a module and a line more.
READERS: dict[FileKind, Callable[[_Request], TeacherFile]] = {
    FileKind.SAFETENSORS: _read_safetensors,
    FileKind.SHARDS: _read_shards,
    FileKind.CHECKPOINT: _read_checkpoint,
    FileKind.LEGACY_CHECKPOINT: _read_checkpoint,
    FileKind.TORCHSCRIPT: lambda given: read_torchscript(given.path, trust=given.trust),
    FileKind.EXPORTED_PROGRAM: lambda given: read_exported_program(given.path, trust=given.trust),
    FileKind.ONNX: _read_onnx,
    FileKind.KERAS: _read_keras,
    FileKind.ENGINE: _refuse_unknown,
    FileKind.UNKNOWN: _refuse_unknown,
}


def read_teacher_file(
    path: Path,
    *,
    trust: bool = False,
    weights: str | None = None,
    architecture: str | None = None,
    output: str | None = None,
) -> TeacherFile:
    """Reads any kind of teacher file.

    Args:
        path: the file, or a folder that holds one file of weights.
        trust: whether code in the file may run (``--trust-teacher``).
        weights: weights to take where a file holds several (``--teacher-weights``): ``ema``, ``raw`` or a key.
        architecture: ``file.py:Net`` that a trusted file may mean by ``__main__.Net``.
        output: output to take where the network gives several (``--output``); by default the one that a sidecar states.

    Raises:
        DfadcError: the file is missing, damaged, of a kind that cannot teach, or would run code and is not trusted.
    """
    kind = sniff_kind(path)
    if kind is FileKind.FOLDER:
        path = weights_in_folder(path)
        kind = sniff_kind(path)
    config = read_hub_config(path) if architecture is None else None
    output = stated_output(path) if output is None else output
    if config is not None and "model_type" in config:
        return replace(read_transformers(path, config, trust=trust), output=output)
    contents = replace(READERS[kind](_Request(path, kind, trust, weights, architecture, output)), output=output)
    return contents if config is None else describe_timm(contents, config)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights of a file, for ``student.weights``; no code of the file is run.

    Raises:
        DfadcError: as :func:`read_teacher_file`, or the file is code.
    """
    return strip_wrapper_prefixes(read_teacher_file(path).tensors)
