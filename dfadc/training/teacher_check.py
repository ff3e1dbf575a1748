"""Probe of a teacher before training: logits of a few synthetic images."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfadc.distillation.losses.discrepancy import AS_CLASSES, logit_scale
from dfadc.errors import DfadcError
from dfadc.networks.logits import predict

if TYPE_CHECKING:
    from dfadc.contract import ImageContract, Task
    from dfadc.teacher.load import Teacher

#: Images of each kind.
NUM_IMAGES = 8
#: Logit scales that no loss of ours was made for, and those that are worth a word. Usual is 1 to 20.
WILD, UNUSUAL = (1e-4, 1e4), (0.05, 100.0)
#: Answers that differ by less than this share of their size do not differ.
CONSTANT = 1e-5


@dataclass(frozen=True)
class TeacherProbe:
    """Properties of a teacher on synthetic images.

    Args:
        scale: mean absolute deviation of the logits from their mean over the classes.
        logit_size: (h, w) of dense logits, which may be smaller than the images; () of others.
        batch_norms: those of the teacher's batch norms that an image passes through.
        notes: for the plan.
    """

    scale: float
    logit_size: tuple[int, ...]
    batch_norms: list[nn.Module]
    notes: tuple[str, ...]


@torch.no_grad()
def probe_teacher(teacher: Teacher) -> TeacherProbe:
    """Computes the teacher's logits of noise, smooth images and flat ones, in fp32.

    Args:
        teacher: loaded.

    Raises:
        DfadcError: the logits are not finite, do not depend on the image, or have a scale that cannot be meant.
    """
    batch_norms = teacher.batch_norms
    passed: list[nn.Module] = []
    with ExitStack() as hooks:
        for layer in batch_norms:
            hooks.callback(layer.register_forward_pre_hook(lambda norm, _: passed.append(norm)).remove)
        logits = teacher.logits(synthetic_images(teacher.contract), in_fp32=True).float()
    scale = _judge(logits, teacher.contract.task)
    notes = _notes(logits, scale, teacher.contract.task)
    used = [layer for layer in batch_norms if any(layer is norm for norm in passed)]
    if len(used) < len(batch_norms):
        notes.append(f"{len(batch_norms) - len(used)} of the teacher's batch norms see no image and do not count")
    return TeacherProbe(scale, tuple(logits.shape[2:]), used, tuple(notes))


def _notes(logits: Tensor, scale: float, task: Task) -> list[str]:
    """Oddities of logits that may be right."""
    notes = []
    if not UNUSUAL[0] <= scale <= UNUSUAL[1]:
        notes.append(
            f"the teacher's logits have an unusual scale ({scale:.3g}); plain L1 follows it, student.scaled_l1 and "
            "generator.discrepancy=scaled_l1 do not"
        )
    found, several = predict(logits, task), task == "multilabel"
    first = found[0] if several else found.flatten()[0]
    if bool((found == first).all()):
        what = "one set of labels" if several else f"class {int(first)}"
        notes.append(
            f"the teacher gives all of {len(logits)} very different images (noise, smooth, flat) {what}: check --mean, "
            "--std, the range of the pixels and the order of the channels (RGB, BGR)"
        )
    return notes


def _judge(logits: Tensor, task: Task) -> float:
    """The logits' scale.

    Raises:
        DfadcError: nothing can be learned from such logits.
    """
    if not bool(logits.isfinite().all()):
        raise DfadcError(
            "the teacher's logits are not finite (NaN or infinity) on smooth, flat or noisy images",
            "check its weights, --mean and --std; a network trained in half precision may overflow",
        )
    spread = float((logits - logits.mean(dim=0)).abs().max())
    if spread <= CONSTANT * float(logits.abs().max()):
        raise DfadcError(
            f"the teacher gives the same logits to {len(logits)} very different images: there is nothing to distil",
            "check that the file holds trained weights and that they fit the architecture",
        )
    scale = float(logit_scale(AS_CLASSES[task](logits)))
    if not WILD[0] <= scale <= WILD[1]:
        raise DfadcError(
            f"the teacher's logits have a wild scale: they lie {scale:.3g} from their mean, where 1 to 20 is usual",
            "check --mean, --std and the range of the pixels (0..1, 0..255); if it is meant, multiply its last layer "
            f"by {1 / scale:.1g}",
        )
    return scale


def synthetic_images(contract: ImageContract) -> Tensor:
    """Noise, smooth and flat images in the contract's range, (3 · NUM_IMAGES, C, H, W); the same every time."""
    rng = torch.Generator().manual_seed(0)
    channels, height, width = contract.input_size
    noise = torch.rand(NUM_IMAGES, *contract.input_size, generator=rng)
    grid = torch.rand(NUM_IMAGES, channels, 3, 3, generator=rng)
    smooth = functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
    flat = torch.rand(NUM_IMAGES, channels, 1, 1, generator=rng).expand(-1, -1, height, width)
    low, high = (torch.tensor(bound).view(1, -1, 1, 1) for bound in contract.value_range())
    return low + (high - low) * torch.cat([noise, smooth, flat])
