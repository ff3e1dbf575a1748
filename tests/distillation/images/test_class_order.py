"""Classes that take turns."""

from __future__ import annotations

from dfadc.distillation.images.class_order import class_order


def test_the_first_of_every_class_comes_before_the_second_of_any() -> None:
    assert class_order([2, 2, 2, 0, 1, 0]) == [3, 4, 0, 5, 1, 2]
    assert class_order([]) == []
