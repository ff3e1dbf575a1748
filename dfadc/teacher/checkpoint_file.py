"""Reader of files of ``torch.save``: zip archives, legacy pickles and the tar files of torch 0.1."""

from __future__ import annotations

import pickle
import struct
import tarfile
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dfadc.errors import DfadcError
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.module_tree import class_name, is_complete
from dfadc.teacher.teacher_file import DAMAGED, SAVE_AGAIN, TeacherFile, first_line
from dfadc.teacher.training_arguments import read_training_arguments
from dfadc.teacher.unpickle import inert_pickle_module, trusting_pickle_module
from dfadc.teacher.weights import find_weights

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN = 6
#: What torch and pickle raise on a damaged file, and on one of another make.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, struct.error, tarfile.TarError),
)


def read_checkpoint(
    path: Path, kind: FileKind, *, trust: bool, weights: str | None = None, code: str | None = None
) -> TeacherFile:
    """Reads weights or a whole network out of a checkpoint.

    Args:
        path: the file.
        kind: by bytes.
        trust: whether code in the file may run; else what is not on the safe list becomes inert records.
        weights: ``--teacher-weights``: ``ema``, ``raw`` or a key.
        code: ``file.py:Net`` whose module stands for ``__main__`` in a trusted file.

    Raises:
        DfadcError: it is damaged, holds no weights, or names code that acts on the system.
    """
    pickles = trusting_pickle_module(code) if trust else inert_pickle_module()
    value = _torch_load(path, kind, pickle_module=pickles, trust=trust)
    inert = () if trust else tuple(sorted(pickles.Unpickler.seen))
    notes = ["loaded with --trust-teacher: code of the file may have run"] if trust else []
    if inert:
        more = f" and {len(inert) - _SHOWN} more" if len(inert) > _SHOWN else ""
        notes.append(f"read as plain records, none of their code ran: {', '.join(inert[:_SHOWN])}{more}")
    found = find_weights(value, path, weights)
    notes += found.notes
    is_whole = isinstance(found.network, nn.Module) and (trust or is_complete(found.network))
    network_class = "" if found.network is None or is_whole else class_name(found.network)
    if network_class:
        notes.append(f"weights of a whole network of class {network_class}, whose code was not run")
    return TeacherFile(
        path,
        kind,
        None if is_whole else found.tensors,
        found.network if isinstance(found.network, nn.Module) and is_whole else None,
        notes=tuple(notes),
        arguments=read_training_arguments(value),
        inert=inert,
        network_class=network_class,
    )


def _torch_load(path: Path, kind: FileKind, *, pickle_module: Any, trust: bool) -> object:
    # Only zip archives can be mapped, which spares a second copy of the weights in memory. torch takes any path that
    # ends in .safetensors for such a file, whatever it holds: then it gets the open file instead.
    by_path = kind is FileKind.CHECKPOINT and path.suffix != ".safetensors"
    settings: dict[str, Any] = {"map_location": "cpu", "weights_only": False, "pickle_module": pickle_module}
    settings["encoding"] = "latin1"  # of texts and arrays that Python 2 pickled; Python 3 writes UTF-8 whatever is said
    try:
        with warnings.catch_warnings():
            # torch on old formats, Python on tar files without a filter.
            warnings.simplefilter("ignore")
            if by_path:
                return torch.load(path, mmap=True, **settings)
            with path.open("rb") as stream:
                return torch.load(stream, **settings)
    except pickle.UnpicklingError as exc:
        raise DfadcError(f"{path} cannot be loaded: {first_line(exc)}", SAVE_AGAIN) from exc
    except (AttributeError, ImportError) as exc:
        if not trust:
            raise DfadcError(f"cannot read {path}: {exc}", DAMAGED) from exc
        raise DfadcError(
            f"{path} needs code that is not here: {exc}",
            "name the file that defines its network: --teacher-arch file.py:Net; that needs no --trust-teacher",
        ) from exc
    except _UNREADABLE as exc:
        raise DfadcError(f"cannot read {path}: {first_line(exc)}", DAMAGED) from exc
