"""Accepting a match as a teacher's identity, or refusing it where weights cannot tell two networks apart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.teacher.match import Match, reference_network, size_of_positions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from dfadc.networks.stems import Stem
    from dfadc.teacher.heads import Activation, ReplacedHead
    from dfadc.teacher.prefixes import View


@dataclass(slots=True)
class Identity:
    """The network of a teacher file.

    Args:
        architecture: canonical name, or the class of a whole module.
        stem: of the network to build.
        channels: C, where the weights tell.
        num_classes: K, where the weights tell; the outputs have the last word.
        notes: how it was found, for the user.
        weights: what is loaded into the network; None where it is a whole module.
        head: the classifier, where it is another than the architecture's.
        module: the network, where it is there already.
        side: of the images, where the weights tell.
    """

    architecture: str
    stem: Stem = "default"
    channels: int | None = None
    num_classes: int | None = None
    notes: list[str] = field(default_factory=list)
    weights: Mapping[str, Tensor] | None = None
    head: ReplacedHead | None = None
    module: nn.Module | None = None
    side: int | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices that the user or a sidecar makes beside the name."""

    stem: Stem | None = None
    activation: Activation | None = None
    input_size: tuple[int, int, int] | None = None


def choose_match(matches: list[Match], path: Path) -> Match:
    """The only match of one or more.

    Raises:
        DfadcError: several fit; they are named.
    """
    if len(matches) > 1:
        names = [match.architecture for match in matches]
        raise DfadcError(
            f"the weights of {path} fit several architectures: {', '.join(names)}",
            f"choose one: {' | '.join(f'--teacher-arch {name}' for name in names[:4])}",
        )
    return matches[0]


def accept(view: View, match: Match, options: Choices, source: str, *, note: str) -> Identity:
    """The identity of a match.

    Raises:
        DfadcError: the weights cannot tell the stem or the classifier's activation.
    """
    if match.stem == "small" and options.stem is None:
        default = reference_network(match.architecture, stem="default", input_size=None)
        if any(type(layer).__name__ == "MaxPool2d" for layer in default.children()):
            raise DfadcError(
                f"the weights of {source} fit two networks: {match.architecture} with a 3x3 first convolution, and the "
                "pooling after it kept or removed",
                f"choose one: --teacher-arch {match.architecture} --arch-arg stem=small (no pooling, as for 32 px "
                "images) | --arch-arg stem=pooled",
            )
    head = match.head
    if head is not None and head.needs_activation:
        if options.activation is None:
            raise DfadcError(
                f"the weights of {source} fit {match.architecture} with several linear layers as {head.path}, and do "
                "not tell the activation between them",
                f"name it: --teacher-arch {match.architecture} --arch-arg activation=relu (or gelu, tanh, none, …)",
            )
        head = replace(head, activation=options.activation)
    notes = [*([note] if note else []), *view.notes]
    if head is not None:
        notes.append(f"its classifier {head.path} is the file's own: {_describe_head(head)}")
    side = size_of_positions(view.tensors)
    return Identity(
        match.architecture, match.stem, match.channels, match.num_classes, notes, view.tensors, head, side=side
    )


def _describe_head(head: ReplacedHead) -> str:
    widths = [shapes["weight"] for shapes in head.layers.values() if len(shapes["weight"]) == 2]
    described = " -> ".join([str(widths[0][1]), *(str(shape[0]) for shape in widths)])
    return f"{described}, {head.activation} between them" if head.activation else described
