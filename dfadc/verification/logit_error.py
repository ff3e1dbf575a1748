"""Errors of logits: KL divergence, signal to quantisation noise and largest error. numpy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def mean_kl(candidate_logits: Floats, reference_logits: Floats) -> float:
    """Mean KL(softmax(reference) || softmax(candidate)) in nats over finite (N, K) logits; NaN for N = 0."""
    if not len(reference_logits):
        return math.nan
    log_p, log_q = log_softmax(reference_logits), log_softmax(candidate_logits)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()))


def logit_scale(logits: Floats) -> npt.NDArray[np.float64]:
    """(N,) scale of each sample's finite logits (N, K): the larger of its own range and the median range.

    A sample is measured by itself, so that one extreme sample neither excuses nor hides the others. The median keeps a
    sample whose logits lie close together, as two undecided classes have them, from being measured by nearly nothing.
    """
    ranges: npt.NDArray[np.float64] = np.ptp(np.asarray(logits, np.float64), axis=1)
    return np.maximum(ranges, float(np.quantile(ranges, 0.5, method="lower"))) if len(ranges) else ranges


def sqnr_db(candidate_logits: Floats, reference_logits: Floats) -> float:
    """Signal to quantisation noise in dB over finite logits; +inf for equal logits, NaN for empty ones."""
    if not reference_logits.size:
        return math.nan
    signal = float(np.square(reference_logits, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference_logits, candidate_logits, dtype=np.float64)).sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def scaled_sqnr_db(candidate: Floats, reference: Floats, scale: npt.NDArray[np.float64]) -> float:
    """:func:`sqnr_db` of logits (N, K) in units of each sample's scale (N,); a scale of 0 (constant logits) is 1."""
    units = np.where(scale > 0, scale, 1.0)[:, None]
    return sqnr_db(np.asarray(candidate / units), np.asarray(reference / units))


def max_scaled_error(candidate: Floats, reference: Floats, scale: npt.NDArray[np.float64]) -> float:
    """Largest |reference - candidate| in units of its sample's scale; any error of a constant reference is infinite."""
    if not reference.size:
        return math.nan
    errors = np.abs(reference - candidate).max(axis=1)
    ratios = np.divide(errors, scale, out=np.where(errors > 0, math.inf, 0.0), where=scale > 0)
    return float(ratios.max())


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Over the last axis of (N, K)."""
    shifted = np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
