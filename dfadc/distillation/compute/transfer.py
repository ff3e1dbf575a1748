"""Transfer of small tensors from the CPU, where some are drawn, to the device of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; on CUDA without waiting for the work that is queued there.

    A plain ``to`` waits for all of it, and so the host could never launch the next kernels ahead of time. The copy
    goes through page-locked memory, which torch keeps until it is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
