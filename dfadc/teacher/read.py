"""Opening a teacher file under the safety policy: bytes -> weights or a module, and no code unless it is trusted."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.network_file import read_safetensors, read_safetensors_metadata
from dfadc.networks.state_dict import CHECKPOINT_KEYS, is_state_dict, strip_wrapper_prefixes
from dfadc.teacher.exported_norms import restore_batch_norms_
from dfadc.teacher.file_kind import CODE_KINDS, FileKind, describe_unknown, sniff_kind
from dfadc.teacher.safe_globals import list_legacy_globals, list_unsafe_globals, resolve_allowed

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FileKind", "TeacherFile", "read_state_dict", "read_teacher_file", "sniff_kind"]

_SAVE_AGAIN = (
    "save the weights alone where the network's code is: torch.save(network.state_dict(), 'teacher.pt'), and name the "
    "architecture with --teacher-arch; or, if you trust the file, pass --trust-teacher"
)
_DAMAGED = "the file is damaged or cut off: copy or download it again"


@dataclass(frozen=True, slots=True)
class TeacherFile:
    """The contents of a teacher file: either weights or a whole module.

    Args:
        path: where it was read.
        kind: its kind, by bytes.
        state_dict: weights by name, wrapper prefixes removed; None where the file holds a module.
        module: the module, on the CPU; None where the file holds weights.
        metadata: free text of a safetensors file.
        input_size: (C, H, W) where the file itself says so (``.pt2``).
        notes: what was unwrapped or allowed, for the user.
    """

    path: Path
    kind: FileKind
    state_dict: Mapping[str, Tensor] | None = None
    module: nn.Module | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    input_size: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()


def read_teacher_file(path: Path, *, trust: bool = False) -> TeacherFile:
    """Reads any kind of teacher file.

    Args:
        path: the file.
        trust: whether code in the file may run (``--trust-teacher``).

    Raises:
        DfadcError: the file is missing, damaged, of a kind that cannot teach, or would run code and is not trusted.
    """
    kind = sniff_kind(path)
    if kind is FileKind.SAFETENSORS:
        metadata = read_safetensors_metadata(path)
        return TeacherFile(path, kind, strip_wrapper_prefixes(read_safetensors(path)), metadata=metadata)
    if kind in (FileKind.CHECKPOINT, FileKind.LEGACY_CHECKPOINT):
        value, notes = _unpickle(path, kind, trust=trust)
        return _unwrap_checkpoint(path, kind, value, notes)
    if kind in CODE_KINDS:
        if not trust:
            raise DfadcError(
                f"{path} is {kind}, which is code; loading it can run anything",
                f"if you trust the file, pass --trust-teacher; else {_SAVE_AGAIN.partition('; or')[0]}",
            )
        return _load_script(path) if kind is FileKind.TORCHSCRIPT else _load_exported_program(path)
    if kind is FileKind.ONNX:
        raise DfadcError(
            f"{path} is an ONNX file: adversarial distillation needs gradients through the teacher, which ONNX has not",
            "give the PyTorch weights it was exported from",
        )
    if kind is FileKind.ENGINE:
        raise DfadcError(
            f"{path} is a TensorRT engine: it is compiled for one GPU and has no gradients",
            "give the PyTorch weights it was built from",
        )
    raise DfadcError(
        f"{path} is {describe_unknown(path)}, not a teacher file",
        "a teacher is a .safetensors file or a checkpoint of torch.save",
    )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights of a file, for ``student.weights``; no code of the file is run.

    Raises:
        DfadcError: as :func:`read_teacher_file`, or the file is code.
    """
    contents = read_teacher_file(path)
    if contents.state_dict is not None:
        return dict(contents.state_dict)
    assert contents.module is not None, "a teacher file holds weights or a module"  # noqa: S101
    return strip_wrapper_prefixes(contents.module.state_dict())


def _unpickle(path: Path, kind: FileKind, *, trust: bool) -> tuple[object, tuple[str, ...]]:
    """Loads a checkpoint with torch's safe unpickler, after allowing the layer classes it names."""
    if trust:
        return _torch_load(path, kind, weights_only=False), (
            "loaded with --trust-teacher: code of the file may have run",
        )
    try:
        unsafe = list_unsafe_globals(path) if kind is FileKind.CHECKPOINT else list_legacy_globals(path)
    except (EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as exc:
        raise DfadcError(f"cannot read {path}: {exc}", _DAMAGED) from exc
    if kind is FileKind.LEGACY_CHECKPOINT:
        known = torch._weights_only_unpickler._get_allowed_globals()  # noqa: SLF001
        unsafe = [name for name in unsafe if name not in known]
    allowed, refused = resolve_allowed(unsafe)
    if refused:
        shown = ", ".join(refused[:6]) + (f" and {len(refused) - 6} more" if len(refused) > 6 else "")
        raise DfadcError(
            f"{path} is a pickle that names code outside the safe list: {shown}; it was not run", _SAVE_AGAIN
        )
    with torch.serialization.safe_globals(list(allowed)):
        value = _torch_load(path, kind, weights_only=True)
    notes = (f"{len(allowed)} layer classes of torch, torchvision or timm restored",) if allowed else ()
    return value, notes


def _torch_load(path: Path, kind: FileKind, *, weights_only: bool) -> object:
    # Only zip archives can be mapped, which spares a second copy of the weights in memory. torch takes any path that
    # ends in .safetensors for such a file, whatever it holds: then it gets the open file instead.
    by_path = kind is FileKind.CHECKPOINT and path.suffix != ".safetensors"
    try:
        if by_path:
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as exc:
        raise DfadcError(
            f"{path} cannot be loaded without running code: {_unpickling_reason(exc)}", _SAVE_AGAIN
        ) from exc
    except (AttributeError, ImportError) as exc:
        raise DfadcError(
            f"{path} needs code that is not here: {exc}", "run dfadc where the network's code can be imported"
        ) from exc
    except (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError) as exc:
        raise DfadcError(f"cannot read {path}: {str(exc).strip().splitlines()[0]}", _DAMAGED) from exc


def _unpickling_reason(exc: pickle.UnpicklingError) -> str:
    """The reason in torch's long message, which otherwise advises to load unsafely."""
    text = str(exc).rpartition("WeightsUnpickler error:")[2].strip() or "it is no pickle of torch.save"
    return text.splitlines()[0]


def _unwrap_checkpoint(path: Path, kind: FileKind, value: object, notes: tuple[str, ...]) -> TeacherFile:
    """Finds the weights or the module in what was unpickled."""
    trail: list[str] = []
    while isinstance(value, Mapping) and not is_state_dict(value):
        key = next((key for key in CHECKPOINT_KEYS if isinstance(value.get(key), Mapping | nn.Module)), None)
        if key is None:
            keys = ", ".join(map(str, list(value)[:6]))
            raise DfadcError(
                f"{path} holds no weights under any known key (its keys: {keys or 'none'})",
                f"known keys: {', '.join(CHECKPOINT_KEYS)}; or save the state dict alone",
            )
        others = [
            other for other in CHECKPOINT_KEYS if other != key and isinstance(value.get(other), Mapping | nn.Module)
        ]
        trail.append(key + (f" (there is also {', '.join(others)})" if others else ""))
        value = value[key]
    if trail:
        notes = (*notes, f"weights taken from key {' > '.join(trail)}")
    if isinstance(value, nn.Module):
        inner: Any = value.module if isinstance(value, nn.DataParallel) else value
        return TeacherFile(path, kind, module=inner, notes=notes)
    if isinstance(value, Mapping):
        return TeacherFile(path, kind, strip_wrapper_prefixes(value), notes=notes)
    raise DfadcError(f"{path} holds a {type(value).__name__}, neither weights nor a network", _SAVE_AGAIN)


def _load_script(path: Path) -> TeacherFile:
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript; files of it will be around for years.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as exc:
        raise DfadcError(f"cannot load {path}: {str(exc).strip().splitlines()[0]}", _DAMAGED) from exc
    return TeacherFile(
        path,
        FileKind.TORCHSCRIPT,
        module=module,
        notes=("TorchScript, run with --trust-teacher; its norm layers cannot be read",),
    )


def _load_exported_program(path: Path) -> TeacherFile:
    try:
        program = torch.export.load(path)
    except (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as exc:
        raise DfadcError(f"cannot load {path}: {str(exc).strip().splitlines()[0]}", _DAMAGED) from exc
    size: tuple[int, int, int] | None = None
    examples = program.example_inputs
    image = examples[0][0] if examples and examples[0] else None
    if isinstance(image, Tensor) and image.ndim == 4:
        size = (int(image.shape[1]), int(image.shape[2]), int(image.shape[3]))
    module = program.module()
    restore_batch_norms_(module)
    return TeacherFile(
        path,
        FileKind.EXPORTED_PROGRAM,
        module=module,
        input_size=size,
        notes=("exported program, run with --trust-teacher",),
    )
