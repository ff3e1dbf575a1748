"""From a teacher file's contents to architecture and contract, and where each value came from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dfadc.contract import ContractFields, ImageContract, merge_fields
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture, documented_contract, resolve_architecture
from dfadc.networks.network_file import refuse_factory_from_file
from dfadc.networks.state_dict import load_strictly_
from dfadc.networks.stems import SMALL_SIDE
from dfadc.networks.user_code import UserCodeFailed, guard_
from dfadc.teacher.identify import (
    Match,
    drop_auxiliary,
    match_architecture,
    match_one,
    read_shapes,
    reference_network,
)
from dfadc.teacher.sidecar import Statement, read_statements, sidecar_paths

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from dfadc.networks.stems import Stem
    from dfadc.teacher.read import TeacherFile

FLAGS = "command line"
SHAPES = "shapes of the weights"
_DOCUMENTING = ("torchvision:", "timm:")


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """How a teacher is to be built, as far as it is known.

    Args:
        architecture: canonical name, or the class of a whole module.
        stem: of the network to build.
        fields: the contract, possibly with gaps.
        sources: field -> where its value came from.
        notes: what was decided, for the user.
        tried: the sources that were asked.
    """

    architecture: str
    stem: Stem
    fields: ContractFields
    sources: dict[str, str]
    notes: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()

    def known_input_size(self) -> tuple[int, int, int]:
        """The input size.

        Raises:
            DfadcError: nobody knows it; the message says who was asked.
        """
        if self.fields.input_size is not None:
            return self.fields.input_size
        raise DfadcError(
            f"the input size of the teacher is unknown; asked were: {', '.join(self.tried)}",
            "pass --input-size CxHxW, e.g. --input-size 3x32x32, or write input_size into a teacher.toml beside it",
        )


@dataclass(slots=True)
class _Identity:
    """Which network it is."""

    architecture: str
    stem: Stem = "default"
    channels: int | None = None
    num_classes: int | None = None
    notes: list[str] = field(default_factory=list)


def plan_teacher(contents: TeacherFile, *, architecture: str | None, fields: ContractFields) -> TeacherPlan:
    """Resolves architecture and contract: flags, then the file's metadata, its sidecar, the weights, the library.

    Args:
        contents: the opened file.
        architecture: ``--teacher-arch``.
        fields: the contract's flags.

    Raises:
        DfadcError: the architecture is unknown or ambiguous, or two sources contradict each other.
    """
    statements = read_statements(contents)
    merged, _ = merge_fields({FLAGS: fields, **{said.source: said.fields for said in statements}})
    identity = _identify(contents, architecture, statements, merged)
    sources = {FLAGS: fields} | {said.source: said.fields for said in statements}
    if contents.input_size is not None:
        sources["the exported program"] = ContractFields(input_size=contents.input_size)
    sources[SHAPES] = ContractFields(num_classes=identity.num_classes)
    library, documented = _documented(identity, has_pixels=merged.mean is not None)
    sources[library] = documented
    resolved, origins = merge_fields(sources)
    _check_shapes(identity, resolved, origins)
    notes = [*contents.notes, *identity.notes]
    if (
        contents.module is None
        and not any(said.stem for said in statements)
        and _may_have_small_stem(identity, resolved)
    ):
        notes.append(
            "the default stem is taken, for strides cannot be told from weights; a sidecar may say stem = 'small'"
        )
    tried = (FLAGS, "metadata of the file", *sidecar_paths(contents.path), _documented_size(identity))
    return TeacherPlan(identity.architecture, identity.stem, resolved, origins, tuple(notes), tried)


def build_planned_module(contents: TeacherFile, plan: TeacherPlan) -> nn.Module:
    """The teacher's network with its weights, on the CPU.

    Raises:
        DfadcError: size or classes are unknown, or the weights do not fit.
    """
    if contents.module is not None:
        return guard_(contents.module, plan.architecture)
    plan.known_input_size()
    contract: ImageContract = replace(plan.fields, task=None).complete()
    built = build_architecture(plan.architecture, contract, stem=plan.stem)
    assert contents.state_dict is not None, "a teacher file holds weights or a module"  # noqa: S101
    weights = drop_auxiliary(built.name, contents.state_dict)
    load_strictly_(built.module, weights, architecture=built.name, source=str(contents.path))
    return built.module


def freeze_(module: nn.Module) -> nn.Module:
    """Puts a network into eval mode, fp32, with no trainable parameter, in place."""
    module.float()
    # An exported program has its mode built in and refuses the call.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    # Not module.requires_grad_(), which TorchScript refuses.
    for parameter in module.parameters():
        parameter.requires_grad = False
    return module


def _identify(
    contents: TeacherFile,
    architecture: str | None,
    statements: list[Statement],
    stated: ContractFields,
) -> _Identity:
    """The network's name, stem, channels and classes."""
    input_size = stated.input_size
    said = next((each for each in statements if each.architecture is not None), None)
    if architecture is None and said is not None and said.architecture is not None:
        refuse_factory_from_file(said.architecture, contents.path)
    if contents.module is not None:
        return _identify_module(contents.module, architecture, input_size)
    assert contents.state_dict is not None, "a teacher file holds weights or a module"  # noqa: S101
    named = architecture or (said.architecture if said else None)
    if named is None:
        return _only_match(contents, input_size)
    stem = next((each.stem for each in statements if each.stem is not None), None)
    match = match_one(named, contents.state_dict, stem=stem, input_size=input_size)
    if match is not None:
        return _Identity(match.architecture, match.stem, match.channels, match.num_classes)
    # It does not fit: the strict load will say why, and wants as much of the contract as the weights tell.
    resolved = resolve_architecture(named)
    try:
        reference = reference_network(named, stem=stem or "default", input_size=input_size)
    except UserCodeFailed:
        if input_size is None or stated.num_classes is None:
            raise
        # A factory may refuse the reference's 1000 classes; all that they would tell is stated.
        return _Identity(resolved.canonical, stem or "default")
    channels, num_classes = read_shapes(reference, contents.state_dict)
    if num_classes is None and resolved.library != "factory":
        # Not even the last layer is there: asking for the number of classes would lead nowhere.
        weights = drop_auxiliary(resolved.canonical, contents.state_dict)
        load_strictly_(reference, weights, architecture=resolved.canonical, source=str(contents.path))
    return _Identity(resolved.canonical, stem or "default", channels, num_classes)


def _identify_module(module: nn.Module, architecture: str | None, input_size: tuple[int, int, int] | None) -> _Identity:
    """A whole module needs no name, but a known one tells its library's documentation."""
    weights: dict[str, Tensor] = dict(module.state_dict())
    # The first tensor with four axes is the convolution that sees the images.
    first = next((tensor for tensor in weights.values() if tensor.ndim == 4), None)
    channels = None if first is None else int(first.shape[1])
    if architecture is not None:
        return _Identity(resolve_architecture(architecture).canonical, channels=channels)
    matches = match_architecture(weights, input_size=input_size)
    if len(matches) == 1:
        found = matches[0]
        return _Identity(found.architecture, found.stem, found.channels, found.num_classes)
    kind = getattr(module, "original_name", None) or f"{type(module).__module__}.{type(module).__qualname__}"
    return _Identity(f"{kind} (whole module)", channels=channels)


def _only_match(contents: TeacherFile, input_size: tuple[int, int, int] | None) -> _Identity:
    """The one architecture that a bare state dict fits.

    Raises:
        DfadcError: none or several fit.
    """
    assert contents.state_dict is not None, "only weights are matched"  # noqa: S101
    return choose_match(match_architecture(contents.state_dict, input_size=input_size), contents.path)


def choose_match(matches: list[Match], path: Path) -> _Identity:
    """One match is used, several are named and refused.

    Raises:
        DfadcError: none or several fit.
    """
    if not matches:
        raise DfadcError(
            f"the weights of {path} fit no torchvision classifier and no network of ours",
            "name the architecture: --teacher-arch torchvision:NAME | timm:NAME | package.module:factory",
        )
    if len(matches) > 1:
        names = ", ".join(match.architecture for match in matches)
        raise DfadcError(
            f"the weights of {path} fit several architectures: {names}", "choose one with --teacher-arch NAME"
        )
    match = matches[0]
    note = f"architecture {match.architecture} ({match.stem} stem), the only one that the weights fit"
    return _Identity(match.architecture, match.stem, match.channels, match.num_classes, [note])


def _documented_size(identity: _Identity) -> str:
    """What the library says of sizes, for the error that nobody knows this one."""
    if not identity.architecture.startswith(_DOCUMENTING):
        return f"documentation of {identity.architecture} (none)"
    documented = documented_contract(identity.architecture)
    if documented.input_size is None:
        return f"documentation of {identity.architecture} (no size)"
    size = "x".join(map(str, documented.input_size))
    return (
        f"documentation of {identity.architecture} ({size}, but only for its own weights of {documented.num_classes} "
        f"classes and 3 channels, not for {identity.num_classes} classes and {identity.channels} channels)"
    )


def _documented(identity: _Identity, *, has_pixels: bool) -> tuple[str, ContractFields]:
    """What the library documents of this architecture, as far as it applies to these weights.

    Size and class names belong to the documented weights alone; mean and std are assumed for any image with three
    channels, and the source says so.
    """
    if not identity.architecture.startswith(_DOCUMENTING):
        return "the architecture's library (it documents none)", ContractFields()
    library, _, name = identity.architecture.partition(":")
    documented = documented_contract(identity.architecture)
    if identity.channels != 3 or documented.input_size is None:
        return f"{library}'s documentation of {name} (it does not describe these weights)", ContractFields()
    if identity.num_classes == documented.num_classes and identity.stem == "default":
        return f"{library} weights of {name} (assumed; override with --input-size, --mean, --std)", documented
    pair = ContractFields() if has_pixels else ContractFields(mean=documented.mean, std=documented.std)
    return f"{library} weights of {name} (assumed; override with --mean/--std)", pair


def _may_have_small_stem(identity: _Identity, resolved: ContractFields) -> bool:
    """Whether the network may have been trained with fewer strides than the default stem has."""
    size = resolved.input_size
    is_small = size is not None and max(size[1:]) <= SMALL_SIDE
    return is_small and identity.stem == "default" and identity.architecture.startswith(_DOCUMENTING)


def _check_shapes(identity: _Identity, resolved: ContractFields, origins: dict[str, str]) -> None:
    """Weights are facts: a source that contradicts them is wrong.

    Raises:
        DfadcError: channels or classes differ.
    """
    size = resolved.input_size
    if size is not None and identity.channels is not None and size[0] != identity.channels:
        raise DfadcError(
            f"input size {'x'.join(map(str, size))} ({origins['input_size']}) has {size[0]} channels, "
            f"but the first layer of the weights takes {identity.channels}",
            f"pass --input-size {identity.channels}x{size[1]}x{size[2]}",
        )
    if identity.num_classes is not None and resolved.num_classes != identity.num_classes:
        raise DfadcError(
            f"{resolved.num_classes} classes ({origins['num_classes']}), "
            f"but the last layer of the weights has {identity.num_classes}",
            "leave --num-classes away: the weights tell it",
        )
