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
from dfadc.teacher.teacher_file import DAMAGED, SAVE_AGAIN, TeacherFile
from dfadc.teacher.training_arguments import read_training_arguments
from dfadc.teacher.unpickle import inert_pickle_module, trusting_pickle_module
from dfadc.teacher.weights import find_weights

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN = 6
#: What torch and pickle raise on a damaged file, and on one of another make.
_UNREADABLE = (
    *(
        AssertionError,
        EOFError,
        IndexError,
        KeyError,
        MemoryError,
        OSError,
        OverflowError,
        RecursionError,
        RuntimeError,
    ),
    *(TypeError, ValueError, struct.error, tarfile.TarError),
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
    inert: tuple[str, ...] = ()
    if trust:
        value = _torch_load(path, kind, pickle_module=trusting_pickle_module(code), trust=True)
        notes = ["loaded with --trust-teacher: code of the file may have run"]
    else:
        pickles = inert_pickle_module()
        value = _torch_load(path, kind, pickle_module=pickles, trust=False)
        inert = tuple(sorted(pickles.Unpickler.seen))
        notes = [_describe_inert(inert)] if inert else []
    found = find_weights(value, path, weights)
    notes = [*notes, *found.notes]
    arguments = read_training_arguments(value)
    if isinstance(found.network, nn.Module) and (trust or is_complete(found.network)):
        return TeacherFile(path, kind, module=found.network, notes=tuple(notes), arguments=arguments, inert=inert)
    network_class = "" if found.network is None else class_name(found.network)
    if network_class:
        notes.append(f"weights of a whole network of class {network_class}, whose code was not run")
    return TeacherFile(
        path,
        kind,
        found.tensors,
        notes=tuple(notes),
        arguments=arguments,
        inert=inert,
        network_class=network_class,
    )


def _describe_inert(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"read as plain records, none of their code ran: {', '.join(names[:_SHOWN])}{more}"


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
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else "it is no pickle of torch.save"
        raise DfadcError(f"{path} cannot be loaded: {reason}", SAVE_AGAIN) from exc
    except (AttributeError, ImportError) as exc:
        if not trust:
            raise DfadcError(f"cannot read {path}: {exc}", DAMAGED) from exc
        raise DfadcError(
            f"{path} needs code that is not here: {exc}",
            "name the file that defines its network: --teacher-arch file.py:Net; that needs no --trust-teacher",
        ) from exc
    except _UNREADABLE as exc:
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise DfadcError(f"cannot read {path}: {reason}", DAMAGED) from exc
