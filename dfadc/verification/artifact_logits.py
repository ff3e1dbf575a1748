"""Logits of an artifact, whatever its input and output form: normalisation and softmax may be inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from dfadc.verification.pixel_outputs import DenseOutputs, Outputs
from dfadc.verification.stored_images import to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dfadc.contract import ImageContract

Images = npt.NDArray[np.float32]


def artifact_logits(
    run: Callable[[Images], Images], images: Images, *, form: Mapping[str, str], contract: ImageContract
) -> Images:
    """Logits (N, K) or (N, K, H, W) of an artifact for normalised images (N, C, H, W), by its metadata ``form``.

    Of an artifact that gives probabilities they are log-probabilities.

    Raises:
        DfadcError: the artifact takes pixels, and the contract has no mean and std.
    """
    if form.get("dfadc.input", "").startswith("pixels"):
        images = to_pixels(images, contract)
    outputs = run(images)
    if form.get("dfadc.output") == "probabilities":
        outputs = np.log(np.maximum(outputs, np.finfo(np.float32).tiny))
    return outputs


def restore_offset(outputs: Outputs, reference: Outputs, *, form: Mapping[str, str]) -> Outputs:
    """Adds the constant that softmax removed from logits (..., K), so that their maximum is the reference's.

    The constant changes neither argmax nor softmax, but it would count as an error of the logits. Logits that went
    through no softmax are returned as they are.
    """
    if form.get("dfadc.output") != "probabilities":
        return outputs
    if isinstance(outputs, DenseOutputs):
        return replace(outputs, logits=_shifted(outputs.logits, cast("DenseOutputs", reference).logits))
    return _shifted(outputs, cast("Images", reference))


def _shifted(logits: Images, reference: Images) -> Images:
    shift = reference.max(axis=-1, keepdims=True) - logits.max(axis=-1, keepdims=True)
    return np.asarray(logits + shift, np.float32)
