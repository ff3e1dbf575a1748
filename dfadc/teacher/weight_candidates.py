"""Networks and state dicts in a nest of containers, wherever a training framework put them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dfadc.networks.state_dict import strip_wrapper_prefixes
from dfadc.teacher.arrays import tensor_of_array
from dfadc.teacher.module_tree import flatten_network, is_network
from dfadc.teacher.unpickle import Record

#: Containers nested deeper than this are not searched.
_DEPTH = 12
#: Keys of what training needs and a network does not: optimizers hold tensors as large as the weights.
_OF_TRAINING = re.compile(
    r"optimi[sz]er|(^|_)optim(_|$)|sched|scaler|(^|_)rng|random_state|^loops$|dataloader|sampler|memory_bank",
    re.IGNORECASE,
)
#: Keys of averaged weights.
AVERAGED = re.compile(r"(^|[_./])(ema|model_ema|averaged?|averaging|avg|swa|shadow|polyak)([_./]|\d|$)", re.IGNORECASE)
#: Tensors that profilers and averaging add to a state dict.
_ADDED = re.compile(r"(^|\.)(total_ops|total_params|n_averaged|num_averaged|_extra_state)$")
#: State of one parameter in an optimizer.
_OF_AN_OPTIMIZER = {
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "grad_avg"),
}
#: Names of two parts of a network that are saved apart.
_BODIES = {"backbone", "encoder", "features", "body", "feature_extractor"}
_ENDS = {"head", "classifier", "fc", "decoder", "neck", "linear"}
#: Counters beside the weights, where they are single numbers at the top.
_COUNTERS = re.compile(r"^(steps?|global_step|num_updates|epoch|iteration|decay|optimization_step)$")


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """A network in a file.

    Args:
        key: path of keys under which it was found; empty at the top.
        tensors: its weights by name.
        network: the module or its record; None for a state dict.
        notes: why it and not another was taken, for the user.
    """

    key: str
    tensors: Mapping[str, Tensor]
    network: object = None
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The key, for a text."""
        return self.key or "(top)"

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name; a wrapper's prefix and added counters make no difference."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def weight_candidates(
    value: object, key: str = "", depth: int = _DEPTH, seen: set[int] | None = None
) -> Iterator[FoundWeights]:
    """Every network and every mapping of names to tensors in a nest of containers."""
    seen = set() if seen is None else seen
    if depth == 0 or id(value) in seen or isinstance(value, Tensor):
        return
    seen.add(id(value))
    if is_network(value):
        network = _inside_wrappers(value)
        yield FoundWeights(key, _without_added(flatten_network(network)), network)
        return
    children = _children(value)
    tensors = {name: entry for name, entry in children if isinstance(name, str) and isinstance(entry, Tensor)}
    if arrays := _arrays(children):
        yield FoundWeights(key, _without_added(tensors | arrays), notes=("its NumPy arrays were read as tensors",))
    elif not tensors.keys() <= _OF_AN_OPTIMIZER:
        yield FoundWeights(key, _without_added(tensors))
    parts: list[tuple[str, FoundWeights]] = []
    for name, entry in children:
        if isinstance(name, str) and _OF_TRAINING.search(name):
            continue
        path = f"{key}.{name}" if key else str(name)
        for found in weight_candidates(entry, path, depth - 1, seen):
            if found.key == path and isinstance(value, Mapping):
                parts.append((str(name), found))
            yield found
    yield from _joined(key, parts)


def _without_added(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what profilers and averaging added, and without wrapper prefixes."""
    return strip_wrapper_prefixes(
        {
            name: tensor
            for name, tensor in tensors.items()
            if not (_ADDED.search(name) or (tensor.numel() == 1 and _COUNTERS.match(name)))
        }
    )


def split_average(found: FoundWeights) -> list[FoundWeights]:
    """Raw and averaged weights that one state dict holds side by side, as ``model.*`` and ``ema_model.*``, apart."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.tensors.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix, {})[rest] = tensor
    parts = [FoundWeights(f"{found.key}.{prefix}".strip("."), _without_added(each)) for prefix, each in groups.items()]
    largest = max(parts, key=lambda part: part.num_elements)
    versions = [part for part in parts if is_version_of(part, largest)]
    if found.network is None and len(versions) > 1 and any(AVERAGED.search(part.key) for part in versions):
        return versions
    return [found]


def _joined(key: str, parts: list[tuple[str, FoundWeights]]) -> Iterator[FoundWeights]:
    """Several modules that were saved apart, as ``{"backbone": ..., "head": ...}``, under one roof."""
    used = [(name, found) for name, found in parts if not AVERAGED.search(name)]
    shapes = [found.shapes for _, found in used]
    if len(used) > 1 and all(first != second for i, first in enumerate(shapes) for second in shapes[:i]):
        names = {name for name, _ in used}
        if names & _BODIES and names & _ENDS:
            tensors = {f"{name}.{inner}": tensor for name, found in used for inner, tensor in found.tensors.items()}
            yield FoundWeights(key, tensors)


def _arrays(children: list[tuple[object, object]]) -> dict[str, Tensor]:
    """NumPy arrays by name, where one of them has the form of a layer's weights; other arrays are figures."""
    found = {name: tensor_of_array(entry) for name, entry in children if isinstance(name, str)}
    arrays = {name: tensor for name, tensor in found.items() if tensor is not None}
    has_weights = any(tensor.is_floating_point() and tensor.ndim > 1 for tensor in arrays.values())
    return arrays if has_weights else {}


def _children(value: object) -> list[tuple[object, object]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, Record):
        return [*value.attributes.items(), *value.entries.items(), *enumerate((*value.elements, *value.arguments))]
    return []


def _inside_wrappers(value: object) -> object:
    """The network inside DataParallel and its like: what is alone under the name ``module``."""
    attributes = value.attributes if isinstance(value, Record) else vars(value)
    modules = attributes.get("_modules")
    if isinstance(modules, Mapping) and list(modules) in (["module"], ["_orig_mod"]):
        inner = next(iter(modules.values()))
        if is_network(inner):
            return _inside_wrappers(inner)
    return value


def is_version_of(found: FoundWeights, other: FoundWeights) -> bool:
    """True for weights of the same network: equal shapes, or an average that leaves out the buffers."""
    shapes, others = found.shapes, other.shapes
    if shapes == others:
        return True
    is_part = all(others.get(name) == shape for name, shape in shapes.items())
    left_out = others.keys() - shapes.keys()
    return is_part and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in left_out)
