"""Views of a state dict under one common prefix, as ``model.`` or ``net.backbone.``, with what each leaves out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

#: A group of names with less than this share of all numbers is not the network.
_SHARE = 0.5
#: What wrappers keep beside a network and its forward does not use.
_BESIDE = re.compile(
    r"^(criterion|loss|\w*_loss|loss_\w+|metric\w*|\w+_metric\w*|acc(uracy)?|\w+_acc(uracy)?|n_averaged|class_weights?|"
    r"(model_)?ema\w*|teacher\w*|aux\w*|data_preprocessor|(train|val|test)_\w+|"
    r"(.+\.)?(\w+_fake_quant|activation_post_process\w*))"
    r"(\.|$)",
    re.IGNORECASE,
)
#: Names under which classifiers hang beside a ``backbone``.
_HEADS = ("fc", "classifier", "head", "heads.head", "classifier.1", "classifier.3", "classifier.6", "classifier.2")
_HEAD_PREFIX = re.compile(r"^(head|heads|fc|classifier|cls|linear|output|out|cls_head|classification_head)(\.|$)")
_BACKBONE = ("backbone.", "encoder.", "feature_extractor.", "features_extractor.", "base.", "base_model.", "body.")
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class View:
    """Part of a state dict, as one network may have saved it.

    Args:
        tensors: weights by name, without the prefix.
        prefix: the prefix that was stripped; empty for the whole.
        dropped: names that the view leaves out.
        note: change beyond the prefix, for the user.
    """

    tensors: Mapping[str, Tensor]
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    note: str = ""

    @property
    def lost(self) -> tuple[str, ...]:
        """Dropped weights that a forward may use; a view that loses some is no fit."""
        return tuple(name for name in self.dropped if not _BESIDE.match(name))

    def refuse_loss(self, architecture: str, source: object) -> None:
        """Refuses a view that fits an architecture, but loses weights.

        Raises:
            DfadcError: it loses some.
        """
        if self.lost:
            raise DfadcError(
                f"the weights of {source} under {self.prefix!r} fit {architecture}, but {', '.join(self.lost[:3])} "
                "would be lost",
                f"if they are no part of the teacher, pass --teacher-weights {self.prefix.rstrip('.')}; else name the "
                "network's own code with --teacher-arch file.py:factory",
            )

    @property
    def notes(self) -> list[str]:
        """The view in words."""
        found = [self.note] if self.note else []
        if self.prefix:
            found.append(f"prefix {self.prefix!r} stripped from the names of the weights")
        if self.dropped:
            more = f" and {len(self.dropped) - _SHOWN} more" if len(self.dropped) > _SHOWN else ""
            found.append(f"left out: {', '.join(self.dropped[:_SHOWN])}{more}")
        return found


def views_of(tensors: Mapping[str, Tensor]) -> Iterator[View]:
    """The whole, then its part under each prefix that holds most of it, from the shortest on.

    Weights that pruning or weight normalisation keep in two parts follow as they are used, in views of their own.
    """
    yield from _plain_views(tensors)
    merged = _merged(tensors)
    if merged.keys() != tensors.keys():
        note = "pruning masks and weight norms are multiplied into the weights"
        yield from (replace(view, note=note) for view in _plain_views(merged))


def _merged(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of ``torch.nn.utils.prune`` (orig, mask) and ``weight_norm`` (g, v) as plain ones."""
    found = dict(tensors)
    for name in tensors:
        stem, _, end = name.rpartition("_")
        if end == "orig" and (mask := tensors.get(f"{stem}_mask")) is not None:
            found[stem] = found.pop(name) * mask
            del found[f"{stem}_mask"]
        elif end == "g" and (direction := tensors.get(f"{stem}_v")) is not None and direction.ndim > 1:
            length = direction.flatten(1).norm(dim=1).reshape(-1, *[1] * (direction.ndim - 1))
            if tensors[name].shape == length.shape:
                found[stem] = found.pop(name) * found.pop(f"{stem}_v") / length
    return found


def _plain_views(tensors: Mapping[str, Tensor]) -> Iterator[View]:
    yield View(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if not _BESIDE.match(name)}
    if kept and len(kept) < len(tensors):
        yield View(kept, dropped=tuple(name for name in tensors if name not in kept))
    prefix = ""
    while (step := _heaviest(kept, prefix)) is not None:
        prefix = step
        inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        yield View(inner, prefix, tuple(name for name in tensors if not name.startswith(prefix)))


def joined_views_of(tensors: Mapping[str, Tensor]) -> Iterator[View]:
    """``backbone.*`` and ``head.*`` as one network of a library: the head under each name that libraries use."""
    for view in views_of(tensors):
        inner = next((each for each in _BACKBONE if any(name.startswith(each) for name in view.tensors)), None)
        if inner is None:
            continue
        backbone = {key.removeprefix(inner): each for key, each in view.tensors.items() if key.startswith(inner)}
        rest = {key: each for key, each in view.tensors.items() if not key.startswith(inner) and not _BESIDE.match(key)}
        roots = {key.rpartition(".")[0] for key in rest}
        if len(roots) != 1 or not all(_HEAD_PREFIX.match(root) for root in roots):
            continue
        root = roots.pop()
        left_out = tuple(key for key in view.tensors if not key.startswith(inner) and key not in rest)
        for head in _HEADS:
            head_weights = {f"{head}{key.removeprefix(root)}": each for key, each in rest.items()}
            if backbone.keys() & head_weights.keys():
                continue
            note = f"{inner}* and {root}.* taken for one network, whose classifier is {head}"
            yield View(backbone | head_weights, view.prefix, (*view.dropped, *left_out), note)


def prefixes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """First part of the names -> number of weights below it, for an overview."""
    return Counter(name.partition(".")[0] for name in tensors)


def _heaviest(tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    """The prefix one part longer that holds more than half of all numbers; None where there is none."""
    sizes: dict[str, int] = defaultdict(int)
    total = 0
    for name, tensor in tensors.items():
        total += tensor.numel()
        first, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot:
            sizes[f"{prefix}{first}."] += tensor.numel()
    heaviest = max(sizes, key=lambda key: sizes[key], default=None)
    return heaviest if heaviest is not None and sizes[heaviest] > _SHARE * total else None
