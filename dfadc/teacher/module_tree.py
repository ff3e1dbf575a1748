"""Parameter tree of an unpickled network whose class is not installed, as a state dict."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dfadc.teacher.unpickle import InertGlobal, Record

_PARTS = ("_parameters", "_buffers", "_modules")
#: Nesting of a network's modules that is followed; real ones have about ten.
_DEPTH = 40


def is_network(value: object) -> bool:
    """True for a module, and for the record of one."""
    return isinstance(value, nn.Module) or (isinstance(value, Record) and set(_PARTS) <= value.attributes.keys())


def is_complete(value: object) -> bool:
    """True for a module from whose attributes no record can be reached: it computes what its file says."""
    if not isinstance(value, nn.Module):
        return False
    waiting: list[object] = [value]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Record | InertGlobal):
            return False
        if id(value) in seen or isinstance(value, Tensor | str | int | float):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            waiting.append(vars(value))
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, functools.partial):
            waiting += [value.func, value.args, value.keywords]
    return True


def flatten_network(network: object, prefix: str = "", depth: int = _DEPTH) -> dict[str, Tensor]:
    """Tensors of a module or a module's record by their dotted names, without buffers that a state dict leaves out."""
    attributes: Mapping[str, Any] = network.attributes if isinstance(network, Record) else vars(network)
    left_out = attributes.get("_non_persistent_buffers_set")
    found: dict[str, Tensor] = {}
    for part in ("_parameters", "_buffers"):
        for name, tensor in _items(attributes.get(part)):
            if isinstance(tensor, Tensor) and not (isinstance(left_out, set) and name in left_out):
                found[f"{prefix}{name}"] = tensor.detach()
    for name, child in _items(attributes.get("_modules")):
        if is_network(child) and depth:
            found |= flatten_network(child, f"{prefix}{name}.", depth - 1)
    return found


def class_name(network: object) -> str:
    """``module.qualname`` of a network's class."""
    if isinstance(network, Record):
        return network.name
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _items(value: object) -> list[tuple[str, object]]:
    if isinstance(value, Record):
        value = value.entries
    return [(str(key), entry) for key, entry in value.items()] if isinstance(value, Mapping) else []
