"""Unpickler that runs nothing of the file: tensors and library layers are restored, all else becomes inert records.

It is given to ``torch.load`` as its pickle module. torch's own weights-only unpickler refuses every class that it does
not know, protocols above 2, the tar files of torch 0.1 and legacy whole modules; here these are read, under the same
rule: a file can only call what :mod:`dfadc.teacher.safe_globals` lists.
"""

from __future__ import annotations

import functools
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from torch import nn

from dfadc.networks.architecture_name import split_arguments
from dfadc.networks.factory import add_working_folder, import_file
from dfadc.teacher.safe_globals import CALLABLES, VALUES, find_layer_class, refuse_acting


class Record:
    """Inert stand-in for an instance of a class that is not on the safe list: it holds what the file says of it.

    Args:
        name: ``module.qualname`` as the file names the class or function.
        arguments: of its construction, which did not happen.
    """

    __slots__ = ("arguments", "elements", "entries", "name", "state")

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: object = None
        self.entries: dict[Any, object] = {}
        self.elements: list[object] = []

    @property
    def attributes(self) -> dict[str, Any]:
        """The instance attributes that the file gives it; slots included."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        found: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, dict):
                found |= {key: value for key, value in part.items() if isinstance(key, str)}
        return found


class InertGlobal:
    """Inert stand-in for a class or function itself."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_Base: Any = pickle._Unpickler  # noqa: SLF001 -- the C one has no such hooks


class InertUnpickler(_Base):  # type: ignore[misc] # typeshed does not know the base's parts
    """Restores tensors, containers and library layers; makes :class:`Record` of everything else.

    Each opcode that could call, import or change an object of the file's choice is overridden below.
    """

    dispatch: dict[int, Any] = dict(_Base.dispatch)  # noqa: RUF012 -- as in the base
    #: Names seen as inert; shared by the unpicklers of one file (see :func:`inert_pickle_module`).
    seen: set[str]

    def find_class(self, module_name: str, name: str, /) -> object:
        """The safe object of this name, or an inert one.

        Raises:
            UnpicklingError: the name acts on the system: no checkpoint needs it.
        """
        mapping: Any = pickle._compat_pickle  # type: ignore[attr-defined] # noqa: SLF001 -- Python 2's names
        if (module_name, name) in mapping.NAME_MAPPING:
            module_name, name = mapping.NAME_MAPPING[(module_name, name)]
        else:
            module_name = mapping.IMPORT_MAPPING.get(module_name, module_name)
        refuse_acting(module_name, name)
        full_name = f"{module_name}.{name}"
        for known in (CALLABLES, VALUES):
            if full_name in known:
                return known[full_name]
        if (layer := find_layer_class(full_name)) is not None:
            return layer
        self.seen.add(full_name)
        return InertGlobal(full_name)

    def get_extension(self, code: int) -> None:
        """Refuses a reference into the interpreter's own registry."""
        raise pickle.UnpicklingError(f"it uses extension code {code}")

    def _call(self, function: object, arguments: object) -> object:
        is_plain = type(arguments) is tuple
        if is_plain and any(function is known for known in CALLABLES.values()):
            return function(*arguments)  # type: ignore[operator,misc]
        if isinstance(function, type) and issubclass(function, nn.Module):
            return function.__new__(function)
        # An object that __reduce_ex__(0) or __reduce_ex__(1) wrote names its class in the arguments.
        if _name(function) == "copyreg._reconstructor" and is_plain and arguments:
            function = arguments[0]  # type: ignore[index]
        return Record(_name(function), arguments if is_plain else ())  # type: ignore[arg-type]

    def _instantiate(self, function: object, arguments: list[object]) -> None:
        self.append(self._call(function, tuple(arguments)))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _newobj_ex(self) -> None:
        self.stack.pop()
        self._reduce()

    def _build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, Record):
            instance.state = state
        elif isinstance(instance, nn.Module) and isinstance(state, dict):
            type(instance).__setstate__(instance, state)
        elif type(instance) is functools.partial:
            functools.partial.__setstate__(instance, state)  # type: ignore[attr-defined]
        elif type(instance) is not OrderedDict and not isinstance(instance, nn.Parameter):
            # Of a state dict it is the formats' versions of its modules, which its own network states as well.
            raise pickle.UnpicklingError(f"it sets the state of a {type(instance).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Record) else target
        if type(entries) not in (dict, OrderedDict):
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        entries.update(zip(items[::2], items[1::2], strict=True))

    def _extend(self, elements: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.elements.extend(elements)
        elif type(target) is list:
            target.extend(elements)
        elif type(target) is set:
            target.update(elements)
        else:
            raise pickle.UnpicklingError(f"it adds elements to a {type(target).__name__}")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _persistent(self) -> None:
        pid = self.stack.pop()
        # Before 2020 a module's class was saved with its source, which torch would read and compare.
        if type(pid) is tuple and pid and not isinstance(pid[0], str | bytes | int):
            self.append(pid[0])
        elif type(pid) is tuple and len(pid) > 1 and pid[0] in ("module", b"module"):
            self.append(pid[1])
        else:
            self.append(self.persistent_load(pid))

    def _refuse_text_id(self) -> None:
        raise pickle.UnpicklingError("it uses text ids for objects outside the pickle")

    dispatch.update(
        {
            pickle.REDUCE[0]: _reduce,
            pickle.NEWOBJ[0]: _reduce,
            pickle.NEWOBJ_EX[0]: _newobj_ex,
            pickle.BUILD[0]: _build,
            pickle.SETITEM[0]: _setitem,
            pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
            pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
            pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
            pickle.ADDITEMS[0]: lambda self: self._extend(self.pop_mark()),
            pickle.BINPERSID[0]: _persistent,
            pickle.PERSID[0]: _refuse_text_id,
        }
    )


def inert_pickle_module() -> Any:
    """A stand-in for the ``pickle`` module for one file; ``Unpickler.seen`` collects the inert names."""

    class Unpickler(InertUnpickler):
        seen: set[str] = set()  # noqa: RUF012 -- one set for all unpicklers of the file

    return _pickle_module(Unpickler)


def trusting_pickle_module(code: str | None) -> Any:
    """The ``pickle`` module for a trusted file: the working folder can be imported, and a script stands for itself.

    Args:
        code: ``file.py:Net`` whose module a pickle means by ``__main__``; None where nobody names it.
    """
    add_working_folder()
    place = split_arguments(code)[0].rpartition(":")[0] if code is not None else ""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module_name: str, name: str, /) -> Any:
            if module_name == "__main__" and place.endswith(".py"):
                return getattr(import_file(Path(place)), name)
            return super().find_class(module_name, name)

    return _pickle_module(Unpickler)


def _pickle_module(unpickler: Any) -> SimpleNamespace:
    """The parts of the ``pickle`` module that ``torch.load`` uses."""

    def load(stream: IO[bytes], **settings: Any) -> object:
        return unpickler(stream, **settings).load()

    return SimpleNamespace(Unpickler=unpickler, load=load, __name__="dfadc.teacher.unpickle")


def _name(value: object) -> str:
    if isinstance(value, InertGlobal | Record):
        return value.name
    return f"{type(value).__module__}.{type(value).__qualname__}" if not isinstance(value, type) else value.__qualname__
