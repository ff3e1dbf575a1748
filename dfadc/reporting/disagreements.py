"""Confusion and worst disagreements of fp32 student and teacher. numpy only.

The lists are bounded, however many classes and samples there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.verification.agreement import ALL_SOURCES, of_samples
from dfadc.verification.logit_error import log_softmax

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfadc.verification.samples import SampleSet

#: Classes that a report lists one by one; of more it lists the ones with most disagreements.
MAX_CLASSES = 20
#: Disagreements that a report shows of each source.
WORST_PER_SOURCE = 12

Integers = npt.NDArray[np.integer[Any]]


def describe_disagreements(samples: SampleSet, source: str) -> dict[str, Any]:
    """Confusion between teacher and student, and the worst disagreements, as plain JSON values.

    With several labels an image the classes are the states of labels, and there is no confusion between them.
    ``classes`` are those listed, by index; ``confusion[i]`` holds how often the student predicts each of them, and in a
    last column any other, for samples that the teacher puts into ``classes[i]``. It is counted over one source, or over
    all if the set has none of it. Samples with a NaN or infinite logit are left out.
    """
    teacher, student = samples.teacher_classes, samples.predict(samples.student_logits)
    finite, differ = of_samples((teacher >= 0) & (student >= 0)), ~of_samples(teacher == student)
    source = source if samples.counts().get(source) else ALL_SOURCES
    chosen = finite if source == ALL_SOURCES else finite & samples.of_source(source)
    classes: tuple[int, ...] = ()
    if samples.contract.task != "multilabel":
        missed = np.bincount(teacher[chosen & differ], minlength=samples.contract.num_classes)
        classes = classes_to_list(missed.tolist())
    return {
        "source": source,
        "n": int(chosen.sum()),
        "classes": list(classes),
        "confusion": _confusion(teacher[chosen], student[chosen], classes).tolist() if classes else [],
        "worst": [
            entry
            for name in samples.sources
            for entry in _worst(samples, finite & differ & samples.of_source(name), name)
        ],
    }


def classes_to_list(missed: Sequence[int]) -> tuple[int, ...]:
    """Indices of the ``MAX_CLASSES`` classes with most disagreements, or of all; lowest index first."""
    most = sorted(range(len(missed)), key=lambda index: -missed[index])
    return tuple(sorted(most[:MAX_CLASSES]))


def listed_per_class(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of an agreement's ``per_class`` of the classes to list."""
    return [entries[index] for index in classes_to_list([entry["n"] - entry["k"] for entry in entries])]


def _confusion(teacher: Integers, student: Integers, classes: Sequence[int]) -> npt.NDArray[np.int64]:
    """(L, L + 1) counts for L listed classes: by the teacher's class, the student's class or, last, any other."""
    num_listed = len(classes)
    counts = np.zeros((num_listed, num_listed + 1), np.int64)
    listed = np.asarray(classes)
    rows, is_listed = np.searchsorted(listed, teacher), np.isin(teacher, listed)
    columns = np.where(np.isin(student, listed), np.searchsorted(listed, student), num_listed)
    np.add.at(counts, (rows[is_listed], columns[is_listed]), 1)
    return counts


def _worst(samples: SampleSet, wrong: npt.NDArray[np.bool_], source: str) -> list[dict[str, Any]]:
    """The disagreements in which the student takes most probability away from the teacher's class."""
    indices = np.flatnonzero(wrong)
    teacher_logits = samples.teacher_logits[indices].astype(np.float64)
    student_logits = samples.student_logits[indices].astype(np.float64)
    first = np.zeros(len(indices), np.int64)
    if samples.contract.task == "multilabel":
        teacher_logits, student_logits, first = _most_different(teacher_logits, student_logits)
    teacher, student = teacher_logits.argmax(axis=1), student_logits.argmax(axis=1)
    teacher_shares, student_shares = np.exp(log_softmax(teacher_logits)), np.exp(log_softmax(student_logits))
    rows = np.arange(len(indices))
    taken = teacher_shares[rows, teacher] - student_shares[rows, teacher]
    top_two = np.sort(teacher_logits, axis=1)[:, -2:]
    return [
        {
            "index": int(indices[row]),
            "source": source,
            "teacher": int(first[row] + teacher[row]),
            "student": int(first[row] + student[row]),
            "teacher_confidence": float(teacher_shares[row, teacher[row]]),
            "student_confidence": float(student_shares[row, student[row]]),
            "student_on_teachers_class": float(student_shares[row, teacher[row]]),
            "teacher_margin": float(top_two[row, 1] - top_two[row, 0]),
        }
        for row in np.argsort(-taken, kind="stable")[:WORST_PER_SOURCE]
    ]


def _most_different(
    teacher_logits: npt.NDArray[np.float64], student_logits: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Logits (N, 2) of off and on of the label on which two networks differ most, and the number of its state off."""
    differ = (teacher_logits > 0) != (student_logits > 0)
    distance = np.abs(np.tanh(teacher_logits / 2) - np.tanh(student_logits / 2))  # twice that of the sigmoids
    label = np.where(differ, distance, -1).argmax(axis=1)
    rows = np.arange(len(label))
    pairs = [
        np.stack([np.zeros(len(label)), logits[rows, label]], axis=1) for logits in (teacher_logits, student_logits)
    ]
    return pairs[0], pairs[1], 2 * label
