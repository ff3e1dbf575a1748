"""Loading a teacher: bytes -> kind -> a frozen network with its contract, its hash and its norm layers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import place
from dfadc.networks.flops import count_parameters, set_mode_
from dfadc.networks.full_precision import full_fp32
from dfadc.networks.norm_layers import NormLayer, find_norm_layers, is_batch_norm_with_statistics
from dfadc.storage import sha256_file
from dfadc.teacher.inspect import TeacherReport, Unknown, inspect_teacher
from dfadc.teacher.plan import TeacherPlan, build_planned_module, freeze_, plan_teacher
from dfadc.teacher.probe import DryRun, run_dry
from dfadc.teacher.read import read_teacher_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dfadc.teacher.file_kind import FileKind

__all__ = ["Placement", "Teacher", "TeacherReport", "Unknown", "inspect_teacher", "load_teacher"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Device and number format of a teacher's forward pass.

    Args:
        device: of the network.
        memory_format: of images; the network has it too, where it bears that.
        autocast_dtype: matrix work is cast to it; None: plain fp32.
        images_at_once: a pass without gradients is made in parts of at most so many; 0: as a whole.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_format: torch.memory_format = torch.contiguous_format
    autocast_dtype: torch.dtype | None = None
    images_at_once: int = 0


@dataclass(frozen=True, slots=True)
class Teacher:
    """Frozen trained network with its contract.

    Args:
        module: images (N, C, H, W), normalised -> logits (N, K) or (N, K, H, W); on the CPU, in eval mode, without
            trainable parameters. Gradients flow through it to the images.
        architecture: canonical name, or the class of a whole module.
        contract: its images and classes.
        contract_sources: field of the contract -> where its value came from.
        sha256: of the file's bytes.
        kind: of the file.
        norm_layers: all normalisation layers found.
        num_parameters: of the module.
        path: of the file.
        requested_architecture: what the caller named, to load the file again the same way; None where nothing.
        requested_weights: weights that the caller chose among several; None where it did not.
        requested_output: output that the caller or a sidecar chose among several; None where neither did.
        notes: decisions while loading, for the user.
        warnings: oddities that may be right.
        placement: device and number format of :meth:`logits`.
    """

    module: nn.Module
    architecture: str
    contract: ImageContract
    contract_sources: dict[str, str]
    sha256: str
    kind: FileKind
    norm_layers: tuple[NormLayer, ...]
    num_parameters: int
    path: Path
    requested_architecture: str | None = None
    requested_weights: str | None = None
    requested_output: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    placement: Placement = field(default_factory=Placement)

    def placed(self, placement: Placement) -> Teacher:
        """The teacher at another placement; its network is moved in place."""
        set_mode_(self.module, training=False)
        module = place(self.module, placement.device, placement.memory_format)
        return replace(self, module=module, placement=placement)

    def logits(self, images: Tensor, *, in_fp32: bool = False) -> Tensor:
        """Logits (N, K) or (N, K, h, w) of images; this is the one place where the network is called.

        Args:
            images: (N, C, H, W), normalised, on any device. Gradients flow to them where grad mode is on.
            in_fp32: nothing is cast or computed in TF32, as verification needs it.
        """
        at_once = self.placement.images_at_once
        if at_once and len(images) > at_once and not torch.is_grad_enabled():
            return torch.cat([self.logits(part, in_fp32=in_fp32) for part in images.split(at_once)])
        device = self.placement.device
        images = images.to(device).contiguous(memory_format=self.placement.memory_format)
        dtype = None if in_fp32 else self.placement.autocast_dtype
        full = full_fp32(device) if in_fp32 else nullcontext()
        with full, torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits: Tensor = self.module(images)
        return logits

    @property
    def batch_norms(self) -> list[nn.Module]:
        """The batch norms that remember the statistics of the training images."""
        return [layer for layer in self.module.modules() if is_batch_norm_with_statistics(layer)]


def load_teacher(
    path: Path | str,
    *,
    architecture: str | None = None,
    fields: ContractFields | None = None,
    trust: bool = False,
    weights: str | None = None,
    output: str | None = None,
) -> Teacher:
    """Loads a teacher file of any kind, safely, and freezes it.

    Args:
        path: the file, whose kind is told by its bytes, or a folder that holds one.
        architecture: ``torchvision:NAME``, ``timm:NAME``, ``file.py:factory``, ``package.module:factory`` or a network
            of ours, with keyword arguments in parentheses; needed where neither the file nor its weights tell.
        fields: parts of the contract that overrule every other source.
        trust: whether code in the file may run.
        weights: weights to take where a file holds several: ``ema``, ``raw``, a key or a prefix of names.
        output: index or key of the logits where the network gives several outputs, as in ``0`` or ``heads.colour``.

    Raises:
        DfadcError: the file is missing, damaged, unsafe or no teacher; or architecture, size or classes are unknown
            or contradict each other; or its outputs are not finite logits.
    """
    path = Path(path)
    contents = read_teacher_file(path, trust=trust, weights=weights, architecture=architecture, output=output)
    plan = plan_teacher(contents, architecture=architecture, fields=fields or ContractFields())
    module = freeze_(build_planned_module(plan))
    tried = run_dry(plan, module)
    return Teacher(
        module=freeze_(tried.module),
        architecture=plan.identity.architecture,
        contract=_complete_contract(plan, tried),
        contract_sources={**tried.sources, **plan.sources},
        sha256=sha256_file(contents.path),
        kind=contents.kind,
        norm_layers=find_norm_layers(tried.module),
        num_parameters=count_parameters(tried.module),
        path=contents.path,
        requested_architecture=architecture,
        requested_weights=weights,
        requested_output=contents.output,
        notes=plan.notes,
        warnings=tried.warnings,
    )


def _complete_contract(plan: TeacherPlan, tried: DryRun) -> ImageContract:
    """The contract with what the dry run told."""
    for name, found in (("num_classes", tried.num_classes), ("task", tried.task)):
        stated = getattr(plan.fields, name)
        if stated is not None and stated != found:
            raise DfadcError(
                f"{name} is {stated} ({plan.sources[name]}), but the teacher's outputs say {found}",
                f"correct or leave away {name}",
            )
    return replace(plan.fields, num_classes=tried.num_classes, task=tried.task).complete()
