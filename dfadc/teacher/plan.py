"""From a teacher file's contents to architecture and contract, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dfadc.contract import ContractFields, ImageContract, merge_fields
from dfadc.errors import DfadcError
from dfadc.networks.construct import SkipInitialisation
from dfadc.networks.flops import set_mode_
from dfadc.networks.names import build_architecture, documented_contract
from dfadc.networks.state_dict import load_strictly_
from dfadc.networks.stems import SMALL_SIDE
from dfadc.networks.user_code import guard_
from dfadc.teacher.heads import give_one_output_
from dfadc.teacher.identity import identify
from dfadc.teacher.match import drop_auxiliary
from dfadc.teacher.outputs import ONE_LOGIT
from dfadc.teacher.sidecar import read_statements, sidecar_paths
from dfadc.teacher.suggestions import commands, likely_sizes
from dfadc.teacher.training_arguments import IMAGENET

if TYPE_CHECKING:
    from torch import nn

    from dfadc.teacher.match import Identity
    from dfadc.teacher.teacher_file import TeacherFile

FLAGS = "command line"
_DOCUMENTING = ("torchvision:", "timm:")


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """Plan of a teacher: architecture, stem and contract, possibly with gaps.

    Args:
        fields: the contract, possibly with gaps.
        sources: field -> where its value came from.
        identity: the network and its weights.
        contents: the opened file.
        notes: decisions, for the user.
        requested: architecture that the user named.
    """

    fields: ContractFields
    sources: dict[str, str]
    identity: Identity
    contents: TeacherFile
    notes: tuple[str, ...] = ()
    requested: str | None = None

    def known_input_size(self) -> tuple[int, int, int]:
        """The input size.

        Raises:
            DfadcError: no source states it; the message lists the sources.
        """
        if self.fields.input_size is not None:
            return self.fields.input_size
        path = self.contents.path
        found = commands(likely_sizes(self.identity), path, self.requested)
        tried = (FLAGS, "metadata of the file", *sidecar_paths(path), _documented_size(self.identity))
        paste = f"one of these: {found}" if found else "--input-size CxHxW, e.g. --input-size 3x32x32"
        raise DfadcError(
            f"the input size of the teacher is unknown; looked at: {', '.join(tried)}",
            f"pass {paste}; or write it into a teacher.toml beside it (`dfadc inspect {path} --write-sidecar`)",
        )


def plan_teacher(contents: TeacherFile, *, architecture: str | None, fields: ContractFields) -> TeacherPlan:
    """Resolves architecture and contract: flags, then the file's metadata, its sidecar, the weights, the library.

    Raises:
        DfadcError: the architecture is unknown or ambiguous, or two sources contradict each other.
    """
    statements = read_statements(contents)
    sources = {FLAGS: fields} | {said.source: said.fields for said in statements}
    merged, _ = merge_fields(sources)
    _refuse_single_logit(fields.num_classes)
    identity = identify(contents, architecture, statements, merged)
    arguments = contents.arguments
    if arguments is not None:
        sources[arguments.source] = arguments.to_fields(channels=identity.channels, num_classes=identity.num_classes)
    if contents.input_size is not None:
        sources[f"the graph of the {contents.kind} file"] = ContractFields(input_size=contents.input_size)
    if identity.side is not None:
        size = (identity.channels or 3, identity.side, identity.side)
        sources["positional embedding of the weights"] = ContractFields(input_size=size)
    sources["shapes of the weights"] = ContractFields(num_classes=identity.num_classes)
    sources |= _documented(identity)
    resolved, origins = merge_fields(sources)
    if resolved.num_classes != 2:
        _refuse_single_logit(identity.num_classes)
    _check_shapes(identity, resolved, origins)
    notes = [*contents.notes, *identity.notes]
    # A network for small images may have been trained with fewer strides than the default stem has.
    is_small = resolved.input_size is not None and max(resolved.input_size[1:]) <= SMALL_SIDE
    is_plain = identity.module is None and identity.side is None and identity.stem == "default"
    has_strides = is_plain and identity.architecture.startswith(_DOCUMENTING)
    if is_small and has_strides and not any(said.stem for said in statements):
        notes.append(
            "the default stem is taken, for strides cannot be told from weights; --arch-arg stem=small or a sidecar "
            "states another"
        )
    return TeacherPlan(resolved, origins, identity, contents, tuple(notes), architecture)


def build_planned_module(plan: TeacherPlan) -> nn.Module:
    """The teacher's network with its weights, on the CPU.

    Raises:
        DfadcError: size or classes are unknown, or the weights do not fit.
    """
    identity = plan.identity
    if identity.module is not None:
        return guard_(identity.module, identity.architecture)
    plan.known_input_size()
    contract: ImageContract = replace(plan.fields, task=None).complete()
    with SkipInitialisation():
        built = build_architecture(identity.architecture, contract, stem=identity.stem)
        if identity.head is not None:
            built.module.set_submodule(identity.head.path, identity.head.build())
        elif identity.num_classes == 1:
            give_one_output_(built.module)
    assert identity.weights is not None, "a teacher file holds weights or a module"  # noqa: S101
    weights = drop_auxiliary(built.name, identity.weights)
    load_strictly_(built.module, weights, architecture=built.name, source=str(plan.contents.path))
    return built.module


def freeze_(module: nn.Module) -> nn.Module:
    """Puts a network into eval mode, fp32, with no trainable parameter, in place."""
    module.float()
    set_mode_(module, training=False)
    # Not module.requires_grad_(), which TorchScript refuses.
    for parameter in module.parameters():
        parameter.requires_grad = False
    return module


def _documented_size(identity: Identity) -> str:
    """Documented input size of the architecture, for the error that no source states one."""
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


def _documented(identity: Identity) -> dict[str, ContractFields]:
    """Documented contract of the architecture, as far as it applies to these weights.

    Size and class names belong to the documented weights alone; mean and std are assumed for any image with three
    channels, and the source says so.
    """
    if not identity.architecture.startswith(_DOCUMENTING):
        return {}
    library, _, name = identity.architecture.partition(":")
    documented = documented_contract(identity.architecture)
    if identity.channels != 3 or documented.input_size is None:
        return {}
    transforms_input = getattr(identity.module, "transform_input", False)
    if identity.num_classes == documented.num_classes and identity.stem == "default" and not transforms_input:
        return {f"{library} weights of {name} (assumed; override with --input-size, --mean, --std)": documented}
    # A network that transforms its input turns ImageNet's normalisation into the documented one by itself.
    mean, std = (IMAGENET["mean"], IMAGENET["std"]) if transforms_input else (documented.mean, documented.std)
    pair = ContractFields(mean=mean, std=std)
    return {f"{library} weights of {name} (assumed; override with --mean/--std)": pair}


def _refuse_single_logit(num_classes: int | None) -> None:
    """Refuses a network of one output before anything else is asked, unless two classes are stated for it."""
    if num_classes == 1:
        raise DfadcError("the teacher has num_classes = 1; distillation needs at least 2", ONE_LOGIT)


def _check_shapes(identity: Identity, resolved: ContractFields, origins: dict[str, str]) -> None:
    """Weights are facts: a source that contradicts them is wrong."""
    if resolved.input_size is not None:
        channels, *sides = resolved.input_size
        own_channels, side = identity.channels or channels, identity.side
        stated = f"input size {'x'.join(map(str, resolved.input_size))} ({origins['input_size']})"
        remedy = f"pass --input-size {own_channels}x{side or sides[0]}x{side or sides[1]}"
        if channels != own_channels:
            raise DfadcError(
                f"{stated} has {channels} channels, but the first layer of the weights takes {own_channels}", remedy
            )
        if side is not None and sides != [side, side]:
            raise DfadcError(
                f"{stated} does not fit the positional embedding of the weights, which is for {side}x{side} images",
                remedy,
            )
    is_pair = (identity.num_classes, resolved.num_classes) == (1, 2)
    if identity.num_classes is not None and resolved.num_classes != identity.num_classes and not is_pair:
        raise DfadcError(
            f"{resolved.num_classes} classes ({origins['num_classes']}), "
            f"but the last layer of the weights has {identity.num_classes}",
            "leave --num-classes away: the weights tell it",
        )
