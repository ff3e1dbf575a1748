"""Gates that are judged where they are asked for, and of which nothing is said where they are not: per class, accuracy.

Standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.verification.gate import Check, checked, ungated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfadc.verification.agreement import ClassAgreement
    from dfadc.verification.gate import Thresholds
    from dfadc.verification.pixel_agreement import Measured, MeasuredAccuracy
    from dfadc.verification.pixel_scores import ClassScore

#: How many classes a message names before it says "and N more".
_MAX_NAMED = 5


def extra_checks(
    who: str, against_teacher: Measured, accuracy: MeasuredAccuracy | None, thresholds: Thresholds
) -> tuple[Check, ...]:
    """The extra gates that are on.

    Args:
        who: what is judged, for the messages.
        against_teacher: its agreement with the teacher on the gate's source.
        accuracy: on labelled images; None where there were none.
        thresholds: the limits.
    """
    checks = []
    if thresholds.min_class_agreement is not None and against_teacher.n:
        checks.append(_class_check(who, against_teacher.per_class, thresholds.min_class_agreement))
    if thresholds.min_accuracy is not None:
        checks.append(_accuracy_check(who, accuracy, thresholds.min_accuracy))
    return tuple(checks)


def _class_check(who: str, per_class: Sequence[ClassAgreement | ClassScore], limit: float) -> Check:
    """The lower bound of each class; one whose samples could not show the limit cannot be judged, and that is said."""
    judged = [entry for entry in per_class if not entry.too_few and entry.low_if_perfect >= limit]
    few = sorted({entry.index for entry in per_class} - {entry.index for entry in judged})
    unjudged = f"; {len(few)} of {len(per_class)} classes have too few samples to tell: {_some(few)}" if few else ""
    if not judged:
        return checked("B", "class agreement", f"no class has samples enough to judge {who} by{unjudged}", held=False)
    worst = min(judged, key=lambda entry: entry.low)
    below = [entry.index for entry in judged if not entry.low >= limit]
    found = (
        f"{len(below)} classes fall below it: {_some(below)}" if below else "every class that can be judged holds it"
    )
    message = (
        f"{who} agrees with the teacher least in class {worst.index}, on {worst.rate:.2%} "
        f"[{worst.low:.2%}, {worst.high:.2%}] of {worst.n} samples, lower bound at least {limit:.2%}; {found}{unjudged}"
    )
    return checked("B", "class agreement", message, held=not below)


def _accuracy_check(who: str, measured: MeasuredAccuracy | None, limit: float) -> Check:
    """The lower Wilson bound of the accuracy."""
    if measured is None:
        return ungated("E", "accuracy", f"there are no labelled images to judge {who} by")
    message = (
        f"{who} answers {measured.accuracy:.2%} [{measured.low:.2%}, {measured.high:.2%}] of {measured.n} "
        f"{measured.unit} with their label, lower bound at least {limit:.2%}"
    )
    return checked("E", "accuracy", message, held=measured.low >= limit)


def _some(classes: Sequence[int]) -> str:
    more = len(classes) - _MAX_NAMED
    return ", ".join(map(str, classes[:_MAX_NAMED])) + (f" and {more} more" if more > 0 else "")
