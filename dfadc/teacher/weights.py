"""Finding a network's weights in whatever a training framework saved: the largest mapping of tensors, under any key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import takewhile

from dfadc.errors import DfadcError
from dfadc.teacher.module_tree import is_complete
from dfadc.teacher.weight_candidates import AVERAGED, FoundWeights, is_version_of, split_average, weight_candidates

#: Keys of a network's weights at a time that is not preferred.
_SECOND = re.compile(r"last|current|latest|init|start|previous|prev", re.IGNORECASE)
_QUANTISED = re.compile(r"(_packed_params|\.zero_point|^zero_point|\.SCB|weight_format)")
#: A network with at least this share of the largest one's tensors is named in a note.
_NOTABLE = 0.2


def find_weights(value: object, source: object, choice: str | None = None) -> FoundWeights:
    """The weights in an unpickled value.

    Args:
        value: what the file held.
        source: the file, for errors.
        choice: ``ema``, ``raw``, a key or a path of keys; None takes averaged weights before raw ones.

    Raises:
        DfadcError: there are none, several networks have equal claim, or the choice names none of them.
    """
    candidates = [part for found in weight_candidates(value) if found.num_elements for part in split_average(found)]
    candidates.sort(key=lambda found: -found.num_elements)
    if not candidates:
        if isinstance(value, Mapping) and {"ds_config", "ds_version"} & value.keys():
            raise DfadcError(
                f"the weights in {source} are empty: DeepSpeed (ZeRO stage 3) keeps them in the files beside it",
                "join them: python zero_to_fp32.py FOLDER teacher.pt (the script lies in the folder)",
            )
        keys = ", ".join(map(str, list(value)[:6])) if isinstance(value, Mapping) else type(value).__name__
        raise DfadcError(
            f"{source} holds no weights: no mapping of names to tensors was found in it (its keys: {keys or 'none'})",
            "save the state dict: torch.save(network.state_dict(), 'teacher.pt')",
        )
    largest = candidates[0]
    if any(tensor.is_quantized or _QUANTISED.search(name) for name, tensor in largest.tensors.items()):
        raise DfadcError(
            f"the weights of {source} are quantised, and no gradient flows through integers",
            "give the float checkpoint that they were made from",
        )
    if choice not in (None, "ema", "raw"):
        return _named(candidates, str(choice), source)
    same = [found for found in candidates if is_version_of(found, largest)]
    # MMEngine's averaging hook swaps: its ``state_dict`` is the average.
    is_swapped = isinstance(value, Mapping) and {"meta", "state_dict", "ema_state_dict"} <= value.keys()
    is_averaged = re.compile("state_dict").fullmatch if is_swapped else AVERAGED.search
    shared = _shared_length([found.key for found in same]) if len(same) > 1 else 0
    averaged = [found for found in same if is_averaged(found.key[shared:])]
    raw = [found for found in same if not is_averaged(found.key[shared:])]
    if choice is None and not (raw and averaged):
        _refuse_other_average(candidates, source, is_average=bool(averaged))
    if choice is not None and not (averaged if choice == "ema" else raw):
        keys = ", ".join(found.name for found in same)
        raise DfadcError(f"{source} holds no {choice} weights (it holds {keys})", "leave --teacher-weights away")
    wanted = raw if choice == "raw" or not averaged else averaged
    taken = wanted[0] if wanted is averaged else _preferred(wanted, source)
    return _explained(_completed(taken, raw), candidates, same, is_average=wanted is averaged)


def _shared_length(keys: list[str]) -> int:
    """Length of what several paths of keys begin with: ``ema.`` of ema.online_model and ema.ema_model."""
    parts = takewhile(lambda level: len(set(level)) == 1, zip(*(key.split(".") for key in keys), strict=False))
    return sum(len(level[0]) + 1 for level in parts)


def _completed(taken: FoundWeights, raw: list[FoundWeights]) -> FoundWeights:
    """An average of parameters alone, completed by the raw weights' running statistics."""
    if taken.network is not None or not raw or taken.shapes.keys() >= raw[0].shapes.keys():
        return taken
    note = f"its running statistics, which {taken.key} leaves out, are those of {raw[0].key or 'the top'}"
    return FoundWeights(taken.key, {**raw[0].tensors, **taken.tensors}, notes=(note,))


def _preferred(found: list[FoundWeights], source: object) -> FoundWeights:
    """One of several sets of weights of one network."""
    preferences: tuple[Callable[[FoundWeights], object], ...] = (
        lambda _: True,
        lambda each: re.search("best", each.key, re.IGNORECASE),
        lambda each: re.match(r"(module|model|state_dict|model_state_dict|net)($|\.)", each.key),
        lambda each: not _SECOND.search(each.key),
        lambda each: is_complete(each.network),
    )
    for is_preferred in preferences:
        fitting = [each for each in found if is_preferred(each)]
        if len(fitting) == 1:
            return fitting[0]
    keys = [each.name for each in found]
    raise DfadcError(
        f"{source} holds several sets of weights of the same shapes: {', '.join(keys)}",
        f"choose one: {' | '.join(f'--teacher-weights {key}' for key in keys[:4])}",
    )


def _named(candidates: list[FoundWeights], choice: str, source: object) -> FoundWeights:
    """The weights under a key; a part of a path is enough where only one fits."""
    within = [found for found in candidates if f".{choice}." in f".{found.key}."]
    if found := next((found for found in candidates if found.key == choice), next(iter(within), None)):
        return FoundWeights(found.key, found.tensors, found.network, (f"weights of {found.key}, as chosen",))
    for found in candidates:
        inner = f"{choice.rstrip('.')}."
        tensors = {name.removeprefix(inner): each for name, each in found.tensors.items() if name.startswith(inner)}
        if tensors:
            return FoundWeights(f"{found.key} {inner}*".strip(), tensors, notes=(f"weights of {inner}*, as chosen",))
    keys = ", ".join(found.name for found in candidates[:8])
    raise DfadcError(f"{source} holds no weights under {choice!r}", f"it holds weights under: {keys}")


def _explained(
    found: FoundWeights, candidates: list[FoundWeights], same: list[FoundWeights], *, is_average: bool
) -> FoundWeights:
    notes = list(found.notes)
    if found.key:
        average = "averaged weights " if is_average else "weights "
        others = [each.name for each in same if each.key != found.key]
        choice = f" (there is also {', '.join(others)}; --teacher-weights chooses)" if others else ""
        notes.insert(0, f"{average}taken from key {' > '.join(found.key.split('.'))}{choice}")
        networks = [
            each.name
            for each in candidates
            if all(each is not version for version in same)
            and each.num_elements > _NOTABLE * found.num_elements
            and not (each.key.startswith(f"{found.key}.") or found.key.startswith(f"{each.key}."))
        ]
        if networks:
            notes.append(f"other networks in the file were left out, for they are smaller: {', '.join(networks[:4])}")
    return FoundWeights(found.key, found.tensors, found.network, tuple(notes))


def _refuse_other_average(candidates: list[FoundWeights], source: object, *, is_average: bool) -> None:
    """Refuses averaged and raw weights that are of different shapes: one of them is another network's."""
    largest = candidates[0]
    for found in candidates[1:]:
        shared = found.shapes.keys() & largest.shapes.keys()
        if bool(AVERAGED.search(found.key)) != is_average and len(shared) > len(largest.shapes) / 2:
            name = next((name for name in shared if found.shapes[name] != largest.shapes[name]), "some names")
            raise DfadcError(
                f"{source} holds averaged and raw weights of different shapes: {largest.name} and {found.key} differ "
                f"in {name}",
                f"choose one: --teacher-weights {largest.key} | --teacher-weights {found.key}",
            )
