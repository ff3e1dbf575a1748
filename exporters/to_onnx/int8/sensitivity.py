"""Which layers INT8 hurts most, and an INT8 graph with the fewest of them back in fp32. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dfadc.verification.agreement import Agreement, compare
from dfadc.verification.thresholds import default_export_limits
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.int8.fp32_fallback import in_fp32, layer_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

    from exporters.exporter import ProgressCallback

#: Agreement with fp32 on the held-out images below which INT8 has lost something. The gate asks for a lower bound of
#: 0.97 on 2,048 samples, so for 0.978; 512 held-out images tell agreement to half a point only.
LEAST_AGREEMENT = 0.985
LEAST_SQNR_DB = default_export_limits()["int8"].min_sqnr_db or 0.0
#: Images that a layer is tried on alone; the graph that is kept is judged on all.
_RANKING_IMAGES = 64
#: Pixels of each image that answer for all of a dense one, about; images that a graph is given at once.
_PIXELS, _BATCH_SIZE = 64, 16
#: No more than this share of the layers goes back to fp32, or this many: beyond it, fp16 is the better artifact. In a
#: MobileNetV2 of 63 layers the first one back halves the KL divergence, the next seven halve it again.
_LARGEST_SHARE = 1 / 8
_LEAST_NUMBER = 2
#: Of the progress.
RANKING_PHASE = "INT8 misses its gate: ranking layers"


@dataclass(frozen=True, slots=True)
class Layer:
    """How well the INT8 graph does with this layer alone back in fp32."""

    name: str
    alone_in_fp32: Agreement


@dataclass(frozen=True, slots=True)
class Recovered:
    """An INT8 graph with ``kept`` back in fp32, and its agreement with the fp32 graph."""

    model: onnx.ModelProto
    kept: tuple[str, ...]
    agreement: Agreement


def distance(found: Agreement) -> tuple[int, float]:
    """How far answers are from the fp32 graph's, for comparing graphs: steadier than agreement, a count of few."""
    return found.num_nonfinite, found.kl


def has_recovered(found: Agreement) -> bool:
    """Whether INT8 answers as fp32 does, nearly."""
    return found.agreement >= LEAST_AGREEMENT and found.sqnr_db >= LEAST_SQNR_DB


def rank_layers(
    quantised: onnx.ModelProto,
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    on_progress: ProgressCallback | None = None,
) -> list[Layer]:
    """Every quantised layer, the worst first: the one whose return to fp32 brings the answers back the furthest.

    Args:
        quantised: the INT8 graph.
        source: the fp32 graph that it was made of.
        images: (N, C, H, W); the first few are used.
        reference: (N, K) or (N, P, K), the fp32 graph's answers.
        on_progress: told about every layer.
    """
    images, reference = images[:_RANKING_IMAGES], reference[:_RANKING_IMAGES]
    names, layers = layer_names(quantised), []
    for name in names:
        layers.append(Layer(name, agreement_of(logits_of(in_fp32(quantised, source, [name]), images), reference)))
        if on_progress is not None:
            on_progress(RANKING_PHASE, len(layers), len(names))
    return sorted(layers, key=lambda layer: distance(layer.alone_in_fp32))


def recover(
    quantised: onnx.ModelProto,
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    ranking: Iterable[Layer],
    on_progress: ProgressCallback | None = None,
) -> Recovered:
    """Returns layers to fp32, the worst first, until agreement recovers; then takes back what was not needed.

    Where it does not recover, the best graph that was seen is returned.
    """

    def attempt(names: Iterable[str]) -> Recovered:
        model = in_fp32(quantised, source, names)
        return Recovered(model, tuple(names), agreement_of(logits_of(model, images), reference))

    def tell(phase: str, done: int, steps: int) -> None:
        if on_progress is not None:
            on_progress(phase, done, steps)

    order = [layer.name for layer in ranking]
    most = max(_LEAST_NUMBER, int(_LARGEST_SHARE * len(order)))
    tried = []
    for count in range(1, most + 1):
        tried.append(attempt(order[:count]))
        tell("INT8: returning layers to fp32", count, most)
        if has_recovered(tried[-1].agreement):
            break
    else:
        return min(tried, key=lambda found: distance(found.agreement))
    best = tried[-1]
    needed = order[: len(best.kept) - 1]
    for number, name in enumerate(needed, 1):
        without = attempt([kept for kept in best.kept if kept != name])
        tell("INT8: which of them are needed", number, len(needed))
        if without.kept and has_recovered(without.agreement):
            best = without
    return best


def logits_of(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K), what a graph answers on ONNX Runtime's CPU provider with one thread; of a dense one (N, P, K).

    All pixels of dense logits (N, K, H, W) would be many times the images, and neighbours say the same: a few do.
    """
    with OnnxRuntimeSession(model.SerializeToString(), threads=1, batch_size=_BATCH_SIZE) as session:
        batches = (images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE))
        return np.concatenate([_few_pixels(session.run(batch)) for batch in batches])


def agreement_of(candidate: NDArray[np.float32], reference: NDArray[np.float32]) -> Agreement:
    """:func:`compare` of what :func:`logits_of` gives, each pixel a sample of its own."""
    num_classes = reference.shape[-1]
    return compare(candidate.reshape(-1, num_classes), reference.reshape(-1, num_classes))


def _few_pixels(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, K) as they are, (n, K, H, W) as (n, P, K)."""
    if logits.ndim == 2:
        return logits
    flat = logits.reshape(*logits.shape[:2], -1)
    # An odd step meets every column of an image whose width is a power of two.
    step = max(1, flat.shape[2] // _PIXELS) | 1
    return np.ascontiguousarray(flat[:, :, ::step].transpose(0, 2, 1))
