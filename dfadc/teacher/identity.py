"""Identity of a teacher: its architecture, stem and classifier, found from its name or from its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.networks.names import resolve_architecture
from dfadc.networks.network_file import refuse_factory_from_file
from dfadc.networks.state_dict import load_strictly_
from dfadc.networks.stems import Stem, parse_stem
from dfadc.teacher.candidates import candidates_of_other_head, nearest_names, timm_candidates
from dfadc.teacher.factory_fit import fit_factory
from dfadc.teacher.file_kind import CONVERTED_KINDS
from dfadc.teacher.heads import parse_activation
from dfadc.teacher.match import (
    Identity,
    drop_auxiliary,
    match_architecture,
    match_each,
    match_one,
    read_shapes,
    reference_network,
    size_of_positions,
)
from dfadc.teacher.prefixes import View, joined_views_of, prefixes_of, views_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from dfadc.contract import ContractFields
    from dfadc.networks.architecture_name import ArchitectureName
    from dfadc.teacher.sidecar import Statement
    from dfadc.teacher.teacher_file import TeacherFile


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices that the user or a sidecar makes beside the name."""

    stem: Stem | None = None
    activation: str | None = None
    input_size: tuple[int, int, int] | None = None


def identify(
    contents: TeacherFile, architecture: str | None, statements: list[Statement], stated: ContractFields
) -> Identity:
    """The network of a teacher file, by ``--teacher-arch``, the statements of files beside it, or its weights.

    Raises:
        DfadcError: the architecture is unknown, ambiguous or does not fit.
    """
    stated_name = next((each.architecture for each in statements if each.architecture is not None), None)
    if architecture is None and stated_name is not None:
        refuse_factory_from_file(stated_name, contents.path)
    if contents.module is not None and architecture is None:
        return _identify_module(contents.module, contents, stated)
    tensors = contents.tensors
    stem = next((each.stem for each in statements if each.stem is not None), None)
    named = architecture or stated_name
    if named is not None:
        resolved, options = _options(named, stem, stated)
        name, source = resolved.canonical, str(contents.path)
        if resolved.library == "factory":
            identity = fit_factory(resolved, tensors, stated, source)
        elif (found := _first_fit(name, tensors, options)) is not None:
            identity = _accept(*found, options, source, note="")
        else:
            identity = _misfit(name, tensors, options, source)
        if contents.module is not None:
            identity.notes.append(f"the file's whole network is not used: its weights were put into {named}")
        return identity
    options = Choices(stem, input_size=stated.input_size)
    return _by_hints(contents, tensors, options) or _only_match(contents, tensors, options)


def _options(named: str, stem: Stem | None, stated: ContractFields) -> tuple[ArchitectureName, Choices]:
    """A name without the arguments that are ours: ``stem`` and ``activation`` of a library's network."""
    resolved = resolve_architecture(named)
    arguments = dict(resolved.arguments)
    activation = None
    if resolved.library in ("torchvision", "timm"):
        if "stem" in arguments:
            stem = parse_stem(arguments.pop("stem"), "--arch-arg stem")
        if "activation" in arguments:
            activation = parse_activation(arguments.pop("activation"))
    plain = replace(resolved, arguments=tuple(sorted(arguments.items())))
    return plain, Choices(stem, activation, stated.input_size)


def _identify_module(module: nn.Module, contents: TeacherFile, stated: ContractFields) -> Identity:
    """A whole module needs no name, but a known one tells its library's documentation."""
    weights = contents.tensors
    # The first tensor with four axes is the convolution that sees the images; those of a graph stand in no such order.
    first = next((tensor for tensor in weights.values() if tensor.ndim == 4), None)
    channels = contents.channels or (None if first is None else int(first.shape[1]))
    matches = match_architecture(weights, input_size=stated.input_size)
    side = size_of_positions(weights)
    if len(matches) == 1:
        return replace(matches[0], module=module, side=side)
    if contents.kind in CONVERTED_KINDS:
        return Identity(f"{contents.kind} network", channels=channels, module=module, side=side)
    name = getattr(module, "original_name", None) or f"{type(module).__module__}.{type(module).__qualname__}"
    return Identity(f"{name} (whole module)", channels=channels, module=module, side=side)


def _first_fit(name: str, tensors: Mapping[str, Tensor], options: Choices) -> tuple[View, Identity] | None:
    """The first view that an architecture fits: as it is, else with another classifier."""
    for has_other_head in (False, True):
        for view in (*views_of(tensors), *joined_views_of(tensors)):
            size = options.input_size
            match = match_one(name, view.tensors, stem=options.stem, input_size=size, has_other_head=has_other_head)
            if match is not None:
                return view, match
    return None


def _misfit(name: str, tensors: Mapping[str, Tensor], options: Choices, source: str) -> Identity:
    """Channels and classes of weights that do not fit a named network; the strict load names the differences."""
    stem = options.stem or "default"
    reference = reference_network(name, stem=stem, input_size=options.input_size)
    expected = reference.state_dict().keys()
    views = (*views_of(tensors), *joined_views_of(tensors))
    view = max(views, key=lambda each: len(expected & each.tensors.keys()))
    channels, num_classes = read_shapes(reference, view.tensors)
    weights = drop_auxiliary(name, view.tensors)
    if num_classes is None or options.input_size is None:
        # Not even the last layer is there, or a size will be asked for: neither question would lead anywhere.
        load_strictly_(reference, weights, architecture=name, source=source, classes_may_differ=True)
    return Identity(name, stem, channels, num_classes, weights=weights, notes=view.notes)


def _by_hints(contents: TeacherFile, tensors: Mapping[str, Tensor], options: Choices) -> Identity | None:
    """The architecture that the training arguments name, where the weights fit it."""
    arguments = contents.arguments
    if arguments is None:
        return None
    if options.input_size is None and arguments.side is not None:
        options = replace(options, input_size=(3, *arguments.side))
    for hint in arguments.architectures:
        try:
            resolved = resolve_architecture(hint)
        except DfadcError:
            continue
        if resolved.library == "factory":
            continue
        found = _first_fit(resolved.canonical, tensors, options)
        if found is not None and not found[0].lost:
            note = f"architecture {resolved.canonical}, by {arguments.source}; the weights fit it"
            return _accept(*found, options, str(contents.path), note=note)
    return None


def _only_match(contents: TeacherFile, tensors: Mapping[str, Tensor], options: Choices) -> Identity:
    """The one architecture that bare weights fit."""
    lossy: tuple[View, Identity] | None = None
    for view, matches in _all_matches(tensors, options.input_size):
        if not matches:
            continue
        match = choose_match(matches, contents.path)
        if view.lost:
            lossy = lossy or (view, match)
            continue
        note = f"architecture {match.architecture} ({match.stem} stem), the only one that the weights fit"
        return _accept(view, match, options, str(contents.path), note=note)
    if lossy is not None:
        view, match = lossy
        view.refuse_loss(match.architecture, contents.path)
    near = nearest_names(list(views_of(tensors))[-1].tensors) or nearest_names(tensors)
    prefixes = ", ".join(f"{name}.* ({count})" for name, count in list(prefixes_of(tensors).items())[:5])
    remedy = (
        "name the architecture: --teacher-arch torchvision:NAME | timm:NAME | file.py:factory; where the file holds "
        "several networks, choose one: --teacher-weights PREFIX"
    )
    if contents.network_class:
        remedy = (
            f"the file holds a network of class {contents.network_class}: name the file that defines it, "
            f"--teacher-arch file.py:{contents.network_class.rpartition('.')[2]}; or, if you trust the file and the "
            "class can be imported, pass --trust-teacher"
        )
    raise DfadcError(
        f"the weights of {contents.path} fit no torchvision classifier and no network of ours; their names begin with "
        f"{prefixes}" + (f"; near are {', '.join(near)}" if near else ""),
        remedy,
    )


def _all_matches(
    tensors: Mapping[str, Tensor], size: tuple[int, int, int] | None
) -> Iterator[tuple[View, list[Identity]]]:
    """Views with their matches, the plainest explanation first."""
    views = list(views_of(tensors))
    for view in views:
        yield view, match_architecture(view.tensors, input_size=size)
    for view in views:
        names: Iterable[str] = candidates_of_other_head(view.tensors)
        yield view, match_each(names, view.tensors, input_size=size, has_other_head=True)
    for view in joined_views_of(tensors):
        yield view, match_architecture(view.tensors, input_size=size)
    for view in views:
        names = timm_candidates(view.tensors)
        yield view, match_each(names, view.tensors, stem="default", input_size=size)


def choose_match(matches: list[Identity], path: Path) -> Identity:
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


def _accept(view: View, match: Identity, options: Choices, source: str, *, note: str) -> Identity:
    """The identity of a match, unless the weights cannot tell the stem or the classifier's activation."""
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
        widths = [shapes["weight"] for shapes in head.layers.values() if len(shapes["weight"]) == 2]
        described = " -> ".join([str(widths[0][1]), *(str(shape[0]) for shape in widths)])
        between = f", {head.activation} between them" if head.activation else ""
        notes.append(f"its classifier {head.path} is the file's own: {described}{between}")
    return replace(match, head=head, weights=view.tensors, side=size_of_positions(view.tensors), notes=notes)
