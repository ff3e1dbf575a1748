"""Asking an artifact for logits, whatever it takes and answers: normalisation and softmax may be inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.verification.samples import to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dfadc.contract import ImageContract

Images = npt.NDArray[np.float32]


def ask(run: Callable[[Images], Images], images: Images, *, form: Mapping[str, str], contract: ImageContract) -> Images:
    """(N, K) logits of an artifact, or log-probabilities of one that answers probabilities.

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


def level(logits: Images, reference: Images, *, form: Mapping[str, str]) -> Images:
    """Gives back the constant that softmax takes from an image's logits (N, K): their maximum is the reference's again.

    The constant changes neither argmax nor softmax, but it would count as an error of the logits. Logits that went
    through no softmax are returned as they are.
    """
    if form.get("dfadc.output") != "probabilities":
        return logits
    shift = reference.max(axis=1, keepdims=True) - logits.max(axis=1, keepdims=True)
    return np.asarray(logits + shift, np.float32)
