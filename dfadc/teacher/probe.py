"""Dry run of a teacher on one small batch: classes, task, gradient, and outputs that look wrong."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfadc.contract import ImageContract, Task
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import BATCH, adapt, random_images
from dfadc.networks.logits import LogitsOf
from dfadc.networks.user_code import running_user_code
from dfadc.teacher.image_form import find_form
from dfadc.teacher.outputs import as_logits, choose_output
from dfadc.teacher.probabilities import outputs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.contract import ContractFields
    from dfadc.teacher.plan import TeacherPlan

#: Torchvision's networks that bear channels_last, single images and any number of them, as a test shows.
KNOWN_FAMILIES = tuple(
    f"torchvision:{name}"
    for name in (
        *("alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "mnasnet", "mobilenet"),
        *("regnet", "resnet", "resnext", "shufflenet", "squeezenet", "vgg", "wide_resnet"),
    )
)

#: Logits above this are of no trained classifier on images that it knows.
_WILD_LOGITS = 1e4
#: Ratio of variances above which the images' range is wrong.
_WILD_RATIO = 1e3
_SMALLEST_VARIANCE = 1e-12

#: Largest difference between the logits of two images that counts as none, relative to their size.
_CONSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class DryRun:
    """Result of the dry run.

    Args:
        module: the network, adapted to how it is called here, and wrapped where its logits had to be unwrapped.
        num_classes: K.
        task: by the shape of the logits, and by a sigmoid for each.
        warnings: adaptations, and oddities that may be right.
    """

    module: nn.Module
    num_classes: int
    task: Task
    warnings: tuple[str, ...]

    @property
    def sources(self) -> dict[str, str]:
        """Source of each value, by field of the contract."""
        shape = "shape of the outputs"
        return {"num_classes": shape, "task": "a sigmoid for each output" if self.task == "multilabel" else shape}


def run_dry(plan: TeacherPlan, module: nn.Module) -> DryRun:
    """Sends random images in the contract's value range through a teacher's network, on the CPU.

    Args:
        plan: of the teacher.
        module: its network, frozen, in eval mode.

    Raises:
        DfadcError: its size is unknown, it cannot take the images, gives no gradient to them, or its outputs are not
            finite logits.
    """
    fields, identity = plan.fields, plan.identity
    images = random_images(ImageContract(plan.known_input_size(), num_classes=2, mean=fields.mean, std=fields.std))
    output = None if plan.contents.has_chosen_output else plan.contents.output
    is_known = identity.module is None and identity.architecture.startswith(KNOWN_FAMILIES)
    notes: list[str] = []
    with _watching_first_norm(module) as watched:
        if not is_known or output is not None:
            module, notes = _adapted(module, images, output, fields)
        with running_user_code("the teacher cannot take its images", "check --input-size"):
            outputs = outputs_of(module, images[:BATCH])
            if not outputs.requires_grad:
                _keep_gradients_(module)
                outputs = outputs_of(module, images[:BATCH])
                notes.append("its forward computes without gradients (no_grad): they are kept")
    if not outputs.requires_grad:
        raise DfadcError(
            "no gradient flows through the teacher to its images",
            "its forward runs under inference_mode, detaches, computes on integers, or returns class indices (argmax); "
            "adversarial distillation needs the gradient",
        )
    head = as_logits(module, images[:BATCH], outputs, fields, cut=plan.contents.cut_head)
    logits = head.logits
    if logits.ndim not in (2, 4) or len(logits) != BATCH:
        raise DfadcError(
            f"the teacher's outputs for {BATCH} images have shape {tuple(logits.shape)}",
            "logits must be (N, K) for classification or (N, K, H, W) for segmentation",
        )
    task: Task = "multilabel" if head.is_multilabel else "classification" if logits.ndim == 2 else "segmentation"
    warnings = (*_judge_logits(logits), *_judge_images(watched))
    return DryRun(head.module, int(logits.shape[1]), task, (*notes, *head.notes, *warnings))


def _keep_gradients_(module: nn.Module) -> None:
    """Lets gradients flow through layers that are called under ``torch.no_grad``, in place; TorchScript stays.

    Transfer learning computes with frozen parts so. Each layer puts back the caller's mode; the block ends as it would.
    """
    is_enabled = True

    def remember(_: nn.Module, __: object) -> None:
        nonlocal is_enabled
        is_enabled = torch.is_grad_enabled()

    def put_back(_: nn.Module, __: object) -> None:
        torch.set_grad_enabled(is_enabled)

    for layer in module.modules():
        if not isinstance(layer, torch.jit.ScriptModule):
            layer.register_forward_pre_hook(remember if layer is module else put_back)


@contextmanager
def _watching_first_norm(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the ratios of remembered to seen variance per channel of the first batch norm, one tensor a forward."""
    ratios: list[Tensor] = []
    norm = next((layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)), None)
    if norm is None or norm.running_var is None:
        yield ratios
        return
    remembered = norm.running_var.clone()

    def compare(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].detach().float().var(dim=(0, 2, 3)).clamp(min=_SMALLEST_VARIANCE)
        ratios.append(remembered / seen)

    with norm.register_forward_pre_hook(compare):
        yield ratios


def _judge_images(ratios: list[Tensor]) -> tuple[str, ...]:
    """Compares the statistics that the first batch norm remembers with those of images in the contract's range.

    White noise has less variance behind a smoothing kernel than photographs have: by up to 147 for a 7x7 one over three
    channels. Pixels of 0..255 instead of normalised ones make it 3,000 and more.
    """
    ratio = float(ratios[0].median()) if ratios else 0.0
    if ratio < _WILD_RATIO:
        return ()
    warning = (
        f"the first batch norm remembers a variance {ratio:,.0f} times that of images in the contract's range: if the "
        "teacher takes pixels of 0..255, its std is that of [0, 1] divided by 255 (--std 0.0039,… without it)"
    )
    return (warning,)


def _adapted(
    module: nn.Module, images: Tensor, output: str | None, fields: ContractFields
) -> tuple[nn.Module, list[str]]:
    """A network that takes images as they are here and gives one tensor, with notes.

    ResNet-50 at 224 px takes nine times as long to adapt as one forward takes.
    """
    module, outputs, notes = find_form(module, images)
    path = None if outputs is None else choose_output(outputs, images[:BATCH], output, fields)
    if path is not None:
        module = LogitsOf(module, output=path)
        notes.append(f"of several outputs {path} is taken (--output {path})")
    tried = adapt(module, images, "the teacher", learns=False)
    return tried.module, [*notes, *tried.notes]


def _judge_logits(logits: Tensor) -> tuple[str, ...]:
    if not bool(logits.isfinite().all()):
        raise DfadcError(
            "the teacher's outputs are not finite (NaN or infinity) on images in the contract's range",
            "check the weights, --mean and --std",
        )
    warnings: list[str] = []
    scale = float(logits.abs().max())
    if scale > _WILD_LOGITS:
        warnings.append(
            f"the logits reach {scale:,.0f} on images in the contract's range: --mean, --std or the value range may be "
            "wrong"
        )
    if float((logits[0] - logits[1]).abs().max()) <= _CONSTANT_TOLERANCE * scale:
        warnings.append("two different random images give the same outputs: the teacher may be dead or untrained")
    return tuple(warnings)
