"""Kind of a file, told by its bytes and never by its suffix."""

from __future__ import annotations

import json
import re
import zipfile
from enum import StrEnum
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.teacher.unknown_file import describe_archive

if TYPE_CHECKING:
    from pathlib import Path


class FileKind(StrEnum):
    """Kinds of files that people call a teacher."""

    SAFETENSORS = "safetensors"
    CHECKPOINT = "PyTorch checkpoint (zip)"
    LEGACY_CHECKPOINT = "PyTorch checkpoint (legacy pickle)"
    TORCHSCRIPT = "TorchScript"
    EXPORTED_PROGRAM = "exported program (.pt2)"
    SHARDS = "index of sharded weights"
    FOLDER = "folder"
    ONNX = "ONNX"
    KERAS = "Keras"
    ENGINE = "TensorRT engine"
    UNKNOWN = "unknown"


#: Kinds that are code, and run only where the user trusts them.
CODE_KINDS = (FileKind.TORCHSCRIPT, FileKind.EXPORTED_PROGRAM)
#: Kinds of other frameworks, whose classes of converted networks would tell a user nothing.
CONVERTED_KINDS = (FileKind.ONNX, FileKind.KERAS)

#: A checkpoint that unpacks to more is refused before it is opened.
MAX_UNPACKED_BYTES = 16 * 2**30
#: torch stores its archives uncompressed; a ratio above this is a zip bomb.
MAX_COMPRESSION = 100

#: torch's magic number, pickled; protocol 4 and above may put a frame before it.
_LEGACY_MAGIC = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", re.DOTALL)
#: First members of the tar files of torch 0.1.
_TAR_MEMBERS = (b"sys_info", b"pickle", b"storages", b"tensors")
_ZIP_MAGIC = b"PK\x03\x04"
#: A larger JSON file is no index of shards.
_MAX_INDEX_BYTES = 64 * 2**20
#: Beginning of a file that is looked at: a tar header is 512 bytes long.
_HEAD_BYTES = 512
_ONNX_FIELDS = (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42, 0x72)


def sniff_kind(path: Path) -> FileKind:
    """Tells a file's kind without unpacking or running any of it.

    Raises:
        DfadcError: it does not exist, is empty, cannot be read, or is a damaged or oversized archive.
    """
    if path.is_dir():
        return FileKind.FOLDER
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
        size = path.stat().st_size
    except FileNotFoundError as exc:
        raise DfadcError(f"there is no file {path}", "check the path") from exc
    except OSError as exc:
        raise DfadcError(f"cannot read {path}: {exc.strerror or exc}", "check its permissions") from exc
    if not head:
        raise DfadcError(f"{path} is empty", "copy or download it again")
    if head.startswith(_ZIP_MAGIC):
        return _sniff_archive(path, size)
    kind = _sniff_head(head, path, size)
    if kind in (FileKind.LEGACY_CHECKPOINT, FileKind.SAFETENSORS):
        _refuse_large(path, size)
    return kind


def _sniff_head(head: bytes, path: Path, size: int) -> FileKind:
    """The kind of a file that is no zip archive, by its first bytes."""
    is_tar = head[257:262] == b"ustar" and head[:100].rstrip(b"\0").removeprefix(b"./") in _TAR_MEMBERS
    if _LEGACY_MAGIC.match(head) or is_tar:
        return FileKind.LEGACY_CHECKPOINT
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return FileKind.SAFETENSORS
    if head.lstrip().startswith(b"{") and _is_shard_index(path, size):
        return FileKind.SHARDS
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return FileKind.KERAS
    if re.match(rb"[a-z]trt", head):
        return FileKind.ENGINE
    # TensorFlow's SavedModel begins like ONNX; its second field is a message, ONNX's a producer's name.
    is_saved_model = head[1:3] == b"\x01\x12" and b"\x0a" in head[4:7]
    is_onnx = len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x20 and head[2] in _ONNX_FIELDS
    return FileKind.ONNX if is_onnx and not is_saved_model else FileKind.UNKNOWN


def _is_shard_index(path: Path, size: int) -> bool:
    """True for JSON that maps names of weights to files, as Hugging Face writes it beside shards."""
    if size > _MAX_INDEX_BYTES:
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    return isinstance(weight_map, dict) and bool(weight_map)


def _sniff_archive(path: Path, size: int) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise DfadcError(f"{path} is a damaged or cut-off archive: {exc}", "copy or download it again") from exc
    unpacked = sum(member.file_size for member in members)
    _refuse_large(path, unpacked)
    if unpacked > MAX_COMPRESSION * size:
        raise DfadcError(
            f"{path} unpacks to {unpacked / size:.0f} times its size; torch archives are not compressed",
            "this looks like a zip bomb; it was not opened",
        )
    names = [member.filename for member in members]
    # Constants alone are enough for torch.load to run the archive as a script.
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        return FileKind.TORCHSCRIPT
    if any(re.search(r"archive_format$|/models/.*\.json$", name) for name in names):
        return FileKind.EXPORTED_PROGRAM
    if any(name.endswith("/data.pkl") for name in names):
        return FileKind.CHECKPOINT
    if "model.weights.h5" in names:
        return FileKind.KERAS
    description, remedy = describe_archive(names)
    raise DfadcError(f"{path} is {description} (it holds {', '.join(names[:3]) or 'nothing'})", remedy)


def _refuse_large(path: Path, num_bytes: int) -> None:
    if num_bytes > MAX_UNPACKED_BYTES:
        raise DfadcError(
            f"{path} holds {num_bytes / 2**30:.1f} GiB; at most {MAX_UNPACKED_BYTES / 2**30:.0f} GiB are opened"
        )
