"""Architecture names as people write them: ``torchvision.models.resnet18``, ``file.py:Net(width=2)``."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Iterable

Library = Literal["own", "torchvision", "timm", "smp", "factory"]

#: Ways to write a library's name before that of its network.
_LIBRARY_FORMS = re.compile(r"^(torchvision|timm)(?:\.models\.|/|:|\.)")
_CALL = re.compile(r"^(?P<name>[^()]+)\((?P<arguments>.*)\)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ArchitectureName:
    """A resolved name: the library that makes the network, and its name there.

    Args:
        library: the library, or ``factory`` for the user's own code.
        name: its name there; ``module:factory`` or ``file.py:factory`` for the user's code.
        arguments: keyword arguments that the user adds, in the order of their names.
    """

    library: Library
    name: str
    arguments: tuple[tuple[str, object], ...] = ()

    @property
    def canonical(self) -> str:
        """The one spelling that is written to files, e.g. ``torchvision:mobilenet_v2`` or ``lenet5``."""
        plain = self.name if self.library in ("own", "factory") else f"{self.library}:{self.name}"
        return with_arguments(plain, self.arguments)


def split_arguments(written: str) -> tuple[str, tuple[tuple[str, object], ...]]:
    """``file.py:Net(width=2)`` -> ``file.py:Net`` and its keyword arguments, which must be plain values.

    Raises:
        DfadcError: the text in parentheses is not a list of NAME=VALUE.
    """
    match = _CALL.match(written.strip())
    if match is None:
        return written.strip(), ()
    try:
        call = ast.parse(f"f({match['arguments']})", mode="eval").body
        assert isinstance(call, ast.Call), "a call was written"  # noqa: S101
        found = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords if each.arg}
        is_plain = not call.args and len(found) == len(call.keywords)
    except (SyntaxError, ValueError):
        is_plain, found = False, {}
    if not is_plain:
        raise DfadcError(f"cannot read the arguments of architecture {written!r}", "write NAME(width=2, norm='batch')")
    return match["name"].strip(), tuple(sorted(found.items()))


def with_arguments(name: str, arguments: Iterable[tuple[str, object]]) -> str:
    """The inverse of :func:`split_arguments`."""
    written = ", ".join(f"{key}={value!r}" for key, value in arguments)
    return f"{name}({written})" if written else name


def _parse_argument(text: str) -> tuple[str, object]:
    """``--arch-arg NAME=VALUE``: a Python number, list or True where VALUE is one, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise DfadcError(f"--arch-arg {text!r} is not NAME=VALUE", "e.g. --arch-arg width=2")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return name.strip(), {"true": True, "false": False}.get(value.strip(), value.strip())


def add_arguments(name: str | None, texts: list[str] | None) -> str | None:
    """An architecture's name with the arguments of ``--arch-arg``.

    Raises:
        DfadcError: an argument cannot be read, or there is no architecture to give it to.
    """
    if not texts:
        return name
    if name is None:
        raise DfadcError(f"--arch-arg {texts[0]} belongs to an architecture", "name it with --teacher-arch")
    bare, arguments = split_arguments(name)
    return with_arguments(bare, sorted({**dict(arguments), **dict(map(_parse_argument, texts))}.items()))


def library_form(name: str) -> str:
    """The form LIBRARY:NAME of ``torchvision.models.resnet18`` or ``timm/resnet18.a1_in1k``.

    ``torchvision.models.segmentation.fcn_resnet50`` loses its folder, too; any other name stays.
    """
    match = _LIBRARY_FORMS.match(name)
    if match is None or (":" in name and not name.startswith(f"{match[1]}:")):
        return name
    return f"{match[1]}:{name[match.end() :].removeprefix('segmentation.')}"
