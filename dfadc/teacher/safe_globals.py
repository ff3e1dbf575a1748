"""Which Python globals a pickled network may name: layers of torch, torchvision and timm, and nothing that acts."""

from __future__ import annotations

import functools
import importlib
import pickletools
import zipfile
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional
from torch.serialization import get_unsafe_globals_in_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Packages whose layer classes may be restored; importing their modules runs installed library code only.
LAYER_PACKAGES = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.")

#: The few other globals that library networks pickle. Calling any of them with any argument is harmless.
HARMLESS: dict[str, Callable[..., Any]] = {
    "functools.partial": functools.partial,
    "torch.nn.functional.relu": functional.relu,
    "torch.nn.functional.gelu": functional.gelu,
    "torch.nn.functional.silu": functional.silu,
    "torch.nn.parallel.data_parallel.DataParallel": nn.DataParallel,
}


def list_unsafe_globals(path: Path) -> list[str]:
    """Names of the globals in a checkpoint that torch's safe loader does not know; the pickle is read, never run.

    Empty for legacy files, which torch cannot list; :func:`list_legacy_globals` reads those.
    """
    if not zipfile.is_zipfile(path):
        return []
    return sorted(get_unsafe_globals_in_checkpoint(path))


def list_legacy_globals(path: Path) -> list[str]:
    """Names of all globals in a legacy checkpoint's pickles, read opcode by opcode and never run."""
    found: set[str] = set()
    with path.open("rb") as stream:
        # magic, protocol version, system information, the object, the storage keys
        for _ in range(5):
            try:
                for opcode, argument, _position in pickletools.genops(stream):
                    if opcode.name == "GLOBAL" and isinstance(argument, str):
                        found.add(argument.replace(" ", ".").replace("__builtin__.", "builtins."))
            except (ValueError, UnicodeDecodeError):
                break
    return sorted(found)


def resolve_allowed(names: list[str]) -> tuple[list[tuple[Callable[..., Any], str]], list[str]]:
    """Splits globals into allowed ones, ready for ``torch.serialization.safe_globals``, and refused names.

    Allowed are classes (classes only: a prefix alone would admit functions) that derive from ``nn.Module`` and are
    defined in a library's layer packages, and the few of :data:`HARMLESS`.
    """
    allowed: list[tuple[Callable[..., Any], str]] = []
    refused: list[str] = []
    for name in names:
        found = HARMLESS.get(name) or _layer_class(name)
        if found is None:
            refused.append(name)
        else:
            allowed.append((found, name))
    return allowed, refused


def _layer_class(name: str) -> type[nn.Module] | None:
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
