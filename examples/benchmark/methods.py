"""The rows of the table: shipped recipes, `dfad` in plain fp32, and what bounds them above and below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfadc.recipe.schema import OptimizerSettings, ScheduleSettings, StudentSettings


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
        recipe: a shipped one; empty where the student learns from images that nobody generates.
        changes: to the recipe.
        images: what a student without a recipe learns from.
    """

    recipe: str = ""
    changes: tuple[str, ...] = ()
    images: Literal["", "real", "noise"] = ""


METHODS: dict[str, Method] = {
    "auto": Method("auto"),
    "pool": Method("pool"),
    "dfad": Method("dfad"),
    # What a reader of the paper would write first, and every speed-up is measured against.
    "dfad-plain": Method("dfad", ("compute.precision=fp32", "compute.compile=off")),
    "real-data": Method(images="real"),
    "noise": Method(images="noise"),
}
#: Learning from real images or noise: Hinton's distillation (arXiv 1503.02531), with the optimizer of `auto`.
LEARNING = StudentSettings(
    l1=0.0,
    kl=1.0,
    temperature=4.0,
    ema_decay=0.99,
    optimizer=OptimizerSettings(kind="nesterov", learning_rate=0.1, weight_decay=5e-4, clip_norm=5.0),
    schedule=ScheduleSettings(kind="cosine"),
)
LEARNING_BATCH = 64
#: Real images move by up to their side over this.
LEARNING_SHIFT_SHARE = 16
