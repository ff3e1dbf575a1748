"""Factories of the user: importing one, recognising its arguments by their names, calling it."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dfadc.errors import DfadcError
from dfadc.networks.flops import in_eval_mode
from dfadc.networks.user_code import guard_, running_user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import ModuleType

    from dfadc.contract import ImageContract

Role = Literal["contract", "classes", "channels", "size", "side"]

NAME_FORMS = (
    "write torchvision:NAME, timm:NAME, smp:NAME:ENCODER, file.py:factory, package.module:factory or a name of "
    "`dfadc students`"
)
_CALL_HINT = (
    "it is called with these keywords; --arch-arg NAME=VALUE adds one, or name a function that needs none: "
    "--teacher-arch file.py:function"
)
#: Names that people give to the arguments of a network.
_ROLES: dict[Role, tuple[str, ...]] = {
    "contract": ("contract",),
    "classes": (
        *("num_classes", "n_classes", "nclass", "nclasses", "num_class", "n_class", "nb_classes", "class_num", "n_cls"),
        *("num_cls", "num_labels", "n_labels", "classes", "class_count", "number_of_classes", "output_dim", "out_dim"),
    ),
    "channels": (
        *("in_channels", "in_chans", "channels", "num_channels", "n_channels", "in_channel", "input_channels"),
        *("img_channels", "image_channels", "num_input_channels", "input_channel", "in_ch", "n_input_channels"),
    ),
    "size": ("input_size", "input_shape", "image_shape"),
    "side": ("image_size", "img_size", "img_dim", "imsize", "image_dim", "resolution", "input_resolution", "side"),
}


@dataclass(frozen=True, slots=True)
class Factory:
    """A callable of the user that returns a network.

    Args:
        name: as the user names it.
        function: the callable.
        roles: argument -> its meaning, of those whose names are known.
        required: arguments without a default.
        defaults: of the arguments that have one.
        takes_any: whether it takes keyword arguments of any name.
    """

    name: str
    function: Callable[..., object]
    roles: Mapping[str, Role]
    required: frozenset[str]
    defaults: Mapping[str, object]
    takes_any: bool = False

    def needs(self, role: Role) -> bool:
        """True where the factory cannot be called without this value."""
        return any(meaning == role and name in self.required for name, meaning in self.roles.items())

    def takes(self, role: Role) -> bool:
        """True where an argument has this meaning."""
        return role in self.roles.values()

    def build(
        self, contract: ImageContract, arguments: Mapping[str, object], *, without: Collection[Role] = ()
    ) -> nn.Module:
        """Calls the factory with those values of the contract that its signature has, and the user's own arguments.

        Args:
            contract: images and classes.
            arguments: of the user; they win.
            without: meanings of arguments that keep their defaults.

        Raises:
            DfadcError: an argument is unknown, the code fails, or gives no network.
        """
        known = {*self.roles, *self.required, *self.defaults}
        if not self.takes_any and (unknown := sorted(arguments.keys() - known)):
            listed = ", ".join(sorted(known)) or "none"
            raise DfadcError(f"{self.name} has no argument {unknown[0]!r}", f"its arguments: {listed}")
        values = {
            name: self._value(name, role, contract)
            for name, role in self.roles.items()
            if role not in without or name in self.required
        }
        if self.takes("contract"):
            values = {name: contract for name, role in self.roles.items() if role == "contract"}
        values |= arguments
        called = f"{self.name}({', '.join(values)}) failed"
        with running_user_code(called, _CALL_HINT):
            module = self.function(**values)
        if not isinstance(module, nn.Module):
            raise DfadcError(f"{self.name} gave a {type(module).__name__}, not a torch.nn.Module")
        _materialise_(module, self.name, contract)
        return guard_(module, self.name)

    def _value(self, name: str, role: Role, contract: ImageContract) -> object:
        """The contract's value for an argument, in the form that its default has."""
        height, width = contract.input_size[1:]
        default = self.defaults.get(name)
        if role == "classes":
            return contract.num_classes
        if role == "channels":
            return contract.channels
        if isinstance(default, tuple | list):
            return type(default)(contract.input_size if len(default) == 3 else (height, width))
        if role == "size" and not isinstance(default, int):
            return contract.input_size
        return height


def load_factory(name: str) -> Factory:
    """Imports ``package.module:factory`` or ``path/to/file.py:factory`` and reads its signature.

    Raises:
        DfadcError: the module or the factory does not exist, or its signature cannot be read.
    """
    function = import_factory(name)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as exc:
        raise DfadcError(f"{name} has no readable signature", "write it as a plain function") from exc
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {key: each for key, each in parameters.items() if each.kind in kinds}
    defaults = {key: each.default for key, each in named.items() if each.default is not inspect.Parameter.empty}
    roles: dict[str, Role] = {}
    for role, names in _ROLES.items():
        # The first name alone: `classes` beside `num_classes` is something else.
        known = next((key for key in names if key in named and _may_have(role, defaults.get(key))), None)
        if known is not None:
            roles[known] = role
    return Factory(
        name,
        function,
        roles,
        frozenset(named.keys() - defaults.keys()),
        defaults,
        any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()),
    )


def import_factory(name: str) -> Callable[..., object]:
    """Imports a factory; the working directory is on the path, as it is for ``python -m``.

    Raises:
        DfadcError: the module or the factory does not exist.
    """
    place, _, attribute = name.rpartition(":") if ".py:" in name else name.partition(":")
    add_working_folder()
    with running_user_code(f"cannot import {place!r} of architecture {name!r}", NAME_FORMS):
        module = import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found: object = module
        for part in attribute.split("."):
            found = getattr(found, part, None)
    if not callable(found):
        # Of a file its own definitions, not what it imports.
        names = names_in_file(Path(place)) if place.endswith(".py") else list(vars(module))
        near = difflib.get_close_matches(attribute, names, n=4, cutoff=0.3)
        hint = f"did you mean {', '.join(f'{place}:{name}' for name in near)}?" if near else NAME_FORMS
        raise DfadcError(f"{place} has no callable {attribute!r}", hint)
    return found


def names_in_file(path: Path) -> list[str]:
    """Classes and functions that a Python file defines, read without running it; empty where it is none."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def import_file(path: Path) -> ModuleType:
    """Imports a Python file; its folder is on the path, as it is for a script.

    Raises:
        ImportError: there is no such file.
    """
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    # Under a name of its own: a user's `random.py` must not stand for the standard library's.
    name = name if known is None and importlib.util.find_spec(name) is None else f"dfadc_user_{name}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        del sys.modules[name]
        if isinstance(exc, ImportError) and "relative import" in str(exc) and (path.parent / "__init__.py").is_file():
            return _import_in_package(path.resolve())
        raise
    return module


def _import_in_package(path: Path) -> ModuleType:
    """Imports a file of a package by its dotted name, so that its relative imports work."""
    root, name = path.parent, path.stem
    while (root / "__init__.py").is_file():
        root, name = root.parent, f"{root.name}.{name}"
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module = importlib.import_module(name)
    if getattr(module, "__file__", None) != str(path):
        raise ImportError(f"{name} is {getattr(module, '__file__', 'another module')}, not {path}")
    return module


def add_working_folder() -> None:
    """Puts the working folder at the end of the import path."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _may_have(role: Role, default: object) -> bool:
    """False for an argument whose default shows that its name means something else here."""
    if role in ("classes", "channels"):
        return default is None or (isinstance(default, int) and not isinstance(default, bool))
    return default is None or isinstance(default, int | tuple | list)


def _materialise_(module: nn.Module, name: str, contract: ImageContract) -> None:
    """Gives lazy layers their weights by sending two empty images through them, in place."""

    def lazy_weights() -> list[str]:
        named = chain(module.named_parameters(), module.named_buffers())
        return [name for name, tensor in named if is_lazy(tensor)]

    if not lazy_weights():
        return
    size = "x".join(map(str, contract.input_size))
    problem = f"{name} has lazy layers, and images of size {size} cannot initialise them"
    with running_user_code(problem, "check --input-size"), torch.no_grad(), in_eval_mode(module):
        module(torch.zeros(2, *contract.input_size))
    if unused := lazy_weights():
        raise DfadcError(
            f"{name} has a lazy layer that no image passes through: {unused[0]} has no shape",
            "remove that layer, or give it its size",
        )
