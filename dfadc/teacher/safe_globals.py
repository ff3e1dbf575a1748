"""Python globals that a pickled checkpoint may call: tensor rebuilding, containers, layers of installed libraries."""

from __future__ import annotations

import functools
import importlib
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

#: Packages whose layer classes may be restored; importing their modules runs installed library code only.
LAYER_PACKAGES = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.")

_REBUILD = (
    torch._utils._rebuild_tensor,  # noqa: SLF001 -- the names that torch's files carry
    torch._utils._rebuild_tensor_v2,  # noqa: SLF001
    torch._utils._rebuild_tensor_v3,  # noqa: SLF001
    torch._utils._rebuild_qtensor,  # noqa: SLF001
)


def _parameter(data: Tensor, *_: object) -> nn.Parameter:
    """A parameter without the hooks and attributes that the file gives it."""
    return nn.Parameter(data, requires_grad=False)


def _plain_tensor(function: Callable[..., Tensor], _type: object, arguments: tuple[Any, ...], _state: object) -> Tensor:
    """The plain tensor behind a subclass of Tensor or a tensor with attributes."""
    if function is _parameter or any(function is known for known in _REBUILD):
        return function(*arguments)
    raise pickle.UnpicklingError("it rebuilds a tensor by an unknown function")


def _bytes(values: object = b"", encoding: str = "latin1") -> bytes:
    """Bytes of what protocols 0 to 2 call ``bytes``, ``bytearray`` and ``_codecs.encode`` with; never of a size."""
    if isinstance(values, str) and encoding in ("latin1", "latin-1"):
        return values.encode("latin1")
    if isinstance(values, bytes | list | tuple):
        return bytes(values)
    raise pickle.UnpicklingError(f"it makes {encoding} bytes of a {type(values).__name__}")


#: Globals that are called with the file's arguments, by the name that a file calls them. None acts outside its result.
CALLABLES: dict[str, Callable[..., Any]] = {
    **{f"torch._utils.{function.__name__}": function for function in _REBUILD},
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _plain_tensor,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},  # its factory is left out
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": complex,
    "_codecs.encode": _bytes,
    "functools.partial": functools.partial,
}
_STORAGES = tuple(f"{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool"))
#: Globals that are restored as values and never called while a file is read.
VALUES: dict[str, Any] = {
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **{str(scheme): scheme for scheme in (torch.per_tensor_affine, torch.per_channel_affine)},
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    **{f"torch.{name}": torch.serialization.StorageType(name) for name in _STORAGES},
    "torch.nn.functional.relu": functional.relu,
    "torch.nn.functional.gelu": functional.gelu,
    "torch.nn.functional.silu": functional.silu,
}
#: Packages and builtins that act on the system. No checkpoint needs them: a file that names one is refused as a whole.
_ACTING_PACKAGES = {
    *("os", "posix", "nt", "sys", "subprocess", "shutil", "pty", "socket"),
    *("runpy", "importlib", "ctypes", "webbrowser", "pdb", "bdb", "pip"),
}
_ACTING_BUILTINS = {
    *("eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "execfile", "globals", "locals"),
}


def refuse_acting(module_name: str, name: str) -> None:
    """Refuses a global that acts on the system.

    Raises:
        UnpicklingError: it does.
    """
    is_builtin = module_name in ("builtins", "__builtin__", "io", "_io", "codecs")
    if module_name.partition(".")[0] in _ACTING_PACKAGES or (is_builtin and name in _ACTING_BUILTINS):
        raise pickle.UnpicklingError(f"it names {module_name}.{name}, which acts on the system; it was not run")


def find_layer_class(name: str) -> type[nn.Module] | None:
    """The layer class of an installed library that a file names; None for anything else.

    A class only (a prefix alone would admit functions) that derives from ``nn.Module`` and is defined in a library's
    layer packages.
    """
    if name == "torch.nn.parallel.data_parallel.DataParallel":
        return nn.DataParallel
    module_name, _, attribute = name.rpartition(".")
    if not f"{module_name}.".startswith(LAYER_PACKAGES):
        return None
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError:
        return None
    # A re-exported name does not count: the class must be defined where the file says.
    if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module_name:
        return found
    return None
