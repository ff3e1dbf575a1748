"""Ranking of the layers that INT8 hurts most, and the fewest of them to return to fp32. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dfadc.verification.label_agreement import compare_logits
from dfadc.verification.thresholds import default_export_limits
from exporters.exporter import ignore
from exporters.sessions.onnx_runtime import OnnxRuntimeSession

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

    from dfadc.contract import Task
    from dfadc.verification.agreement import Agreement
    from exporters.exporter import ProgressCallback
    from exporters.to_onnx.int8.quantiser import Quantiser

#: Agreement with fp32 on the held-out images below which INT8 has lost something. The gate asks for a lower bound of
#: 0.97 on 2,048 samples, so for 0.978; 512 held-out images measure agreement to half a point only.
LEAST_AGREEMENT = 0.985
LEAST_SQNR_DB = default_export_limits()["int8"].min_sqnr_db or 0.0
#: Images for the ranking of single layers; the final graph is judged on all.
_RANKING_IMAGES = 64
#: Pixels compared in each image of a dense network, about; images in a batch.
_PIXELS, _BATCH_SIZE = 64, 16
#: No more than this share of the layers returns to fp32, or this many: beyond it, fp16 is the better artifact. In a
#: MobileNetV2 of 63 layers the first one back halves the KL divergence, the next seven halve it again.
_LARGEST_SHARE = 1 / 8
_LEAST_NUMBER = 2
#: Name of the phase in progress reports.
RANKING_PHASE = "INT8 misses its gate: ranking layers"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, and the agreement of the INT8 graph in which this layer alone is in fp32."""

    name: str
    alone_in_fp32: Agreement


class Attempt(NamedTuple):
    """Layers in fp32, and the agreement that they give."""

    kept: tuple[str, ...]
    agreement: Agreement


def distance(agreement: Agreement) -> tuple[int, float]:
    """Distance from the fp32 graph, for comparing INT8 graphs: non-finite outputs, then KL divergence.

    It varies less from sample to sample than agreement, which counts a few images.
    """
    return agreement.num_nonfinite, agreement.kl


def has_recovered(agreement: Agreement) -> bool:
    """True where INT8 is close enough to fp32 to pass its gate."""
    return agreement.agreement >= LEAST_AGREEMENT and agreement.sqnr_db >= LEAST_SQNR_DB


def rank_layers(
    quantiser: Quantiser,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    on_progress: ProgressCallback = ignore,
) -> list[Layer]:
    """All quantised layers, first the one whose return to fp32 brings the logits closest to the fp32 graph's.

    reference: (N, K) or (N, P, K) logits of that graph for the images (N, C, H, W), of which the first few are used.
    """
    images, reference = images[:_RANKING_IMAGES], reference[:_RANKING_IMAGES]
    names = [name for name in quantiser.layers if name not in quantiser.fp32_layers]
    layers: list[Layer] = []
    for name in names:
        logits = logits_of(quantiser.preview([name]), images)
        layers.append(Layer(name, agreement_of(logits, reference, quantiser.task)))
        on_progress(RANKING_PHASE, len(layers), len(names))
    return sorted(layers, key=lambda layer: distance(layer.alone_in_fp32))


def recover(
    quantiser: Quantiser,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    ranking: Iterable[Layer],
    on_progress: ProgressCallback = ignore,
) -> Attempt:
    """Returns layers to fp32 in the order of the ranking until agreement recovers, then drops those not needed.

    If agreement does not recover, it is the best that was tried.
    """

    def attempt(names: Iterable[str]) -> Attempt:
        logits = logits_of(quantiser.preview(names), images)
        return Attempt(tuple(names), agreement_of(logits, reference, quantiser.task))

    order = [layer.name for layer in ranking]
    limit = max(_LEAST_NUMBER, int(_LARGEST_SHARE * len(order)))
    tried: list[Attempt] = []
    for count in range(1, limit + 1):
        tried.append(attempt(order[:count]))
        on_progress("INT8: returning layers to fp32", count, limit)
        if has_recovered(tried[-1].agreement):
            break
    else:
        return min(tried, key=lambda candidate: distance(candidate.agreement))
    best = tried[-1]
    candidates = order[: len(best.kept) - 1]
    for number, name in enumerate(candidates, 1):
        without = attempt([kept for kept in best.kept if kept != name])
        on_progress("INT8: dropping layers that are not needed", number, len(candidates))
        if without.kept and has_recovered(without.agreement):
            best = without
    return best


def logits_of(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (N, K) of a graph on ONNX Runtime's CPU provider with one thread; (N, P, K) of a dense network.

    All pixels of dense logits (N, K, H, W) would be many times the images, and neighbours agree: a few are enough.
    """
    with OnnxRuntimeSession(model.SerializeToString(), threads=1, batch_size=_BATCH_SIZE) as session:
        batches = (images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE))
        return np.concatenate([_few_pixels(session.run(batch)) for batch in batches])


def agreement_of(candidate: NDArray[np.float32], reference: NDArray[np.float32], task: Task) -> Agreement:
    """:func:`compare_logits` for the outputs of :func:`logits_of`, each pixel one sample."""
    num_classes = reference.shape[-1]
    return compare_logits(candidate.reshape(-1, num_classes), reference.reshape(-1, num_classes), task)


def _few_pixels(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, K) unchanged, (n, K, H, W) as (n, P, K)."""
    if logits.ndim == 2:
        return logits
    flat = logits.reshape(*logits.shape[:2], -1)
    # An odd step meets every column of an image whose width is a power of two.
    step = max(1, flat.shape[2] // _PIXELS) | 1
    return np.ascontiguousarray(flat[:, :, ::step].transpose(0, 2, 1))
