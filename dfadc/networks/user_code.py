"""Running the user's code: a factory, or the forward of a network.

It is one of two places with a broad ``except``, for such code agrees on no error of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import sysconfig
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Folders whose files are nobody's own: ours, torch's and the standard library.
_KNOWN = tuple(
    f"{folder}{os.sep}"
    for folder in (Path(__file__).resolve().parents[1], Path(torch.__file__).parent, sysconfig.get_path("stdlib"))
)
#: Packages whose networks are not the user's code.
_LIBRARIES = ("torch", "torchvision", "timm", "segmentation_models_pytorch", "transformers", "dfadc")


class UserCodeFailed(DfadcError):
    """Code that the user named or trusted raised an error."""


@contextmanager
def running_user_code(problem: str, hint: str = "") -> Iterator[None]:
    """Turns whatever is raised within into one error, and sends what is printed within to stderr.

    Args:
        problem: what failed, naming the factory or the network; the reason and the line of the user's code follow.
        hint: how to fix it.

    Raises:
        UserCodeFailed: anything but a :class:`DfadcError` or Ctrl-C was raised, a call of ``sys.exit`` included.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserCodeFailed as exc:
        raise UserCodeFailed(f"{problem}: {exc.message}", hint or exc.hint) from exc
    except DfadcError:
        raise
    except (Exception, SystemExit) as exc:
        lines = str(exc).strip().splitlines()
        reason = f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
        place = _place_in_user_code(exc)
        raise UserCodeFailed(f"{problem}: {reason}" + (f" ({place})" if place else ""), hint) from exc


def guard_(network: nn.Module, name: str) -> nn.Module:
    """Runs a network's forward as user code from now on, wherever it is called; in place.

    Nothing is done to a network of a library, or while it is compiled or exported.

    Args:
        network: the user's.
        name: for the error.
    """
    is_foreign = type(network).__module__.partition(".")[0] not in _LIBRARIES
    if not is_foreign or "forward" in vars(network) or isinstance(network, torch.jit.ScriptModule):
        return network
    forward: Any = type(network).forward

    @functools.wraps(forward)
    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with running_user_code(f"the forward of {name} failed"):
            return forward(self, *args, **kwargs)

    # A bound method: a copy's is bound to the copy.
    vars(network)["forward"] = MethodType(guarded, network)
    return network


def _place_in_user_code(exc: BaseException) -> str:
    """``file:line: source`` of the last call in the user's own files, else in a package other than torch."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{exc.filename}:{exc.lineno}"
    found = [frame for frame in traceback.extract_tb(exc.__traceback__) if not _is_known(frame.filename)]
    own = [frame for frame in found if not _is_installed(frame.filename)]
    for frame in reversed(own or found):
        return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""


def _is_known(filename: str) -> bool:
    """True for a file of dfadc, of torch or of the standard library, and for no file at all."""
    is_ours = filename.startswith(("<", *_KNOWN[:2]))
    return is_ours or (filename.startswith(_KNOWN[2]) and not _is_installed(filename))


def _is_installed(filename: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts)
