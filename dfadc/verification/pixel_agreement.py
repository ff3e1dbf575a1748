"""Agreement of two segmentation networks, pixel by pixel. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.verification.agreement import Agreement, compare
from dfadc.verification.logit_error import logit_scale
from dfadc.verification.pixel_scores import Classes, PairedPixels, PixelScores, boundary_band, count_pixels
from dfadc.verification.rates import TIE_MARGIN, Accuracy, Ties

if TYPE_CHECKING:
    from typing_extensions import Self

    from dfadc.verification.pixel_outputs import DenseOutputs


@dataclass(frozen=True, slots=True)
class DenseAgreement(Ties, PixelScores):
    """A candidate's classes against a reference's on the same images.

    Args:
        num_ties: pixels whose reference margin is below ``TIE_MARGIN`` of their image's :func:`logit_scale`.
        num_tied_disagreements: of those, the ones whose class differs.
        kl: mean KL(softmax(reference) || softmax(candidate)), in nats, over the pixels whose logits are kept.
        sqnr_db: as in :class:`Agreement`, over those pixels.
        max_logit_error: as in :class:`Agreement`, over those pixels.
        num_nonfinite: images with a pixel without a class on either side.
        boundary_width: pixels within this distance of a border between the reference's classes are left out.
    """

    num_ties: int
    num_tied_disagreements: int
    kl: float
    sqnr_db: float
    max_logit_error: float
    num_nonfinite: int
    boundary_width: int

    @property
    def outside_ties(self) -> Self:
        """Itself: the interval is one over whole images, and among so many pixels few ties fail no good export."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names that :class:`Agreement` has, and those of overlap; may be NaN or infinite."""
        shared = (
            *("n", "k", "num_ties", "num_tied_disagreements", "kl", "sqnr_db", "max_logit_error", "num_nonfinite"),
            "boundary_width",
        )
        return {
            **self.rates(),
            **{name: getattr(self, name) for name in shared},
            "top5": None,
            **self.iou_dict(),
            "per_class": [entry.to_dict() for entry in self.per_class],
        }


Measured = Agreement | DenseAgreement
MeasuredAccuracy = Accuracy | PixelScores


def compare_dense(candidate: DenseOutputs, reference: DenseOutputs, *, boundary_width: int = 0) -> DenseAgreement:
    """Compares the outputs of a network that is judged with a reference's for the same images.

    Pixels within ``boundary_width`` of a border between the reference's classes do not count.

    Raises:
        ValueError: the outputs are for other images or of other classes.
    """
    shapes = [(outputs.classes.shape, outputs.logits.shape) for outputs in (candidate, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"candidate outputs are {shapes[0]}, reference outputs {shapes[1]}")
    n, num_positions, num_classes = reference.logits.shape
    classes = _judged_classes(reference, boundary_width)
    judged = classes < num_classes
    incomplete = ((candidate.classes >= num_classes) | (reference.classes >= num_classes)).any(axis=(1, 2))
    finite_logits = np.where(np.isfinite(reference.logits), reference.logits, 0)
    scale = logit_scale(finite_logits.reshape(n, num_positions * num_classes))
    ties = judged & (reference.margins < TIE_MARGIN * scale[:, None, None])
    of_logits = compare(*(outputs.logits.reshape(-1, num_classes) for outputs in (candidate, reference)))
    return DenseAgreement.of(
        count_pixels(candidate.classes, classes, num_classes),
        num_ties=int(ties.sum()),
        num_tied_disagreements=int((ties & (candidate.classes != classes)).sum()),
        kl=of_logits.kl,
        sqnr_db=of_logits.sqnr_db,
        max_logit_error=of_logits.max_logit_error,
        num_nonfinite=int(incomplete.sum()),
        boundary_width=boundary_width,
    )


def pair_dense(
    before: DenseOutputs, after: DenseOutputs, reference: DenseOutputs, *, boundary_width: int
) -> PairedPixels:
    """Pairs two networks' outputs for the same images, each compared with the reference's classes.

    ``boundary_width`` is as in :func:`compare_dense`.
    """
    classes = _judged_classes(reference, boundary_width)
    judged = classes < reference.logits.shape[2]
    correct = [((outputs.classes == classes) & judged).sum(axis=(1, 2)) for outputs in (before, after)]
    return PairedPixels.of(correct[0] - correct[1], judged.sum(axis=(1, 2)))


def _judged_classes(reference: DenseOutputs, boundary_width: int) -> Classes:
    """(N, H, W) the reference's classes; no class within ``boundary_width`` of a border between two of them."""
    if not boundary_width:
        return reference.classes
    band = boundary_band(reference.classes, boundary_width)
    classes: Classes = np.where(band, reference.no_class, reference.classes).astype(reference.classes.dtype)
    return classes
