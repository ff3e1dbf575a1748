"""INT8 ONNX from the fp32 one: choice of the calibrator and of the layers that stay in fp32. Free of torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfadc.errors import DfadcError, ExportFailed
from dfadc.storage import atomic_write_bytes
from dfadc.verification.agreement import predict
from exporters.exporter import KEEP_FP32_AUTO, PoolUnusable, ignore
from exporters.registry import unknown_value
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.fp16 import check_is_fp32
from exporters.to_onnx.int8.calibration import CALIBRATORS, calibrate
from exporters.to_onnx.int8.constants import with_separate_constants
from exporters.to_onnx.int8.presets import PRESETS, check_preset
from exporters.to_onnx.int8.quantiser import Quantiser, task_of
from exporters.to_onnx.int8.sensitivity import (
    Layer,
    agreement_of,
    distance,
    has_recovered,
    logits_of,
    rank_layers,
    recover,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

    from dfadc.verification.agreement import Agreement
    from exporters.exporter import ProgressCallback

#: Tries every calibrator and keeps the one whose logits are closest to the fp32 graph's on the held-out images.
AUTO = "auto"
#: Layers that a note on lost agreement names.
_NUM_NAMED = 3
#: Every n-th calibration image is held out: 512 images give the same ranges as 768, and agreement is measured better.
_HOLD_OUT_EVERY = 2
_MIN_IMAGES = 8


@dataclass(frozen=True, slots=True)
class Quantised:
    """An INT8 graph.

    Args:
        model: the graph, fp32 at its ends, quantised between QuantizeLinear and DequantizeLinear.
        held_out: agreement with the fp32 graph on images that were not used for calibration.
        num_held_out: number of those images; ``held_out`` counts a few pixels of each for dense networks.
        all_int8: agreement with every layer in INT8, where layers were returned to fp32 automatically; else None.
        worst: where layers were returned to fp32 automatically, those that INT8 hurts most, the worst first.
    """

    model: onnx.ModelProto
    calibrator: str
    held_out: Agreement
    num_held_out: int
    kept: tuple[str, ...] = ()
    all_int8: Agreement | None = None
    worst: tuple[Layer, ...] = ()


def quantise(
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    *,
    preset: str = "portable",
    calibrator: str = AUTO,
    keep_fp32: Iterable[str] = (),
    on_progress: ProgressCallback = ignore,
) -> Quantised:
    """Quantises an fp32 graph to INT8, weights per channel.

    Args:
        source: the fp32 graph; it is not changed.
        images: (N, C, H, W) float32 images as the graph takes them; half of them are held out to judge the result.
        preset: a key of :data:`PRESETS`.
        calibrator: a key of :data:`CALIBRATORS`, or "auto".
        keep_fp32: names of nodes that stay in fp32; "auto" among them keeps the fewest that bring agreement back.
        on_progress: called for each calibrator and, where layers are returned to fp32, for each layer tried.

    Raises:
        DfadcError: preset, calibrator or a node is unknown, or the source is not an fp32 graph.
        PoolUnusable: the images are too few, not finite, or all of one class.
        ExportFailed: the quantiser fails, or its result is not what the preset promises.
    """
    named = _check_arguments(source, preset, calibrator, keep_fp32)
    reference = _reference_logits(source, images)
    held_out = np.arange(len(images)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
    judging = images[held_out], reference[held_out]
    separate = with_separate_constants(source)
    calibrators = tuple(CALIBRATORS) if calibrator == AUTO else (calibrator,)
    candidates: list[tuple[Quantised, Quantiser]] = []
    for name in calibrators:
        ranges = calibrate(separate, images[~held_out], CALIBRATORS[name])
        quantiser = Quantiser(separate, ranges, PRESETS[preset], named)
        model = quantiser.quantise()
        if not candidates:  # the calibrators' graphs differ in numbers alone
            _check_loads(model)
        agreement = agreement_of(logits_of(model, judging[0]), judging[1], quantiser.task)
        candidates.append((Quantised(model, name, agreement, len(judging[0]), tuple(named)), quantiser))
        on_progress("calibrating INT8", len(candidates), len(calibrators))
    # Not by agreement: on a few hundred images calibrators differ in it by chance. Entropy, which had cut the ranges so
    # short that a tenth of the logits went, won 252 to 250 of 256 images and lost half a point of real accuracy.
    best, quantiser = min(candidates, key=lambda candidate: distance(candidate[0].held_out))
    # The ranking takes up to minutes: only where layers may return to fp32.
    if KEEP_FP32_AUTO in set(keep_fp32) and not has_recovered(best.held_out):
        best = _recover(best, quantiser, *judging, on_progress)
    check_preset(best.model, preset)
    return best


def _check_arguments(source: onnx.ModelProto, preset: str, calibrator: str, keep_fp32: Iterable[str]) -> list[str]:
    """Returns the node names in ``keep_fp32``, sorted."""
    if preset not in PRESETS:
        raise unknown_value("int8 preset", preset, PRESETS)
    if calibrator not in (AUTO, *CALIBRATORS):
        raise unknown_value("calibrator", calibrator, (AUTO, *CALIBRATORS))
    check_is_fp32(source)
    named = sorted(set(keep_fp32) - {KEEP_FP32_AUTO})
    if unknown := sorted(set(named) - {node.name for node in source.graph.node}):
        raise DfadcError(f"no node {unknown[0]!r} in the graph to keep in fp32", "dfadc inspect lists the nodes")
    return named


def _reference_logits(source: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The fp32 graph's logits (N, K) or (N, P, K) for the calibration images, which must be fit for calibration."""
    if len(images) < _MIN_IMAGES:
        raise PoolUnusable(
            f"{len(images)} calibration images are too few for INT8", f"give {_MIN_IMAGES} or better 512 to 1024"
        )
    if not np.isfinite(images).all():
        raise PoolUnusable("the calibration images hold NaN or infinite values", "did training diverge?")
    logits = logits_of(source, images)
    task = task_of(source)
    classes = predict(logits.reshape(-1, logits.shape[-1]), task)
    if (classes == classes[0]).all():
        where = "one set of labels" if task == "multilabel" else f"class {classes[0]}"
        raise PoolUnusable(
            f"the network puts all {len(images)} calibration images into {where}",
            "INT8 ranges of one class fit no other; use images that cover the classes",
        )
    return logits


def _check_loads(model: onnx.ModelProto) -> None:
    """Opens a graph in a separate process, before it is opened in this one, and refuses one that cannot be."""
    with tempfile.TemporaryDirectory(prefix="dfadc-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        atomic_write_bytes(path, model.SerializeToString())
        try:
            IsolatedSession(OnnxRuntimeSession, path, threads=1).close()
        except DfadcError as exc:
            raise ExportFailed(f"the quantised graph does not load: {exc.message}", exc.hint) from exc


def _recover(
    base: Quantised,
    quantiser: Quantiser,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    on_progress: ProgressCallback,
) -> Quantised:
    """Returns the fewest layers to fp32 that restore a lost agreement, and names the worst."""
    ranking = rank_layers(quantiser, images, reference, on_progress=on_progress)
    if not ranking:
        return base
    best = recover(quantiser, images, reference, ranking=ranking, on_progress=on_progress)
    return replace(
        base,
        model=quantiser.quantise(best.kept),
        held_out=best.agreement,
        kept=(*base.kept, *best.kept),
        all_int8=base.held_out,
        worst=tuple(ranking[:_NUM_NAMED]),
    )
