"""Asking an artifact for logits, whatever it takes and answers: normalisation and softmax may be inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.verification.pixel_agreement import DenseAnswers
from dfadc.verification.stored_images import to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dfadc.contract import ImageContract

Images = npt.NDArray[np.float32]
#: A network's answers to samples: logits (N, K), or what is kept of dense ones.
Given = Images | DenseAnswers


def ask(run: Callable[[Images], Images], images: Images, *, form: Mapping[str, str], contract: ImageContract) -> Images:
    """(N, K) or (N, K, H, W) logits of an artifact, or log-probabilities of one that answers probabilities.

    Args:
        run: what the artifact's session does with the images it takes.
        images: (N, C, H, W), normalised.
        form: the artifact's metadata: ``dfadc.input`` and ``dfadc.output``.
        contract: of the images.

    Raises:
        DfadcError: the artifact takes pixels, and the contract has no mean and std.
    """
    if form.get("dfadc.input", "").startswith("pixels"):
        images = to_pixels(images, contract)
    answers = run(images)
    if form.get("dfadc.output") == "probabilities":
        answers = np.log(np.maximum(answers, np.finfo(np.float32).tiny))
    return answers


def level(given: Given, reference: Given, *, form: Mapping[str, str]) -> Given:
    """Gives back the constant that softmax takes from logits (..., K): their maximum is the reference's again.

    The constant changes neither argmax nor softmax, but it would count as an error of the logits. Logits that went
    through no softmax are returned as they are.
    """
    if form.get("dfadc.output") != "probabilities":
        return given
    if isinstance(given, DenseAnswers) and isinstance(reference, DenseAnswers):
        return replace(given, logits=_levelled(given.logits, reference.logits))
    assert isinstance(given, np.ndarray)  # noqa: S101 - both are of one kind
    assert isinstance(reference, np.ndarray)  # noqa: S101
    return _levelled(given, reference)


def _levelled(logits: Images, reference: Images) -> Images:
    shift = reference.max(axis=-1, keepdims=True) - logits.max(axis=-1, keepdims=True)
    return np.asarray(logits + shift, np.float32)
