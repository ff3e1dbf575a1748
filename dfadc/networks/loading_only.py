"""Construction of a user's network whose weights are loaded next: nothing is downloaded, nothing moves to a GPU."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Functions that fetch published weights, by the module that defines them.
_FETCHING = (("torch.hub", "load_state_dict_from_url"), ("timm.models._builder", "load_pretrained"))


class _NotFetched(dict[str, Any]):
    """Stands for published weights; code that removes some of them finds none."""

    def __delitem__(self, key: str) -> None:
        self.pop(key, None)

    def pop(self, key: str, default: Any = None) -> Any:  # noqa: ARG002 -- a dict's
        """The default: nothing is here."""
        return default


@contextmanager
def loading_only() -> Iterator[None]:
    """Leaves out ``pretrained=True`` and ``.cuda()`` of a constructor, for as long as the block runs.

    Published weights would be overwritten by the file's, and fetching them fails or hangs on a machine without network.
    """
    load = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, _NotFetched):
            return torch.nn.modules.module._IncompatibleKeys([], [])  # noqa: SLF001 -- what it returns
        return load(self, state_dict, *args, **kwargs)

    changes: list[tuple[Any, str, Any]] = [
        (nn.Module, "load_state_dict", load_state_dict),
        (nn.Module, "cuda", lambda self, *_, **__: self),
        (Tensor, "cuda", lambda self, *_, **__: self),
    ]
    for place, name in _FETCHING:
        original = getattr(sys.modules.get(place), name, None)
        users = [
            module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is original
        ]
        changes += [(module, name, lambda *_, **__: _NotFetched()) for module in users if original]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
