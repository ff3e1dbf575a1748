"""Dry run of a teacher on one small batch: classes, task, gradient, and outputs that look wrong."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfadc.contract import ContractFields, ImageContract, Task
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import BATCH, Adapted, adapt, random_images
from dfadc.networks.logits import LogitsOf, unwrap_logits
from dfadc.networks.user_code import running_user_code

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Torchvision's networks that bear channels_last, single images and any number of them, as a test shows.
KNOWN_FAMILIES = tuple(
    f"torchvision:{name}"
    for name in (
        *(
            "alexnet",
            "convnext",
            "densenet",
            "efficientnet",
            "googlenet",
            "inception",
            "mnasnet",
            "mobilenet",
            "regnet",
        ),
        *("resnet", "resnext", "shufflenet", "squeezenet", "vgg", "wide_resnet"),
    )
)

#: Logits above this are of no trained classifier on images that it knows.
_WILD_LOGITS = 1e4
#: Ratio of variances above which the images' range is wrong.
_WILD_RATIO = 1e3
_SMALLEST_VARIANCE = 1e-12

#: How close to one a row of outputs must sum to be taken for probabilities.
_PROBABILITY_TOLERANCE = 1e-3
#: Largest difference between the logits of two images that counts as none, relative to their size.
_CONSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class DryRun:
    """Result of the dry run.

    Args:
        module: the network, adapted to how it is called here, and wrapped where its logits had to be unwrapped.
        num_classes: K.
        task: by the shape of the logits.
        warnings: adaptations, and oddities that may be right.
    """

    module: nn.Module
    num_classes: int
    task: Task
    warnings: tuple[str, ...]


def run_dry(
    module: nn.Module, fields: ContractFields, input_size: tuple[int, int, int], *, is_known: bool = False
) -> DryRun:
    """Sends random images in the contract's value range through a network, on the CPU.

    Args:
        module: the frozen network, in eval mode.
        fields: what is known of its contract.
        input_size: (C, H, W).
        is_known: the network bears every call (:data:`KNOWN_FAMILIES`), so one forward is enough.

    Raises:
        DfadcError: it cannot take the images, gives no gradient to them, or its outputs are not finite logits.
    """
    contract = ImageContract(input_size, num_classes=2, mean=fields.mean, std=fields.std)
    images = random_images(contract)
    with _watching_first_norm(module) as watched:
        tried = _run_once(module, images) if is_known else adapt(module, images, "the teacher", learns=False)
    module, logits, notes = tried.module, tried.logits, list(tried.notes)
    if logits.ndim == 4 and tuple(logits.shape[2:]) == (1, 1) and fields.task != "segmentation":
        module, logits = _flattened(module), logits.flatten(1)
        notes.append("the outputs (N, K, 1, 1) are flattened to logits (N, K)")
    num_classes, task = _classes_of(logits)
    if not tried.has_gradient:
        raise DfadcError(
            "no gradient flows through the teacher to its images",
            "its forward runs under no_grad or on integers; adversarial distillation needs the gradient",
        )
    warnings = (*_judge_logits(logits), *_judge_images(watched))
    return DryRun(module, num_classes, task, (*notes, *warnings))


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

    handle = norm.register_forward_pre_hook(compare)
    try:
        yield ratios
    finally:
        handle.remove()


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


def _run_once(module: nn.Module, images: Tensor) -> Adapted:
    """One forward of a network that needs no adaptation: a ResNet-50 at 224 px takes nine times as long to adapt."""
    with running_user_code("the teacher cannot take its images", "check --input-size"):
        logits = unwrap_logits(module(images[:BATCH].clone().requires_grad_())).float()
    return Adapted(module, logits.detach(), logits.requires_grad, ())


def _flattened(module: nn.Module) -> nn.Module:
    """A classifier whose last layer is a convolution, with logits (N, K); TorchScript takes no hooks and is wrapped."""
    if isinstance(module, torch.jit.ScriptModule):
        module = LogitsOf(module).train(module.training)
    module.register_forward_hook(_flatten_logits)
    return module


def _flatten_logits(_: nn.Module, __: tuple[Any, ...], output: Any) -> Tensor:
    return unwrap_logits(output).flatten(1)


def _classes_of(logits: Tensor) -> tuple[int, Task]:
    if logits.ndim in (2, 4) and logits.shape[0] == BATCH:
        return int(logits.shape[1]), "classification" if logits.ndim == 2 else "segmentation"
    raise DfadcError(
        f"the teacher's outputs for {BATCH} images have shape {tuple(logits.shape)}",
        "logits must be (N, K) for classification or (N, K, H, W) for segmentation",
    )


def _judge_logits(logits: Tensor) -> tuple[str, ...]:
    if not bool(logits.isfinite().all()):
        raise DfadcError(
            "the teacher's outputs are not finite (NaN or infinity) on images in the contract's range",
            "check the weights, --mean and --std",
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < _PROBABILITY_TOLERANCE).all()):
        raise DfadcError(
            "the teacher's outputs are probabilities, not logits (none is negative and they sum to 1)",
            "remove the final softmax: its gradient vanishes where the teacher is sure",
        )
    warnings: list[str] = []
    if bool((torch.logsumexp(logits, dim=1).abs() < _PROBABILITY_TOLERANCE).all()):
        warnings.append("the outputs look like log-probabilities; remove the final log_softmax if you can")
    scale = float(logits.abs().max())
    if scale > _WILD_LOGITS:
        warnings.append(
            f"the logits reach {scale:,.0f} on images in the contract's range: --mean, --std or the value range may be "
            "wrong"
        )
    spread = (logits[0] - logits[1]).abs().max()
    if float(spread) <= _CONSTANT_TOLERANCE * float(logits.abs().max()):
        warnings.append("two different random images give the same outputs: the teacher may be dead or untrained")
    elif bool((logits >= 0).all()) and bool((logits <= 1).all()):
        warnings.append("all outputs lie in [0, 1]: does the teacher end in a sigmoid?")
    return tuple(warnings)
