"""A network that is trained, with everything that trains it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfadc.distillation.moving_average import MovingAverage
from dfadc.networks.adaptation import place
from dfadc.recipe.schema import AdamSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.distillation.forward_state import ForwardState
    from dfadc.recipe.schema import OptimizerSettings, ScheduleSettings

#: SGD's momentum and the student's first beta; no recipe ever had another.
_MOMENTUM = 0.9
_SECOND_BETA = 0.999


class TrainableNetwork:
    """A network with its optimizer, gradient scaler, learning-rate schedule and moving average.

    Args:
        module: the network; moved to the policy's device and memory format in place.
        optimizer: settings of its optimizer.
        policy: how tensors are computed.
        schedule: of its learning rate.
        ema_decay: of its moving average; 0: none is kept.
        extra: parameters outside the network that are trained with it.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerSettings | AdamSettings,
        policy: ComputePolicy,
        *,
        schedule: ScheduleSettings,
        ema_decay: float = 0.0,
        extra: Sequence[nn.Parameter] = (),
    ) -> None:
        self.module = place(module, policy.device, policy.memory_format)
        self.settings = optimizer
        self.schedule = schedule
        self.parameters = [*(parameter for parameter in module.parameters() if parameter.requires_grad), *extra]
        self.optimizer = build_optimizer(self.parameters, optimizer)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.scales_gradients)
        self.ema = MovingAverage(self.module, ema_decay) if ema_decay > 0 else None
        #: What must stay finite: a mask may hold infinities from the start.
        floats = (tensor for tensor in (*self.parameters, *self.module.buffers()) if tensor.is_floating_point())
        self.finite = [tensor for tensor in floats if bool(tensor.isfinite().all())]
        #: Updates in a row whose gradient was not finite; on the device, read only at the log interval.
        self.skipped = torch.zeros((), device=policy.device)
        #: Lowered each time the run is rolled back.
        self.rate_scale = 1.0

    @property
    def average(self) -> nn.Module:
        """The moving average where the recipe keeps one, else the network itself."""
        return self.module if self.ema is None else self.ema.module

    def set_learning_rate(self, progress: float) -> None:
        """Sets the rate for a share of the run in [0, 1]: a pure function, so resuming needs no scheduler state."""
        rate = self.settings.learning_rate * self.rate_scale * rate_factor(self.schedule, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def update(self, losses: Tensor | Iterable[Tensor], forward_state: ForwardState | None = None) -> None:
        """One update down the gradient of a loss (scalar), skipped as a whole where that is not finite.

        Only this network's gradients are computed. Nothing waits for the device: fused optimizers read
        ``found_inf`` there.

        Args:
            losses: the loss, or summands of it, of which the next is asked for when the graph of the last is gone.
            forward_state: buffers that computing them writes to. They are put back where the update is skipped, and an
                update that takes them out of the finite numbers is skipped too.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if forward_state is not None:
            forward_state.keep()
        total = torch.zeros((), device=self.skipped.device)
        for loss in [losses] if isinstance(losses, Tensor) else losses:
            # autograd prunes what does not lead to these parameters: no weight gradients for other networks.
            torch.autograd.backward(self.scaler.scale(loss), inputs=self.parameters)
            total += loss.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        is_spoiled = total.isfinite().logical_not()
        if forward_state is not None and (spoiled := forward_state.is_spoiled()) is not None:
            is_spoiled |= spoiled
        for gradient in gradients[:1]:  # one is enough to have scaler and optimizer skip them all
            gradient.masked_fill_(is_spoiled, math.nan)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        found_inf = norm.isfinite().logical_not().float()
        self.skipped = (self.skipped + 1) * found_inf
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
        if forward_state is not None:
            forward_state.undo(found_inf)
        if self.ema is not None:
            self.ema.update(found_inf)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a checkpoint loads with ``weights_only=True``."""
        return {
            "module": self.module.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "rate_scale": self.rate_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.module.load_state_dict(state["module"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"].to(self.skipped.device, copy=True)
        self.rate_scale = state["rate_scale"]


def build_optimizer(
    parameters: list[nn.Parameter], settings: OptimizerSettings | AdamSettings
) -> torch.optim.Optimizer:
    """A fused optimizer, which can skip a step on the device."""
    if isinstance(settings, AdamSettings):
        betas = (settings.momentum, _SECOND_BETA)
        return torch.optim.Adam(parameters, lr=settings.learning_rate, betas=betas, fused=True)
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.kind == "adam":
        return torch.optim.Adam(parameters, lr=rate, betas=(_MOMENTUM, _SECOND_BETA), weight_decay=decay, fused=True)
    is_nesterov = settings.kind == "nesterov"
    optimizer = torch.optim.SGD(
        parameters, lr=rate, momentum=_MOMENTUM, weight_decay=decay, nesterov=is_nesterov, fused=True
    )
    forget_(optimizer)
    return optimizer


def forget_(optimizer: torch.optim.Optimizer) -> None:
    """Takes an optimizer back to before its first step.

    The momentum of SGD starts at zero explicitly: fused SGD leaves it uninitialised when its very first step is
    skipped (torch 2.14). A zero momentum gives the same first step.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if group.get("momentum", 0.0) > 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def rate_factor(schedule: ScheduleSettings, progress: float) -> float:
    """Factor on the learning rate at a share ``progress`` of the run in [0, 1].

    A warm-up multiplies whatever the schedule says, so it also fits a constant or step schedule.
    """
    warm = min(1.0, progress / schedule.warmup) if schedule.warmup > 0 else 1.0
    if schedule.kind == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "step":
        passed = sum(progress >= milestone for milestone in schedule.milestones)
        return float(warm * schedule.decay**passed)
    return warm
