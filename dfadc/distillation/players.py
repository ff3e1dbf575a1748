"""Who plays: student and generator, each with what moves it, and all that a run carries on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfadc.distillation.replay import STORED_DTYPE, ReplayRing, Reservoir, ring_capacity

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.distillation.precision import ComputePolicy
    from dfadc.recipe import GeneratorSettings, OptimizerSettings, Recipe, ScheduleSettings, StudentSettings

#: Images of each student update that are offered to the reservoir; it still sees the whole run.
RESERVOIR_OFFER = 4


class Player:
    """A network that moves, and everything that moves it.

    Args:
        module: the network; moved to the policy's device and memory format in place.
        settings: its side of the recipe.
        policy: how tensors are computed.
    """

    def __init__(self, module: nn.Module, settings: StudentSettings | GeneratorSettings, policy: ComputePolicy) -> None:
        self.module = module.to(policy.device, memory_format=policy.memory_format)  # type: ignore[call-overload]
        self.settings = settings
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.parameters, settings.optimizer)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.scales_gradients)
        self.ema: AveragedModel | None = None
        if settings.ema_decay > 0:
            average = get_ema_multi_avg_fn(settings.ema_decay)
            self.ema = AveragedModel(self.module, multi_avg_fn=average, use_buffers=True)
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
        rate = self.settings.optimizer.learning_rate * self.rate_scale * rate_factor(self.settings.schedule, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def move(self, loss: Tensor) -> None:
        """One update down the gradient of ``loss`` (scalar), skipped as a whole where that is not finite.

        Only this player's gradients are computed. Nothing waits for the device: fused optimizers read
        ``found_inf`` there.
        """
        self.optimizer.zero_grad(set_to_none=True)
        # autograd prunes what does not lead to these parameters: no weight gradients for the other player.
        torch.autograd.backward(self.scaler.scale(loss), inputs=self.parameters)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.optimizer.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.optimizer.clip_norm, norm)
        found_inf = norm.isfinite().logical_not().float()
        self.skipped = (self.skipped + 1) * found_inf
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.module)

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
        self.skipped = state["skipped"].clone()
        self.rate_scale = state["rate_scale"]


class Players:
    """Both players, their memory and their dice: one ``state_dict`` is everything a run needs to go on bit by bit.

    Args:
        student: the student network, (N, C, H, W) -> logits.
        generator: the generator network, latents (N, Z) -> (N, C, H, W).
        recipe: the run's settings.
        contract: what an image is.
        policy: how tensors are computed.
    """

    def __init__(
        self,
        student: nn.Module,
        generator: nn.Module,
        *,
        recipe: Recipe,
        contract: ImageContract,
        policy: ComputePolicy,
    ) -> None:
        self.student = Player(student, recipe.student, policy)
        self.generator = Player(generator, recipe.generator, policy)
        self.latent_dim = recipe.generator.latent_dim
        self.device = policy.device
        capacity = ring_capacity(recipe.replay.capacity, contract.input_size, recipe.replay.max_mebibytes)
        self.ring = ReplayRing(capacity if recipe.replay.share > 0 else 0, contract.input_size, policy.device)
        self.reservoir = Reservoir(recipe.replay.reservoir, contract.input_size, policy.device)
        self.set_aside = torch.empty((0, *contract.input_size), dtype=STORED_DTYPE)
        self.step = 0
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.latent_rng = torch.Generator(policy.device).manual_seed(recipe.seed + 1)
        #: Verification draws from a stream of its own: its latents are never those of training.
        self.sample_rng = torch.Generator(policy.device).manual_seed(recipe.seed + 2)

    def remember(self, images: Tensor) -> None:
        """Keeps images (N, C, H, W) that the student was shown: all in the ring, a few in the reservoir."""
        # A value that is not finite would spoil every batch that replays it, long after the players were taken back.
        images = images.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if len(self.ring.images):
            self.ring.push(images)
        if len(self.reservoir.images):
            self.reservoir.offer(images[:RESERVOIR_OFFER], self.rng)

    def draw_latents(self, count: int) -> Tensor:
        """Fresh standard-normal latents (count, Z) for training."""
        return torch.randn(count, self.latent_dim, generator=self.latent_rng, device=self.device)

    def draw_unseen_latents(self, count: int) -> Tensor:
        """Standard-normal latents (count, Z) from the stream that training never uses."""
        return torch.randn(count, self.latent_dim, generator=self.sample_rng, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in a run; references, not copies, except where stated by the parts."""
        streams = {"rng": self.rng, "latent_rng": self.latent_rng, "sample_rng": self.sample_rng}
        return {
            "student": self.student.state_dict(),
            "generator": self.generator.state_dict(),
            "ring": self.ring.state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "set_aside": self.set_aside,
            "step": self.step,
            # Dropout in a student draws from torch's global stream.
            "global_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            **{name: stream.get_state() for name, stream in streams.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.student.load_state_dict(state["student"])
        self.generator.load_state_dict(state["generator"])
        self.ring.load_state_dict(state["ring"])
        self.reservoir.load_state_dict(state["reservoir"])
        self.set_aside = state["set_aside"].clone()
        self.step = state["step"]
        torch.set_rng_state(state["global_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.rng.set_state(state["rng"])
        self.latent_rng.set_state(state["latent_rng"])
        self.sample_rng.set_state(state["sample_rng"])


def build_optimizer(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """A fused optimizer, which can skip a step on the device.

    The momentum of SGD starts at zero explicitly: fused SGD leaves it uninitialised when its very first step is
    skipped (torch 2.14). A zero momentum gives the same first step.
    """
    if settings.kind == "adam":
        return torch.optim.Adam(
            parameters,
            lr=settings.learning_rate,
            betas=(settings.momentum, settings.second_beta),
            weight_decay=settings.weight_decay,
            fused=True,
        )
    optimizer = torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=True,
    )
    if settings.momentum > 0:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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
