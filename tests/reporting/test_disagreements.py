"""Confusion and worst disagreements against slow, plain counting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from report_material import SOURCES, make_samples

from dfadc.reporting.disagreements import (
    MAX_CLASSES,
    WORST_PER_SOURCE,
    classes_to_list,
    describe_disagreements,
    listed_per_class,
)


def test_the_confusion_counts_every_pair_of_the_source() -> None:
    samples = make_samples()
    found = describe_disagreements(samples, "snapshots")
    chosen = samples.source == 1
    teacher, student = samples.teacher_logits[chosen].argmax(1), samples.student_logits[chosen].argmax(1)
    expected = [[int(((teacher == i) & (student == j)).sum()) for j in range(6)] + [0] for i in range(6)]
    assert found["confusion"] == expected
    assert (found["source"], found["n"], found["classes"]) == ("snapshots", 120, list(range(6)))


def test_of_many_classes_those_with_most_disagreements_are_listed_and_the_others_summed() -> None:
    samples = make_samples(num_classes=50, names=None)
    found = describe_disagreements(samples, "generator")
    chosen = samples.source == 0
    teacher, student = samples.teacher_logits[chosen].argmax(1), samples.student_logits[chosen].argmax(1)
    missed = {i: int(((teacher == i) & (student != i)).sum()) for i in range(50)}
    listed = found["classes"]
    assert len(listed) == MAX_CLASSES
    assert min(missed[i] for i in listed) >= max(missed[i] for i in missed if i not in listed)
    for row, index in zip(found["confusion"], listed, strict=True):
        assert sum(row) == (teacher == index).sum()
        assert row[-1] == sum(1 for answer in student[teacher == index] if answer not in listed)


def test_the_worst_come_by_source_and_in_order_of_the_probability_taken_away() -> None:
    samples = make_samples()
    worst = describe_disagreements(samples, "generator")["worst"]
    assert [entry["source"] for entry in worst] == [name for name in SOURCES for _ in range(WORST_PER_SOURCE)]

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits.astype(np.float64))
        return np.asarray(powers / powers.sum())

    for source in range(len(SOURCES)):
        taken = {}
        for index in np.flatnonzero(samples.source == source):
            asked, answered = softmax(samples.teacher_logits[index]), softmax(samples.student_logits[index])
            if asked.argmax() != answered.argmax():
                taken[int(index)] = asked.max() - answered[asked.argmax()]
        expected = sorted(taken, key=lambda index: -taken[index])[:WORST_PER_SOURCE]
        entries = [entry for entry in worst if entry["source"] == SOURCES[source]]
        assert [entry["index"] for entry in entries] == expected
        first = entries[0]
        assert np.isclose(first["teacher_confidence"] - first["student_on_teachers_class"], max(taken.values()))
        logits = np.sort(samples.teacher_logits[first["index"]].astype(np.float64))
        assert np.isclose(first["teacher_margin"], logits[-1] - logits[-2])


def test_answers_that_are_no_numbers_are_left_out() -> None:
    samples = make_samples(counts=(40, 0, 0, 0))
    broken = replace(samples, student_logits=np.full_like(samples.student_logits, np.nan))
    found = describe_disagreements(broken, "generator")
    assert found["n"] == 0
    assert found["worst"] == []
    assert sum(map(sum, found["confusion"])) == 0


def test_a_source_without_samples_gives_way_to_all() -> None:
    found = describe_disagreements(make_samples(counts=(0, 30, 0, 0)), "generator")
    assert (found["source"], found["n"]) == ("all", 30)
    assert describe_disagreements(make_samples(counts=(0, 0, 0, 0)), "generator")["n"] == 0
    assert describe_disagreements(make_samples(counts=(0, 30, 0, 0)), "no such source")["source"] == "all"


@given(st.lists(st.integers(0, 5), max_size=60))
def test_listed_classes_are_few_in_order_and_the_worst(missed: list[int]) -> None:
    listed = classes_to_list(missed)
    assert len(listed) == min(len(missed), MAX_CLASSES)
    assert list(listed) == sorted(set(listed))
    rest = [count for index, count in enumerate(missed) if index not in listed]
    assert not rest or min(missed[index] for index in listed) >= max(rest)


def test_bars_and_confusion_list_the_same_classes() -> None:
    entries = [{"n": 10, "k": 10 - index % 7, "class": index} for index in range(40)]
    assert [e["class"] for e in listed_per_class(entries)] == list(classes_to_list([index % 7 for index in range(40)]))
