"""Gradient accumulation over micro-batches.

Gradients add up, so an update is the whole batch's wherever its loss is a mean over images: L1, KL, cross-entropy.
A property of a batch becomes one of each micro-batch, and the loss the mean over them: the statistics that batch norm
normalises by (and moves its running ones by, once a micro-batch), the statistics and the mean prediction of the priors,
the scale of ``scaled_l1``, the logarithm of ``log_l1``. A prior then asks more: every micro-batch is to match and to be
balanced (negative entropy is convex, so the mean over parts is never less than that of the batch).
``prior.batch_norm_momentum`` is for parts too small to match.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from dfadc.recipe.schema import num_micro_batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dfadc.distillation.images.batches import StudentBatch
    from dfadc.distillation.objectives import GeneratorBatch


def split_student_batch(batch: StudentBatch, micro_batch: int) -> Iterator[tuple[float, StudentBatch]]:
    """Micro-batches that hold images of each source in the batch's proportion, and their shares of it."""
    sources = ("latents", "procedural", "replayed")
    begins = [0, *itertools.accumulate(len(getattr(batch, source)) for source in sources)]
    total = begins[-1]
    parts = num_micro_batches(total, micro_batch)
    for part in range(parts):
        rows = {
            source: slice((part - begin) % parts, None, parts)
            for source, begin in zip(sources, begins[:-1], strict=True)
        }
        split = {source: getattr(batch, source)[rows[source]] for source in sources}
        yield _share(part, parts, total), batch._replace(**split, stored_logits=batch.stored_logits[rows["replayed"]])


def split_generator_batch(
    batch: GeneratorBatch, batch_size: int, micro_batch: int
) -> Iterator[tuple[float, GeneratorBatch]]:
    """Micro-batches, which hold every class that the batch asks for about as often as it does, and their shares."""
    parts = num_micro_batches(batch_size, micro_batch)
    for part in range(parts):
        rows = slice(part, None, parts)
        yield (
            _share(part, parts, batch_size),
            batch._replace(latents=_take(batch.latents, rows), targets=_take(batch.targets, rows), rows=rows),
        )


def _share(part: int, parts: int, total: int) -> float:
    """Share of ``total`` rows that are part, part + parts, part + 2 parts, ..."""
    return len(range(part, total, parts)) / total


def _take(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]
