"""Readers of TorchScript and exported programs, which are code and run only where the user trusts them."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.teacher.exported_norms import restore_batch_norms_
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.teacher_file import DAMAGED, SAVE_AGAIN, TeacherFile, first_line

if TYPE_CHECKING:
    from pathlib import Path


def read_torchscript(path: Path, *, trust: bool) -> TeacherFile:
    """Reads a TorchScript archive.

    Raises:
        DfadcError: it is not trusted, or damaged.
    """
    _refuse_code(path, FileKind.TORCHSCRIPT, trust=trust)
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript; files of it will be around for years.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as exc:
        raise DfadcError(f"cannot load {path}: {first_line(exc)}", DAMAGED) from exc
    note = "TorchScript, run with --trust-teacher; its norm layers cannot be read"
    return TeacherFile(path, FileKind.TORCHSCRIPT, module=module, notes=(note,))


def read_exported_program(path: Path, *, trust: bool) -> TeacherFile:
    """Reads a ``.pt2`` file of ``torch.export.save``, which states the size of its images.

    Raises:
        DfadcError: it is not trusted, or damaged.
    """
    _refuse_code(path, FileKind.EXPORTED_PROGRAM, trust=trust)
    try:
        program = torch.export.load(path)
    except (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as exc:
        raise DfadcError(f"cannot load {path}: {first_line(exc)}", DAMAGED) from exc
    size: tuple[int, int, int] | None = None
    examples = program.example_inputs
    image = examples[0][0] if examples and examples[0] else None
    if isinstance(image, Tensor) and image.ndim == 4:
        size = (int(image.shape[1]), int(image.shape[2]), int(image.shape[3]))
    module = program.module()
    restore_batch_norms_(module)
    note = "exported program, run with --trust-teacher"
    return TeacherFile(path, FileKind.EXPORTED_PROGRAM, module=module, input_size=size, notes=(note,))


def _refuse_code(path: Path, kind: FileKind, *, trust: bool) -> None:
    if not trust:
        raise DfadcError(
            f"{path} is {kind}, which is code; loading it can run anything",
            f"if you trust the file, pass --trust-teacher; else {SAVE_AGAIN.partition('; or')[0]}",
        )
