"""Classes that take turns."""

from __future__ import annotations

import numpy as np

from dfadc.distillation.images.class_order import class_order, classes_to_balance


def test_the_first_of_every_class_comes_before_the_second_of_any() -> None:
    assert class_order([2, 2, 2, 0, 1, 0]) == [3, 4, 0, 5, 1, 2]
    assert class_order([]) == []


def test_labels_are_on_and_off_as_often_as_the_images_allow() -> None:
    """Labels 0 and 1 are on in 25 of 500 images: of the first 100 by turns many, where chance would give 5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 4))
    for label in (0, 1):
        logits[:, label] = np.where(np.arange(500) % 20 == 7 * label, 1.0, -1.0)
    chosen = class_order(classes_to_balance(logits, "multilabel"))[:100]
    on = (logits[chosen] > 0).sum(axis=0)
    assert (on[:2] >= 14).all()
    assert (on[2:] >= 25).all()
    assert (on[2:] <= 75).all()
    assert classes_to_balance(logits, "classification") == logits.argmax(axis=1).tolist()
