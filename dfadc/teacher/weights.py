"""Finding a network's weights in whatever a training framework saved: the largest mapping of tensors, under any key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dfadc.errors import DfadcError
from dfadc.networks.state_dict import strip_wrapper_prefixes
from dfadc.teacher.module_tree import flatten_network, is_complete, is_network
from dfadc.teacher.unpickle import Record

#: Containers nested deeper than this are not searched.
_DEPTH = 12
#: Keys of what training needs and a network does not: optimizers hold tensors as large as the weights.
_OF_TRAINING = re.compile(r"optim|sched|scaler|rng|random|loops|dataloader|sampler|memory_bank", re.IGNORECASE)
#: Keys of averaged weights.
_AVERAGED = re.compile(r"(^|[_./])(ema|model_ema|averaged?|averaging|avg|swa|shadow|polyak)([_./]|\d|$)", re.IGNORECASE)
#: Keys of one network's weights at several times, the preferred first; another spelling stands behind these.
_PREFERRED = (re.compile(r"best", re.IGNORECASE), re.compile(r"^(module|model|state_dict|model_state_dict|net)($|\.)"))
_SECOND = re.compile(r"last|current|latest|init|start|previous|prev", re.IGNORECASE)
#: Tensors that profilers and averaging add to a state dict.
_ADDED = re.compile(r"(^|\.)(total_ops|total_params|n_averaged|num_averaged|_extra_state)$")
#: Counters beside the weights, where they are single numbers at the top.
_COUNTERS = re.compile(r"^(steps?|global_step|num_updates|epoch|iteration|decay|optimization_step)$")
_QUANTISED = re.compile(r"(_packed_params|\.zero_point|^zero_point|\.SCB|weight_format)")
#: A network with at least this share of the largest one's tensors is named in a note.
_NOTABLE = 0.2


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
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name; a wrapper's prefix and added counters make no difference."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def find_weights(value: object, source: object, choice: str | None = None) -> FoundWeights:
    """The weights in an unpickled value.

    Args:
        value: what the file held.
        source: the file, for errors.
        choice: ``ema``, ``raw``, a key or a path of keys; None takes averaged weights before raw ones.

    Raises:
        DfadcError: there are none, several networks have equal claim, or the choice names none of them.
    """
    candidates = [part for found in _candidates(value) if found.num_elements for part in _split_average(found)]
    candidates.sort(key=lambda found: -found.num_elements)
    if not candidates:
        keys = ", ".join(map(str, list(value)[:6])) if isinstance(value, Mapping) else type(value).__name__
        raise DfadcError(
            f"{source} holds no weights: no mapping of names to tensors was found in it (its keys: {keys or 'none'})",
            "save the state dict: torch.save(network.state_dict(), 'teacher.pt')",
        )
    _refuse_quantised(candidates[0], source)
    if choice not in (None, "ema", "raw"):
        return _named(candidates, str(choice), source)
    largest = candidates[0]
    same = [found for found in candidates if _is_version_of(found, largest)]
    is_averaged = _swapped if _is_of_mmengine(value) else _AVERAGED.search
    averaged = [found for found in same if is_averaged(found.key)]
    raw = [found for found in same if not is_averaged(found.key)]
    _refuse_other_average(candidates, raw, averaged, source, choice)
    if choice is not None and not (averaged if choice == "ema" else raw):
        keys = ", ".join(found.key or "(top)" for found in same)
        raise DfadcError(f"{source} holds no {choice} weights (it holds {keys})", "leave --teacher-weights away")
    wanted = raw if choice == "raw" or not averaged else averaged
    taken = wanted[0] if wanted is averaged else _preferred(wanted, source)
    return _explained(_completed(taken, raw), candidates, same, is_average=wanted is averaged)


def drop_added(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without what profilers and averaging added, and without wrapper prefixes; and the dropped names."""
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (_ADDED.search(name) or (tensor.numel() == 1 and _COUNTERS.match(name)))
    }
    metadata = getattr(tensors, "_metadata", None)
    stripped = strip_wrapper_prefixes(kept)
    if metadata is not None and stripped.keys() == tensors.keys():
        return dict(tensors), []
    return stripped, [name for name in tensors if name not in kept]


def _candidates(
    value: object, key: str = "", depth: int = _DEPTH, seen: set[int] | None = None
) -> Iterator[FoundWeights]:
    """Every network and every mapping of names to tensors in a nest of containers."""
    seen = set() if seen is None else seen
    if depth == 0 or id(value) in seen or isinstance(value, Tensor):
        return
    seen.add(id(value))
    if is_network(value):
        network = _inside_wrappers(value)
        yield FoundWeights(key, drop_added(flatten_network(network))[0], network)
        return
    children = _children(value)
    tensors = {name: entry for name, entry in children if isinstance(name, str) and isinstance(entry, Tensor)}
    if tensors and not _is_optimizer_state(tensors):
        yield FoundWeights(key, drop_added(value if _is_plain(value, tensors) else tensors)[0])  # type: ignore[arg-type]
    parts: list[tuple[str, FoundWeights]] = []
    for name, entry in children:
        if isinstance(name, str) and _OF_TRAINING.search(name):
            continue
        path = f"{key}.{name}" if key else str(name)
        for found in _candidates(entry, path, depth - 1, seen):
            if found.key == path and isinstance(value, Mapping):
                parts.append((str(name), found))
            yield found
    yield from _joined(key, parts)


def _split_average(found: FoundWeights) -> list[FoundWeights]:
    """Raw and averaged weights that one state dict holds side by side, as ``model.*`` and ``ema_model.*``, apart."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.tensors.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix, {})[rest] = tensor
    parts = [FoundWeights(f"{found.key}.{prefix}".strip("."), drop_added(group)[0]) for prefix, group in groups.items()]
    largest = max(parts, key=lambda part: part.num_elements)
    versions = [part for part in parts if _is_version_of(part, largest)]
    if found.network is None and len(versions) > 1 and any(_AVERAGED.search(part.key) for part in versions):
        return versions
    return [found]


def _is_of_mmengine(value: object) -> bool:
    """True for a checkpoint of MMEngine's averaging hook, which swaps: its ``state_dict`` is the average."""
    return isinstance(value, Mapping) and {"meta", "state_dict", "ema_state_dict"} <= value.keys()


def _swapped(key: str) -> bool:
    return key == "state_dict"


def _joined(key: str, parts: list[tuple[str, FoundWeights]]) -> Iterator[FoundWeights]:
    """Several modules that were saved apart, as ``{"backbone": ..., "head": ...}``, under one roof."""
    used = [(name, found) for name, found in parts if not _AVERAGED.search(name)]
    shapes = [found.shapes for _, found in used]
    if len(used) > 1 and all(first != second for i, first in enumerate(shapes) for second in shapes[:i]):
        names = {name for name, _ in used}
        is_split = names & {"backbone", "encoder", "features", "body", "feature_extractor"} and names & {
            "head", "classifier", "fc", "decoder", "neck", "linear",
        }  # fmt: skip
        if is_split:
            tensors = {f"{name}.{inner}": tensor for name, found in used for inner, tensor in found.tensors.items()}
            yield FoundWeights(key, tensors)


def _children(value: object) -> list[tuple[object, object]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, Record):
        return [*value.attributes.items(), *value.entries.items(), *enumerate((*value.elements, *value.arguments))]
    return []


def _is_plain(value: object, tensors: Mapping[str, Tensor]) -> bool:
    return isinstance(value, Mapping) and len(value) == len(tensors)


def _inside_wrappers(value: object) -> object:
    """The network inside DataParallel and its like: what is alone under the name ``module``."""
    attributes = value.attributes if isinstance(value, Record) else vars(value)
    modules = attributes.get("_modules")
    if isinstance(modules, Mapping) and list(modules) in (["module"], ["_orig_mod"]):
        inner = next(iter(modules.values()))
        if is_network(inner):
            return _inside_wrappers(inner)
    return value


def _is_optimizer_state(tensors: Mapping[str, Tensor]) -> bool:
    known = {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
    }
    return tensors.keys() <= known


def _is_version_of(found: FoundWeights, other: FoundWeights) -> bool:
    """True for weights of the same network: equal shapes, or an average that leaves out the buffers."""
    shapes, others = found.shapes, other.shapes
    if shapes == others:
        return True
    is_part = all(others.get(name) == shape for name, shape in shapes.items())
    left_out = others.keys() - shapes.keys()
    return is_part and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in left_out)


def _completed(taken: FoundWeights, raw: list[FoundWeights]) -> FoundWeights:
    """An average of parameters alone, completed by the raw weights' running statistics."""
    if taken.network is not None or not raw or taken.shapes.keys() >= raw[0].shapes.keys():
        return taken
    note = f"its running statistics, which {taken.key} leaves out, are those of {raw[0].key or 'the top'}"
    return FoundWeights(taken.key, {**raw[0].tensors, **taken.tensors}, notes=(note,))


def _preferred(found: list[FoundWeights], source: object) -> FoundWeights:
    """One of several sets of weights of one network.

    Raises:
        DfadcError: no name says which one is meant.
    """
    if len(found) == 1:
        return found[0]
    for pattern in _PREFERRED:
        fitting = [each for each in found if pattern.search(each.key)]
        if len(fitting) == 1:
            return fitting[0]
    fitting = [each for each in found if not _SECOND.search(each.key)]
    whole = [each for each in found if is_complete(each.network)]
    for rest in (fitting, whole):
        if len(rest) == 1:
            return rest[0]
    keys = [each.key or "(top)" for each in found]
    raise DfadcError(
        f"{source} holds several sets of weights of the same shapes: {', '.join(keys)}",
        f"choose one: {' | '.join(f'--teacher-weights {key}' for key in keys[:4])}",
    )


def _named(candidates: list[FoundWeights], choice: str, source: object) -> FoundWeights:
    """The weights under a key; a part of a path is enough where only one fits.

    Raises:
        DfadcError: none fits.
    """
    exact = [found for found in candidates if found.key == choice]
    within = [found for found in candidates if f".{choice}." in f".{found.key}."]
    if found := next(iter(exact or within), None):
        return FoundWeights(found.key, found.tensors, found.network, (f"weights of {found.key}, as chosen",))
    for found in candidates:
        inner = f"{choice.rstrip('.')}."
        tensors = {name.removeprefix(inner): each for name, each in found.tensors.items() if name.startswith(inner)}
        if tensors:
            return FoundWeights(f"{found.key} {inner}*".strip(), tensors, notes=(f"weights of {inner}*, as chosen",))
    keys = ", ".join(found.key or "(top)" for found in candidates[:8])
    raise DfadcError(f"{source} holds no weights under {choice!r}", f"it holds weights under: {keys}")


def _explained(
    found: FoundWeights, candidates: list[FoundWeights], same: list[FoundWeights], *, is_average: bool
) -> FoundWeights:
    notes = list(found.notes)
    others = [each.key or "(top)" for each in same if each.key != found.key]
    threshold = _NOTABLE * found.num_elements
    versions = {id(each) for each in same}
    networks = [
        each.key or "(top)"
        for each in candidates
        if id(each) not in versions and each.num_elements > threshold and found.key and not _is_within(each, found)
    ]
    if found.key:
        average = "averaged weights " if is_average else "weights "
        choice = f" (there is also {', '.join(others)}; --teacher-weights chooses)" if others else ""
        notes.insert(0, f"{average}taken from key {' > '.join(found.key.split('.'))}{choice}")
    if networks:
        notes.append(f"other networks in the file were left out, for they are smaller: {', '.join(networks[:4])}")
    return FoundWeights(found.key, found.tensors, found.network, tuple(notes))


def _is_within(found: FoundWeights, outer: FoundWeights) -> bool:
    return found.key.startswith(f"{outer.key}.") or outer.key.startswith(f"{found.key}.")


def _refuse_other_average(
    candidates: list[FoundWeights],
    raw: list[FoundWeights],
    averaged: list[FoundWeights],
    source: object,
    choice: str | None,
) -> None:
    """Refuses averaged and raw weights that are of different shapes: one of them is another network's.

    Raises:
        DfadcError: they are.
    """
    if choice is not None or (raw and averaged):
        return
    largest = candidates[0]
    for found in candidates[1:]:
        is_other_kind = bool(_AVERAGED.search(found.key)) != bool(averaged)
        shared = found.shapes.keys() & largest.shapes.keys()
        if is_other_kind and len(shared) > len(largest.shapes) / 2:
            name = next((name for name in shared if found.shapes[name] != largest.shapes[name]), "some names")
            raise DfadcError(
                f"{source} holds averaged and raw weights of different shapes: {largest.key or '(top)'} and "
                f"{found.key} differ in {name}",
                f"choose one: --teacher-weights {largest.key} | --teacher-weights {found.key}",
            )


def _refuse_quantised(found: FoundWeights, source: object) -> None:
    """Refuses weights of integers.

    Raises:
        DfadcError: a tensor or a name says that they are quantised.
    """
    is_quantised = any(tensor.is_quantized for tensor in found.tensors.values())
    if is_quantised or any(_QUANTISED.search(name) for name in found.tensors):
        raise DfadcError(
            f"the weights of {source} are quantised, and no gradient flows through integers",
            "give the float checkpoint that they were made from",
        )
