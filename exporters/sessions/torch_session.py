"""Session of a torch module: the teacher or the student itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from exporters.sessions.session import DEFAULT_BATCH_SIZE, BatchedSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


class TorchSession(BatchedSession):
    """A torch module, (N, C, H, W) to one tensor of logits, in eval mode.

    The module is not changed: one in training mode or on another device is copied.
    """

    def __init__(self, module: nn.Module, device: str = "cpu", *, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        import torch  # noqa: PLC0415 - the other sessions run without torch

        super().__init__(batch_size=batch_size)
        self._torch = torch
        self.device = device
        elsewhere = any(tensor.device.type != torch.device(device).type for tensor in module.state_dict().values())
        training = any(part.training for part in module.modules())
        self._module = copy.deepcopy(module).to(device).eval() if elsewhere or training else module

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            logits = self._module(self._torch.from_numpy(images).to(self.device))
        if not isinstance(logits, self._torch.Tensor):
            raise DfadcError(f"the network returns {type(logits).__name__}, not a tensor of logits")
        array: NDArray[np.float32] = logits.float().cpu().numpy()
        return array
