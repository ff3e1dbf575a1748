"""Likely input sizes of a teacher that nobody states, each with its reason and a command to paste."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import TYPE_CHECKING

import torch

from dfadc.errors import DfadcError
from dfadc.networks.flops import in_eval_mode
from dfadc.networks.names import documented_contract
from dfadc.networks.user_code import running_user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dfadc.teacher.match import Identity

Size = tuple[int, int, int]

#: Sides that data sets and libraries have.
_SIDES = (8, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 84, 96, 100, 112, 128, 150, 160, 192, 200, 224, 240, 256, 299, 320)
#: Where more sides than this are taken, a network takes any.
_FEW = 4
_SECONDS = 2.0


def likely_sizes(identity: Identity) -> dict[Size, str]:
    """Sizes (C, H, W) that a network was made for, each with its reason, the likelier first; empty: nothing tells."""
    channels = identity.channels or 3
    if identity.module is not None:
        module = identity.module

        def call(side: int) -> None:
            with running_user_code("it takes no such images"), torch.no_grad(), in_eval_mode(module):
                module(torch.zeros(1, channels, side, side))

        sides = sides_taken(call, _SECONDS)
        if 0 < len(sides) <= _FEW:
            return {(channels, side, side): "its layers take few sizes, this one of them" for side in sides}
    if identity.stem != "default":
        return {(channels, 32, 32): f"usual with the {identity.stem} stem"}
    with contextlib.suppress(DfadcError):
        documented = documented_contract(identity.architecture).input_size
        if documented is not None:
            return {
                (channels, *documented[1:]): f"documented for {identity.architecture}",
                (channels, 32, 32): "of small images",
            }
    return {}


def sides_taken(take: Callable[[int], object], seconds: float) -> list[int]:
    """Sides of square images that a network takes without an error, of those that were tried in this time."""
    taken = []
    deadline = time.monotonic() + seconds
    for side in _SIDES:
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(DfadcError):
            take(side)
            taken.append(side)
    return taken


def commands(sizes: Mapping[Size, str], path: object, architecture: str | None) -> str:
    """Commands that show the teacher at each size, with the size's reason; empty where there are none."""
    named = "" if architecture is None else f" --teacher-arch {shlex.quote(architecture)}"
    shown = f"dfadc inspect {shlex.quote(str(path))}{named} --input-size"
    return ", ".join(f"`{shown} {'x'.join(map(str, size))}` ({reason})" for size, reason in sizes.items())
