"""Likely input sizes of a teacher that nobody states, each with its reason and a command to paste."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from dfadc.errors import DfadcError
from dfadc.networks.flops import in_eval_mode
from dfadc.networks.names import documented_contract
from dfadc.networks.user_code import UserCodeFailed, running_user_code

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from dfadc.teacher.accept import Identity

#: Sides that data sets and libraries have.
SIDES = (8, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 84, 96, 100, 112, 128, 150, 160, 192, 200, 224, 240, 256, 299, 320)
#: Where more sides than this are taken, a network takes any.
_FEW = 4
_SECONDS = 2.0


class LikelySize(NamedTuple):
    """A size and its reason."""

    size: tuple[int, int, int]
    reason: str

    @property
    def flag(self) -> str:
        """``--input-size`` with this size."""
        return f"--input-size {'x'.join(map(str, self.size))}"


def likely_sizes(identity: Identity) -> list[LikelySize]:
    """Sizes that a network was made for, the likelier first; empty where nothing tells."""
    channels = identity.channels or 3
    if identity.module is not None:
        sides = _taken_sides(identity.module, channels)
        if 0 < len(sides) <= _FEW:
            return [LikelySize((channels, side, side), "its layers take few sizes, this one of them") for side in sides]
    if identity.stem != "default":
        return [LikelySize((channels, 32, 32), f"usual with the {identity.stem} stem")]
    with contextlib.suppress(DfadcError):
        documented = documented_contract(identity.architecture).input_size
        if documented is not None:
            return [
                LikelySize((channels, *documented[1:]), f"documented for {identity.architecture}"),
                LikelySize((channels, 32, 32), "of small images"),
            ]
    return []


def commands(sizes: list[LikelySize], path: Path, architecture: str | None) -> list[str]:
    """A command for each size that shows the teacher at it."""
    named = "" if architecture is None else f" --teacher-arch {shlex.quote(architecture)}"
    return [f"`dfadc inspect {shlex.quote(str(path))}{named} {each.flag}` ({each.reason})" for each in sizes]


def _taken_sides(module: nn.Module, channels: int) -> list[int]:
    """Sides of square images that a network takes without an error."""
    taken = []
    deadline = time.monotonic() + _SECONDS
    for side in SIDES:
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(UserCodeFailed, DfadcError), running_user_code("it takes no such images"):
            with torch.no_grad(), in_eval_mode(module):
                module(torch.zeros(1, channels, side, side))
            taken.append(side)
    return taken
