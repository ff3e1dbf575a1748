"""Where the fp32 student and the teacher part ways, class by class and sample by sample: numpy only.

What is listed stays small however many classes and samples there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.verification.agreement import ALL_SOURCES, predict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dfadc.verification.samples import SampleSet

#: Classes that a report lists one by one; of more than these it lists the ones with most disagreements.
MAX_CLASSES = 20
#: Disagreements that a report shows of each source.
WORST_PER_SOURCE = 12

Integers = npt.NDArray[np.integer[Any]]


def describe_disagreements(samples: SampleSet, source: str) -> dict[str, Any]:
    """Confusion between teacher and student, and the worst disagreements, as plain JSON values.

    ``classes`` are those listed, by index; ``confusion[i]`` holds how often the student answers each of them, and in a
    last column any other, where the teacher answers ``classes[i]``. Samples with a NaN or infinite logit are left out.

    Args:
        samples: with the answers of both.
        source: whose samples the confusion is counted over; all, where the set has none of it.
    """
    teacher, student = predict(samples.teacher_logits), predict(samples.student_logits)
    finite = (teacher >= 0) & (student >= 0)
    source = source if samples.counts().get(source) else ALL_SOURCES
    chosen = finite if source == ALL_SOURCES else finite & (samples.source == samples.sources.index(source))
    missed = np.bincount(teacher[chosen & (teacher != student)], minlength=samples.contract.num_classes)
    classes = classes_to_list(missed.tolist())
    return {
        "source": source,
        "n": int(chosen.sum()),
        "classes": list(classes),
        "confusion": _confusion(teacher[chosen], student[chosen], classes).tolist(),
        "worst": [
            entry
            for index, name in enumerate(samples.sources)
            for entry in _worst(samples, finite & (teacher != student) & (samples.source == index), name)
        ],
    }


def classes_to_list(missed: Sequence[int]) -> tuple[int, ...]:
    """Indices of the classes to list: all, or the ``MAX_CLASSES`` with most disagreements; lowest index first.

    Args:
        missed: disagreements of each class.
    """
    most = sorted(range(len(missed)), key=lambda index: -missed[index])
    return tuple(sorted(most[:MAX_CLASSES]))


def listed_per_class(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those entries of an agreement's ``per_class`` whose classes are to be listed."""
    return [entries[index] for index in classes_to_list([entry["n"] - entry["k"] for entry in entries])]


def _confusion(teacher: Integers, student: Integers, classes: Sequence[int]) -> npt.NDArray[np.int64]:
    """(L, L + 1) counts for L listed classes: by the teacher's class, the student's class or, last, any other."""
    num_listed = len(classes)
    counts = np.zeros((num_listed, num_listed + 1), np.int64)
    listed = np.asarray(classes)
    rows, known = np.searchsorted(listed, teacher), np.isin(teacher, listed)
    columns = np.where(np.isin(student, listed), np.searchsorted(listed, student), num_listed)
    np.add.at(counts, (rows[known], columns[known]), 1)
    return counts


def _worst(samples: SampleSet, wrong: npt.NDArray[np.bool_], source: str) -> list[dict[str, Any]]:
    """The disagreements in which the student takes most probability away from the teacher's class."""
    indices = np.flatnonzero(wrong)
    teacher_logits = samples.teacher_logits[indices].astype(np.float64)
    student_logits = samples.student_logits[indices].astype(np.float64)
    teacher, student = teacher_logits.argmax(axis=1), student_logits.argmax(axis=1)
    asked, answered = _softmax(teacher_logits), _softmax(student_logits)
    rows = np.arange(len(indices))
    taken = asked[rows, teacher] - answered[rows, teacher]
    top_two = np.sort(teacher_logits, axis=1)[:, -2:]
    return [
        {
            "index": int(indices[row]),
            "source": source,
            "teacher": int(teacher[row]),
            "student": int(student[row]),
            "teacher_confidence": float(asked[row, teacher[row]]),
            "student_confidence": float(answered[row, student[row]]),
            "student_on_teachers_class": float(answered[row, teacher[row]]),
            "teacher_margin": float(top_two[row, 1] - top_two[row, 0]),
        }
        for row in np.argsort(-taken, kind="stable")[:WORST_PER_SOURCE]
    ]


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis of (N, K)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
