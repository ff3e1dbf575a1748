"""The rows of the table: shipped recipes, the paper's loop in plain PyTorch, and what bounds them above and below."""

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
        scaled: to the recipe besides, unless it is to be played as published. Its authors had GPUs and hours: with a
            generator of 227 MFLOPs an image (A, at 28 px), or with steps of hundreds of updates on large batches, a
            CPU makes a handful of steps in minutes, and the row would compare budgets instead of methods.
        images: what a student without a recipe learns from.
    """

    recipe: str = ""
    changes: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    images: Literal["", "real", "noise"] = ""

    def overrides(self, *, as_published: bool) -> tuple[str, ...]:
        """What is changed of the shipped recipe."""
        return self.changes if as_published else (*self.changes, *self.scaled)


#: The batch and the kind of generator that recipe `auto` has.
_SMALL = ("batch_size=64", "generator.architecture=scalable")
METHODS: dict[str, Method] = {
    "auto": Method("auto"),
    "pool": Method("pool"),
    "dfad+": Method("dfad+"),
    "dfad": Method("dfad"),
    "zskt": Method("zskt", scaled=_SMALL),
    "dafl": Method("dafl", scaled=_SMALL),
    "dfq": Method("dfq", scaled=_SMALL),
    "fast": Method("fast", scaled=(*_SMALL, "generator.steps=5", "student.steps=20")),
    "nayer": Method("nayer", scaled=(*_SMALL, "generator.steps=10", "student.steps=20")),
    "deepinversion": Method("deepinversion", scaled=("batch_size=64", "generator.steps=20", "student.steps=20")),
    # What a reader of the paper would write first, and every speed-up is measured against.
    "dfad-plain": Method("dfad", ("compute.precision=fp32", "compute.compile=off", "compute.channels_last=false")),
    "real-data": Method(images="real"),
    "noise": Method(images="noise"),
}
#: How a student learns from images that are there: Hinton's distillation (arXiv 1503.02531), moved as recipe `auto` is.
LEARNING = StudentSettings(
    l1=0.0,
    kl=1.0,
    temperature=4.0,
    ema_decay=0.99,
    optimizer=OptimizerSettings(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, clip_norm=5.0),
    schedule=ScheduleSettings(kind="cosine"),
)
LEARNING_BATCH = 64
#: Real images move by up to their side over this.
LEARNING_SHIFT_SHARE = 16
