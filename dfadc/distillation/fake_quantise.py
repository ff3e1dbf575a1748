"""The student as INT8 will compute it: rounded in the forward pass, in float all the while."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError

#: Layers whose weights and inputs an INT8 export rounds.
ROUNDED_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: Symmetric INT8, as the exporters' portable preset has it.
LARGEST = 127
#: Weight of earlier batches in the range of an activation.
MOMENTUM = 0.99


class FakeQuantiser:
    """Runs a student with weights and inputs of its convolutions and linear layers rounded to INT8.

    Gradients pass the rounding as if it were not there, and stop where a value is cut off (straight-through estimator,
    Bengio et al. 2013, arXiv 1308.3432). What moves, is averaged and exported are the float weights. Weights have one
    scale for each output channel, so folding a batch norm into them, a factor for each output channel, changes nothing
    about their rounding: what is rounded here before the fold is what is rounded after it. An activation has one
    scale, its range being a moving average of the largest magnitude.

    The student keeps its parameters and state; the hooks stay on it until :meth:`close` and compute nothing outside a
    call.

    Args:
        student: (N, C, H, W) -> logits, where it will be trained.

    Raises:
        DfadcError: it has no layer that INT8 would round.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3; symmetric, and without their delay of the activations.
    """

    def __init__(self, student: nn.Module) -> None:
        layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, ROUNDED_LAYERS)}
        if not layers:
            raise DfadcError(
                "student.quantise_from is set, and the student has neither convolutions nor linear layers",
                "--set student.quantise_from=1",
            )
        self._student = student
        self._weights = [f"{name}.weight" if name else "weight" for name in layers]
        device = student.get_parameter(self._weights[0]).device
        #: Largest magnitude of each layer's input; 0 where none was seen.
        self.ranges = torch.zeros(len(layers), device=device)
        self._zero = torch.zeros(1, dtype=torch.int32, device=device)
        self._rounds = self._learns = False
        self._handles = [
            layer.register_forward_pre_hook(partial(self._round_input, index))
            for index, layer in enumerate(layers.values())
        ]

    def __call__(self, images: Tensor, *, learns: bool) -> Tensor:
        """Logits (N, K) to images (N, C, H, W).

        Args:
            images: what the student is asked.
            learns: the ranges take these images in.
        """
        parameters = {name: self._round_weight(self._student.get_parameter(name)) for name in self._weights}
        self._rounds, self._learns = True, learns
        logits: Tensor = torch.func.functional_call(self._student, parameters, (images,))
        self._rounds = False
        return logits

    def close(self) -> None:
        """Takes the hooks off the student."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The ranges."""
        return {"ranges": self.ranges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.ranges.copy_(state["ranges"])

    def _round_weight(self, weight: Tensor) -> Tensor:
        """A weight (O, ...) on the INT8 grid of each output channel, whose largest magnitude is the last step."""
        scales = (weight.detach().abs().flatten(1).amax(dim=1) / LARGEST).clamp_min(torch.finfo(weight.dtype).tiny)
        zeros = self._zero.expand(len(scales))
        return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -LARGEST, LARGEST)

    def _round_input(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._rounds:
            return None
        if self._learns:
            self._learn_range(index, inputs[0].detach())
        scale = (self.ranges[index] / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.fake_quantize_per_tensor_affine(inputs[0], scale, self._zero, -LARGEST, LARGEST), *inputs[1:]

    @torch.no_grad()
    def _learn_range(self, index: int, activation: Tensor) -> None:
        """The first batch sets the range. An activation that is not finite moves no weight either."""
        known, peak = self.ranges[index], activation.abs().amax().float()
        moved = torch.where(known > 0, torch.lerp(peak, known, MOMENTUM), peak)
        self.ranges[index] = torch.where(peak.isfinite(), moved, known)
