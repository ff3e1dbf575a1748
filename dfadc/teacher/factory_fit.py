"""Fitting weights into a factory of the user: its number of classes is found by trial among the weights' shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.factory import Factory, Role, load_factory
from dfadc.networks.loading_only import loading_only
from dfadc.networks.state_dict import load_strictly_
from dfadc.networks.user_code import UserCodeFailed
from dfadc.teacher.match import Identity
from dfadc.teacher.prefixes import View, views_of
from dfadc.teacher.suggestions import commands, sides_taken

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from dfadc.networks.architecture_name import ArchitectureName

#: Numbers of classes that are tried.
_TRIALS = 8
#: Classes and size that stand for what nobody knows, where the factory does not ask for it.
_ANY_CLASSES, _ANY_SIDE = 2, 32
_SECONDS = 5.0


def fit_factory(
    resolved: ArchitectureName, tensors: Mapping[str, Tensor], fields: ContractFields, source: str
) -> Identity:
    """Builds a factory's network for these weights and loads them.

    Args:
        resolved: the factory and the user's arguments.
        tensors: weights by name, maybe under a prefix.
        fields: what is stated of the contract.
        source: the file, for errors.

    Raises:
        DfadcError: the factory needs a size that nobody states, its code fails, or the weights do not fit.
    """
    factory = load_factory(resolved.name)
    arguments = dict(resolved.arguments)
    needs_size = factory.needs("size") or factory.needs("side") or factory.takes("contract")
    # Channels of the first convolution's weights, where no size is stated.
    first = next((tensor for tensor in tensors.values() if tensor.ndim == 4), None)
    channels = fields.input_size[0] if fields.input_size else None if first is None else int(first.shape[1])
    if fields.input_size is None and needs_size:
        sides = sides_taken(
            lambda side: fit_factory(
                resolved, tensors, replace(fields, input_size=(channels or 3, side, side)), source
            ),
            _SECONDS,
        )
        sizes = {(channels or 3, side, side): "the weights fit it" for side in sides}
        found = commands(sizes, source, resolved.canonical)
        raise DfadcError(
            f"the input size of the teacher is unknown, and {resolved.name} needs it",
            f"pass one of these: {found}" if found else "pass --input-size CxHxW, e.g. --input-size 3x32x32",
        )
    size = fields.input_size or (channels or 3, _ANY_SIDE, _ANY_SIDE)
    kept: set[Role] = set() if fields.input_size else {"size", "side"}
    failure: DfadcError | None = None
    for num_classes in _classes_to_try(factory, tensors, fields, arguments):
        contract = ImageContract(size, max(num_classes or 0, _ANY_CLASSES), mean=fields.mean, std=fields.std)
        without: set[Role] = {*kept, "classes"} if num_classes is None else kept
        given = arguments
        if num_classes == 1:  # no contract has one class: one logit stands for two
            given = {name: 1 for name, role in factory.roles.items() if role == "classes"} | arguments
        try:
            with loading_only():
                module = factory.build(contract, given, without=without)
            view = _load(module, tensors, resolved.canonical, source)
        except DfadcError as exc:
            # Code that refuses one number of classes may take the next; of misfits the first tells most.
            failure = exc if failure is None or isinstance(failure, UserCodeFailed) else failure
            continue
        return Identity(resolved.canonical, channels=channels, module=module, notes=view.notes)
    assert failure is not None, "one number of classes at least was tried"  # noqa: S101
    raise failure


def _load(module: nn.Module, tensors: Mapping[str, Tensor], name: str, source: str) -> View:
    """Loads the view of the weights whose names are the module's."""
    expected = module.state_dict().keys()
    views = list(views_of(tensors))
    fitting = max(views, key=lambda view: len(expected & view.tensors.keys()))
    if not expected & fitting.tensors.keys():
        for inner, part in module.named_modules():
            weights = part.state_dict().keys()
            if inner and len(weights) == len(expected) and weights == fitting.tensors.keys():
                fitting = View(
                    {f"{inner}.{key}": each for key, each in fitting.tensors.items()}, note=f"weights of {inner}"
                )
                break
    if not expected - fitting.tensors.keys():
        fitting.refuse_loss(name, source)
    load_strictly_(module, fitting.tensors, architecture=name, source=source)
    return fitting


def _classes_to_try(
    factory: Factory, tensors: Mapping[str, Tensor], fields: ContractFields, arguments: Mapping[str, object]
) -> Iterator[int | None]:
    """The stated number of classes, else the heights of matrices, the last first; None is the factory's own default."""
    takes = factory.takes("classes") or factory.takes("contract")
    given = any(role == "classes" and name in arguments for name, role in factory.roles.items())
    if not takes or given:
        yield None
        return
    deep = [tensor.shape for tensor in tensors.values() if tensor.ndim > 1]
    shapes = [tensor.shape for tensor in tensors.values() if tensor.ndim == 2 or tuple(tensor.shape[2:]) == (1, 1)]
    # The last kernel's height too: a network of pixels may end in a 3x3 convolution.
    heights = list(dict.fromkeys(int(shape[0]) for shape in (*reversed(shapes), *deep[-1:])))[:_TRIALS]
    if fields.num_classes is not None:
        yield fields.num_classes
        if fields.num_classes == 2 and 1 in heights:
            yield 1
        return
    yield from heights
    if not factory.needs("classes") and not factory.takes("contract"):
        yield None
    elif not heights:
        yield _ANY_CLASSES
