"""Student networks by name, with a stem that fits small images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfadc.errors import DfadcError
from dfadc.networks.adaptation import adapt, random_images
from dfadc.networks.construct import torchvision_classifiers, torchvision_segmenters
from dfadc.networks.flops import ShapesOnly, count_parameters
from dfadc.networks.logits import ResizedLogits, unwrap_logits, with_logits
from dfadc.networks.names import (
    KNOWN_ON_META,
    Architecture,
    build_architecture,
    resolve_architecture,
)
from dfadc.networks.state_dict import load_strictly_
from dfadc.networks.stems import SMALL_SIDE, Stem, parse_stem
from dfadc.networks.user_code import running_user_code
from dfadc.networks.zoo import NETWORKS, SEGMENTERS
from dfadc.teacher.match import drop_auxiliary
from dfadc.teacher.read import read_state_dict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dfadc.contract import ImageContract
    from dfadc.student.inherit import SmallerCopy


@dataclass(frozen=True, slots=True)
class Student:
    """Student network, ready to train.

    Args:
        module: images (N, C, H, W), normalised -> logits (N, K) or, before they are enlarged, (N, K, h, w); on the CPU,
            in training mode, trainable.
        architecture: canonical name.
        stem: the stem that was built; pass it to ``save_network``.
        num_parameters: of the module.
        notes: what was adapted, for the user.
        copy: what it is a part of where it is the teacher made smaller.
        is_inherited: whether it starts from its teacher's weights.
    """

    module: nn.Module
    architecture: str
    stem: Stem
    num_parameters: int
    notes: tuple[str, ...] = ()
    copy: SmallerCopy | None = None
    is_inherited: bool = False


@dataclass(frozen=True, slots=True)
class StudentRow:
    """One line of ``dfadc students``.

    Args:
        name: what ``--student`` takes.
        num_parameters: None where the network cannot take the images.
        flops: floating-point operations for one image, 2 for each multiply-add; None likewise.
        stem: that ``auto`` builds.
        reason: why the network does not fit; empty where it does.
    """

    name: str
    num_parameters: int | None
    flops: int | None
    stem: Stem = "default"
    reason: str = ""


def build_student(name: str, contract: ImageContract, *, stem: str = "auto", weights: Path | None = None) -> Student:
    """Builds a student for the contract's channels, size and classes.

    Args:
        name: a network of ours, a torchvision classifier or segmentation network (bare or ``torchvision:NAME``),
            ``timm:NAME``, ``smp:NAME:ENCODER`` or ``package.module:factory``.
        contract: the teacher's.
        stem: ``auto`` takes the small stem for images up to 64 px; ``small`` and ``default`` insist.
        weights: a file to start from; random weights where None.

    Raises:
        DfadcError: the name is unknown, the network cannot take the images, or the weights do not fit.
        RequirementMissing: a timm or smp name where that package is not installed.
    """
    wanted = _choose_stem(name, contract, stem)
    if resolve_architecture(name).library in KNOWN_ON_META:
        # Anyone else's code may not know the meta device; it is tried when it is built.
        check_fits(build_architecture(name, contract, stem=wanted, device="meta"), contract)
    built = build_architecture(name, contract, stem=wanted)
    check_fits(built, contract)
    notes = list(built.notes)
    if weights is not None:
        state_dict = drop_auxiliary(built.name, read_state_dict(weights))
        load_strictly_(built.module, state_dict, architecture=built.name, source=str(weights))
        notes.append(f"starts from {weights.name}")
    network, role = with_logits(built.module, contract).train(), f"the student {built.name}"
    adapted = adapt(network, random_images(contract), role, learns=True)
    module = adapted.module
    return Student(module, built.name, built.stem, count_parameters(module), (*notes, *adapted.notes))


def with_logits_like(student: Student, contract: ImageContract, size: tuple[int, ...]) -> Student:
    """The student with logits of the teacher's size: where theirs differ the student's are resized, in this one place.

    Args:
        student: that gives logits (N, K) or (N, K, h, w).
        contract: of teacher and student.
        size: (h', w') of the teacher's logits; () for a classifier.
    """
    if len(size) != 2:
        return student
    own = logit_size(student.module, contract)
    if own == size:
        return student
    note = (
        f"the student's logits are {own[0]}x{own[1]}, the teacher's {size[0]}x{size[1]}: "
        "the student's are resized to those of the teacher before any loss"
    )
    return replace(student, module=ResizedLogits(student.module, (size[0], size[1])), notes=(*student.notes, note))


@torch.no_grad()
def logit_size(module: nn.Module, contract: ImageContract) -> tuple[int, ...]:
    """(h, w) of a segmentation network's logits for the contract's images; it is left as it was."""
    was_training = module.training
    logits = module.eval()(torch.zeros(2, *contract.input_size))
    module.train(was_training)
    return tuple(logits.shape[2:])


def list_students(contract: ImageContract, names: Sequence[str] = ()) -> list[StudentRow]:
    """Students at this input size; one that does not fit carries the reason.

    Args:
        contract: input size, number of classes and task.
        names: which ones; by default every student of the task with a fixed name, ours first.

    Raises:
        DfadcError: one of ``names`` is unknown.
    """
    for name in names:
        resolve_architecture(name)
    is_dense = contract.is_dense
    library = torchvision_segmenters() if is_dense else torchvision_classifiers()
    fixed = [*(SEGMENTERS if is_dense else NETWORKS), *(f"torchvision:{name}" for name in library)]
    return [_describe(name, contract) for name in names or fixed]


def check_fits(built: Architecture, contract: ImageContract) -> int:
    """Sends one empty batch through a network and gives its FLOPs for one image.

    Raises:
        DfadcError: the network cannot take the images, or its logits are not of the contract's task and classes.
    """
    network = with_logits(built.module, contract)
    size = "x".join(map(str, contract.input_size))
    parameter = next(built.module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    was_training = built.module.training
    way = "choose another student; `dfadc students --input-size` lists what fits"
    counter = FlopCounterMode(display=False)
    try:
        built.module.eval()
        with (
            running_user_code(f"{built.name} cannot take images of size {size}", way),
            torch.no_grad(),
            ShapesOnly(),
            counter,
        ):
            logits = unwrap_logits(network(torch.zeros(2, *contract.input_size, device=device)))
    finally:
        built.module.train(was_training)
    _check_logits(built.name, tuple(logits.shape), contract)
    return int(counter.get_total_flops()) // 2


def _check_logits(name: str, shape: tuple[int, ...], contract: ImageContract) -> None:
    """Refuses logits for 2 images that are of another task or of other classes than the contract's."""
    dense = contract.is_dense
    if len(shape) != (4 if dense else 2) or shape[0] != 2:
        wanted = "(2, K, h, w): the teacher predicts every pixel" if dense else "(2, K): one prediction for an image"
        raise DfadcError(
            f"{name} gives outputs of shape {shape} for 2 images, not {wanted}",
            f"choose another student; `dfadc students --task {contract.task}` lists what fits",
        )
    if shape[1] != contract.num_classes:
        raise DfadcError(
            f"{name} has {shape[1]} classes, the teacher {contract.num_classes}",
            "a factory is given num_classes or the contract: use it for the last layer",
        )


def _choose_stem(name: str, contract: ImageContract, stem: str) -> Stem:
    if stem != "auto":
        return parse_stem(stem, "student.stem")
    is_small = max(contract.input_size[1:]) <= SMALL_SIDE
    # Our own networks are made for small images, and a user's factory is built as it is.
    return "small" if is_small and resolve_architecture(name).library in ("torchvision", "timm") else "default"


def _describe(name: str, contract: ImageContract) -> StudentRow:
    try:
        return _describe_on(name, contract, "meta")
    except DfadcError as exc:
        reason = exc.message
    if resolve_architecture(name).library not in KNOWN_ON_META:
        try:
            return _describe_on(name, contract, "cpu")
        except DfadcError as exc:
            reason = exc.message
    return StudentRow(name, None, None, reason=reason.splitlines()[0])


def _describe_on(name: str, contract: ImageContract, device: str) -> StudentRow:
    built = build_architecture(name, contract, stem=_choose_stem(name, contract, "auto"), device=device)
    return StudentRow(name, count_parameters(built.module), check_fits(built, contract), built.stem)
