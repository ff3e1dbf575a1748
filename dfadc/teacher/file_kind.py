"""What a file is, by its bytes and never by its suffix."""

from __future__ import annotations

import re
import zipfile
from enum import StrEnum
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from pathlib import Path


class FileKind(StrEnum):
    """Kinds of files that people call a teacher."""

    SAFETENSORS = "safetensors"
    CHECKPOINT = "PyTorch checkpoint (zip)"
    LEGACY_CHECKPOINT = "PyTorch checkpoint (legacy pickle)"
    TORCHSCRIPT = "TorchScript"
    EXPORTED_PROGRAM = "exported program (.pt2)"
    ONNX = "ONNX"
    ENGINE = "TensorRT engine"
    UNKNOWN = "unknown"


#: Kinds that are code, and run only where the user trusts them.
CODE_KINDS = (FileKind.TORCHSCRIPT, FileKind.EXPORTED_PROGRAM)

#: A checkpoint that unpacks to more is refused before it is opened.
MAX_UNPACKED_BYTES = 16 * 2**30
#: torch stores its archives uncompressed; a ratio above this is a zip bomb.
MAX_COMPRESSION = 100

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a"
_ZIP_MAGIC = b"PK\x03\x04"
_ONNX_FIELDS = (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42, 0x72)
_ENGINE_MAGIC = re.compile(rb"[a-z]trt")


def sniff_kind(path: Path) -> FileKind:
    """Tells a file's kind without unpacking or running any of it.

    Raises:
        DfadcError: it does not exist, is a folder, is empty, cannot be read, or is a damaged or oversized archive.
    """
    head, size = _read_head(path)
    if head.startswith(_ZIP_MAGIC):
        return _sniff_archive(path, size)
    if head.startswith(_LEGACY_MAGIC):
        _refuse_large(path, size)
        return FileKind.LEGACY_CHECKPOINT
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        _refuse_large(path, size)
        return FileKind.SAFETENSORS
    if _ENGINE_MAGIC.match(head):
        return FileKind.ENGINE
    if len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x20 and head[2] in _ONNX_FIELDS:
        return FileKind.ONNX
    return FileKind.UNKNOWN


def describe_unknown(path: Path) -> str:
    """A guess at what a file of unknown kind is, for the error message."""
    head, _ = _read_head(path)
    text = head.lstrip().lower()
    known = (
        (text.startswith((b"<!doctype", b"<html", b"<?xml")), "an HTML page (a download that failed?)"),
        (text.startswith(b"version https://git-lfs"), "a Git LFS pointer (run `git lfs pull`)"),
        (head.startswith(b"\x80"), "a plain Python pickle, which only running it could open"),
        (head.startswith(b"\x89HDF"), "an HDF5 file (Keras?)"),
        (head[4:8] == b"TFL3", "a TensorFlow Lite model"),
        (head.startswith(b"\x1f\x8b"), "a gzip archive"),
        (text.startswith((b"{", b"[")), "JSON text"),
    )
    for matches, description in known:
        if matches:
            return description
    printable = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "a text file" if printable else f"of no known kind (it starts with {head[:8].hex(' ')})"


def _read_head(path: Path) -> tuple[bytes, int]:
    if path.is_dir():
        raise DfadcError(f"{path} is a folder, not a teacher file", "name the file in it")
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
        size = path.stat().st_size
    except FileNotFoundError as exc:
        raise DfadcError(f"there is no file {path}", "check the path") from exc
    except OSError as exc:
        raise DfadcError(f"cannot read {path}: {exc.strerror or exc}", "check its permissions") from exc
    if not head:
        raise DfadcError(f"{path} is empty", "copy or download it again")
    return head, size


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
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        return FileKind.TORCHSCRIPT
    if any(name.endswith("archive_format") for name in names) or any(
        "/models/" in name and name.endswith(".json") for name in names
    ):
        return FileKind.EXPORTED_PROGRAM
    if any(name.endswith("/data.pkl") for name in names):
        return FileKind.CHECKPOINT
    raise DfadcError(
        f"{path} is a zip archive, but no PyTorch file (it holds {', '.join(names[:3]) or 'nothing'})",
        "unpack it and name the file inside",
    )


def _refuse_large(path: Path, num_bytes: int) -> None:
    if num_bytes > MAX_UNPACKED_BYTES:
        raise DfadcError(
            f"{path} holds {num_bytes / 2**30:.1f} GiB; at most {MAX_UNPACKED_BYTES / 2**30:.0f} GiB are opened"
        )
