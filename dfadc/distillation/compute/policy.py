"""The compute policy of a device: autocast dtype, gradient scaling and memory format, chosen once."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from dfadc.errors import DfadcError
from dfadc.teacher.load import Placement

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import ComputeSettings, Recipe

#: Values of images that may be in a network together outside updates, whatever an update holds.
_FREE_VALUES = 2**20
#: Operations of one image, forward, from which bf16 pays on a CPU. Below that it rounds and saves nothing: casts take
#: what products spare. On one core with AVX512-BF16 (torch 2.14.1, `--dry-run --precision bf16` beside `fp32` for the
#: benchmark's tasks) a step took 0.98 to 1.07 of its time in fp32 where the largest network had 0.4 to 1.8 MFLOPs, and
#: 0.60 to 0.88 where it had 21 to 81.
_WORTH_BF16_FLOPS = 5e6


@dataclass(frozen=True)
class ComputePolicy:
    """Device and number formats of a run.

    Args:
        device: where networks are trained.
        autocast_dtype: matrix work is cast to it; None for plain fp32.
        reason: why this precision, for the run's plan.
        channels_last: whether modules and images are NHWC.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    reason: str
    channels_last: bool = True

    @property
    def scales_gradients(self) -> bool:
        """fp16 gradients underflow without a scale; bf16 has the exponent range of fp32."""
        return self.autocast_dtype == torch.float16

    @property
    def precision(self) -> str:
        """The name a recipe gives this precision."""
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names[self.autocast_dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def placement(self, images_at_once: int) -> Placement:
        """Placement of a teacher under this policy."""
        return Placement(self.device, self.memory_format, self.autocast_dtype, images_at_once)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward pass; losses cast to fp32 themselves."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        DfadcError: the device is unknown or not present.
    """
    if name == "auto":
        present = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(present)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        # torch says "not compiled with CUDA" through an AssertionError.
        reason = str(exc).splitlines()[0]
        raise DfadcError(f"device {name!r} cannot be used: {reason}", "pass --device cpu, cuda or mps") from exc
    if device.type not in ("cpu", "cuda", "mps"):
        raise DfadcError(f"nothing can be trained on device {name!r}", "pass --device cpu, cuda or mps")
    return device


def choose_policy(settings: ComputeSettings, device: torch.device, flops: float = math.inf) -> ComputePolicy:
    """The policy for a device; ``precision = auto`` takes bf16 where the hardware computes it and that saves time.

    Args:
        settings: of the recipe.
        device: where networks are trained.
        flops: operations that the largest network needs for one image, forward.

    Raises:
        DfadcError: the precision cannot be had on this device.
    """
    dtype, reason = _choose_dtype(settings.precision, device, flops)
    return ComputePolicy(device=device, autocast_dtype=dtype, reason=reason)


def fit_policy(policy: ComputePolicy, student: nn.Module) -> tuple[ComputePolicy, tuple[str, ...]]:
    """The policy for a student that learns, and what was changed and why.

    On CPUs of AVX2 the weight gradient of a strided 1x1 convolution of fewer than 8 channels, in NHWC, writes where it
    should not (torch 2.14.1 with oneDNN: of 48 shapes on a Zen 3, 17 of the 24 with fewer channels died with a corrupt
    heap, none with 8 or more).
    """
    if policy.device.type != "cpu" or not policy.channels_last or not any(map(_is_fragile, student.modules())):
        return policy, ()
    note = "the student has strided 1x1 convolutions of fewer than 8 channels, which NHWC breaks on CPUs: it is NCHW"
    return replace(policy, channels_last=False), (note,)


def images_at_once(recipe: Recipe, contract: ImageContract) -> int:
    """Images in a network together outside updates: as many as in an update, which is known to fit, or more."""
    batch_size, part = recipe.batch_size, recipe.compute.micro_batch
    return max(min(batch_size, part or batch_size), _FREE_VALUES // math.prod(contract.input_size))


def _is_fragile(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.in_channels // layer.groups < 8
        and tuple(layer.kernel_size) == (1, 1)
        and max(layer.stride) > 1
    )


def _choose_dtype(precision: str, device: torch.device, flops: float) -> tuple[torch.dtype | None, str]:
    if precision == "auto":
        return _fastest_dtype(device, flops)
    if precision == "fp16" and device.type != "cuda":
        raise DfadcError(f"fp16 training needs CUDA, the device is {device}", "--precision bf16 or fp32")
    named = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return named[precision], "as asked"


def _fastest_dtype(device: torch.device, flops: float) -> tuple[torch.dtype | None, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} computes bf16"
        return torch.float16, f"compute capability {major}.{minor} has no bf16 units: fp16 with gradient scaling"
    if device.type == "cpu":
        units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
        found = [unit for flag, unit in units.items() if torch.cpu.get_capabilities().get(flag)]
        if not found:
            return None, "the CPU has neither AMX nor AVX512-BF16"
        if flops < _WORTH_BF16_FLOPS:
            return None, f"no network needs {_WORTH_BF16_FLOPS / 1e6:g} MFLOPs an image: {found[0]} would save nothing"
        return torch.bfloat16, f"the CPU has {found[0]}"
    return None, f"no faster precision is known to be safe on {device.type}"
