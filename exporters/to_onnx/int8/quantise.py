"""INT8 ONNX from the fp32 one, calibrated on generated images. Free of torch."""

from __future__ import annotations

import io
import logging
import tempfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from dfadc.errors import DfadcError, ExportFailed, StorageFailed
from dfadc.storage import atomic_write_bytes
from exporters.exporter import KEEP_FP32_AUTO, PoolUnusable, unknown_value
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.file import INPUT_NAME, OPSET, all_nodes, first_line, opset_of
from exporters.to_onnx.fp16 import check_is_fp32
from exporters.to_onnx.int8.fp32_fallback import answers_in_fp32, in_fp32
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
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from dfadc.verification.agreement import Agreement
    from exporters.exporter import ProgressCallback

CALIBRATORS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
#: Tries every calibrator and keeps the one whose answers are nearest to the fp32 graph's on the held-out images.
AUTO = "auto"
#: Layers that a note on fallen agreement names.
_NUM_NAMED = 3
#: Every n-th calibration image is held out: ranges are read off 512 as well as off 768, agreement is told better.
_HOLD_OUT_EVERY = 2
_BATCH_SIZE = 16
_MIN_IMAGES = 8


@dataclass(frozen=True, slots=True)
class Preset:
    """How one INT8 preset quantises: dtype of the activations, and ONNX Runtime's extra options."""

    activations: QuantType
    options: dict[str, Any]
    symmetric: bool


PRESETS = {
    # Parses in TensorRT and runs on ONNX Runtime: every zero point 0, biases left in fp32.
    "portable": Preset(
        QuantType.QInt8, {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}, symmetric=True
    ),
    # Faster on ONNX Runtime's CPU kernels, which prefer unsigned activations; TensorRT does not parse it.
    "ort-cpu": Preset(QuantType.QUInt8, {"ActivationSymmetric": False, "WeightSymmetric": True}, symmetric=False),
}


@dataclass(frozen=True, slots=True)
class Quantised:
    """An INT8 graph.

    Args:
        model: the graph, fp32 at its ends, quantised between QuantizeLinear and DequantizeLinear.
        calibrator: the one that was used.
        held_out: agreement with the fp32 graph on images that calibrated nothing.
        num_held_out: how many images; of dense answers ``held_out`` counts a few pixels of each.
        kept: layers that stayed in fp32.
        all_int8: the agreement with every layer in INT8, where layers were kept by themselves; else None.
        worst: where layers were kept by themselves, those that INT8 hurts most, the worst first.
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
    on_progress: ProgressCallback | None = None,
) -> Quantised:
    """Quantises an fp32 graph to INT8, weights per channel.

    Args:
        source: the fp32 graph; it is not changed.
        images: (N, C, H, W) float32 images as the graph takes them; half of them are held out to judge the result.
        preset: a key of :data:`PRESETS`.
        calibrator: a key of :data:`CALIBRATORS`, or "auto".
        keep_fp32: names of nodes that stay in fp32; "auto" among them keeps the fewest that bring agreement back.
        on_progress: told about calibrators and, where layers go back to fp32, about the layers that are tried.

    Raises:
        DfadcError: preset or calibrator is unknown, or the source is not an fp32 graph.
        PoolUnusable: the images are too few, not finite, or all of one class.
        ExportFailed: the quantiser gives up, or its result is not what the preset promises.
    """
    if preset not in PRESETS:
        raise unknown_value("int8 preset", preset, PRESETS)
    if calibrator not in (AUTO, *CALIBRATORS):
        raise unknown_value("calibrator", calibrator, (AUTO, *CALIBRATORS))
    check_is_fp32(source)
    named = sorted(set(keep_fp32) - {KEEP_FP32_AUTO})
    if unknown := sorted(set(named) - {node.name for node in source.graph.node}):
        raise DfadcError(f"no node {unknown[0]!r} in the graph to keep in fp32", "dfadc inspect lists the nodes")
    reference = _reference_logits(source, images)
    source = _with_constants_of_their_own(source)
    held_out = np.arange(len(images)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
    candidates: list[Quantised] = []
    calibrators = tuple(CALIBRATORS) if calibrator == AUTO else (calibrator,)
    for name in calibrators:
        model = _quantise_static(source, images[~held_out], PRESETS[preset], CALIBRATORS[name])
        model = in_fp32(model, source, named)
        if not candidates:  # the calibrators' graphs differ in numbers alone
            _check_loads(model)
        agreement = agreement_of(logits_of(model, images[held_out]), reference[held_out])
        candidates.append(Quantised(model, name, agreement, int(held_out.sum()), tuple(named)))
        if on_progress is not None:
            on_progress("calibrating INT8", len(candidates), len(calibrators))
    # Not by agreement: a few hundred images tell calibrators apart by chance. Entropy, which had cut the ranges so
    # short that a tenth of the logits went, won 252 to 250 of 256 images and lost half a point of real accuracy.
    best = min(candidates, key=lambda candidate: distance(candidate.held_out))
    # The ranking takes up to minutes: only where layers may go back.
    if KEEP_FP32_AUTO in set(keep_fp32) and not has_recovered(best.held_out):
        best = _recover(best, source, images[held_out], reference[held_out], on_progress)
    check_census(best.model, preset)
    return best


def _check_loads(model: onnx.ModelProto) -> None:
    """Opens a graph in a process of its own, before it is opened in this one.

    Raises:
        ExportFailed: ONNX Runtime refuses it or crashes.
    """
    with tempfile.TemporaryDirectory(prefix="dfadc-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        atomic_write_bytes(path, model.SerializeToString())
        try:
            IsolatedSession(OnnxRuntimeSession, path, threads=1).close()
        except DfadcError as exc:
            raise ExportFailed(f"the quantised graph does not load: {exc.message}", exc.hint) from exc


def _recover(
    found: Quantised,
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    reference: NDArray[np.float32],
    on_progress: ProgressCallback | None,
) -> Quantised:
    """Returns the fewest layers to fp32 that bring a fallen agreement back, and names the worst."""
    ranking = rank_layers(found.model, source, images, reference, on_progress=on_progress)
    if not ranking:
        return found
    worst = tuple(ranking[:_NUM_NAMED])
    best = recover(found.model, source, images, reference, ranking=ranking, on_progress=on_progress)
    kept = (*found.kept, *best.kept)
    return replace(found, model=best.model, held_out=best.agreement, kept=kept, all_int8=found.held_out, worst=worst)


def check_census(model: onnx.ModelProto, preset: str) -> None:
    """Checks that a quantised graph is what its preset promises.

    Raises:
        ExportFailed: nothing is quantised, the opset is not 20, or (portable) a zero point is not 0 or an int32 tensor,
            a quantised bias, is dequantised, which TensorRT does not parse.
    """
    if opset_of(model) != OPSET:
        raise ExportFailed(f"quantisation left opset {opset_of(model)}, not {OPSET}")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    linear = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not linear:
        raise ExportFailed("nothing was quantised", "does the network have convolutions or matrix products in fp32?")
    if not PRESETS[preset].symmetric:
        return
    for node in linear:
        tensors = [weights[name] for name in node.input if name in weights]
        if any(tensor.data_type == TensorProto.INT32 for tensor in tensors):
            raise ExportFailed(f"{node.name} dequantises int32, which TensorRT does not parse")
        zero_point = weights.get(node.input[2]) if len(node.input) > 2 else None
        if zero_point is not None and np.any(numpy_helper.to_array(zero_point) != 0):
            raise ExportFailed(f"{node.name} has a zero point other than 0, which TensorRT does not parse")


def _with_constants_of_their_own(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which no two inputs read the same fp32 constant.

    Equal tensors are stored once, and a layer may be used twice. Quantised, a shared weight has one DequantizeLinear,
    which ONNX Runtime cannot load with ``session.x64quantprecision``; a shared bias has the scale of one reader only,
    and cannot go back to fp32 for one of them.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    constants = {tensor.name: tensor for tensor in source.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    taken = {name for node in all_nodes(source.graph) for name in (*node.input, *node.output)}
    read: set[str] = set()
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in read and name in constants:
                own = next(f"{name}_{n}" for n in count(2) if f"{name}_{n}" not in taken)
                taken.add(own)
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[position] = own
            read.add(name)
    return model


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images in batches. ONNX Runtime asks for one range at a time, so one batch is in memory at a time."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._batches = [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]
        self._pending = list(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Hands out the batches ``start_index`` to ``end_index`` next."""
        self._pending = self._batches[start_index:end_index]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch, None after the last."""
        return {INPUT_NAME: self._pending.pop(0)} if self._pending else None


def _quantise_static(
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    preset: Preset,
    method: CalibrationMethod,
) -> onnx.ModelProto:
    """Runs ONNX Runtime's quantiser in a folder of its own."""
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    with tempfile.TemporaryDirectory(prefix="dfadc-int8-") as folder:
        target = Path(folder) / "int8.onnx"
        try:
            with _quiet():
                quantize_static(
                    copy,
                    target,
                    _Batches(images),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=preset.activations,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=_softmax_at_the_end(source),
                    calibrate_method=method,
                    extra_options={**preset.options, "CalibStridedMinMax": 1},
                )
        except (ValueError, RuntimeError, TypeError, onnx.shape_inference.InferenceError) as exc:
            raise ExportFailed(f"the graph cannot be quantised: {first_line(exc)}") from exc
        except OSError as exc:
            raise StorageFailed(
                f"cannot write into {folder} while quantising: {exc.strerror or exc}", "free some space or set TMPDIR"
            ) from exc
        model = onnx.load_model_from_string(target.read_bytes())
    model = answers_in_fp32(model, source)
    kept = {entry.key: entry.value for entry in source.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    return model


def _reference_logits(source: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The fp32 graph's answers (N, K) or (N, P, K) to the calibration images, which must be worth calibrating with."""
    if len(images) < _MIN_IMAGES:
        raise PoolUnusable(
            f"{len(images)} calibration images are too few for INT8", f"give {_MIN_IMAGES} or better 512 to 1024"
        )
    if not np.isfinite(images).all():
        raise PoolUnusable("the calibration images hold NaN or infinite values", "did training diverge?")
    logits = logits_of(source, images)
    classes = logits.argmax(axis=-1)
    if len(np.unique(classes)) < 2:
        raise PoolUnusable(
            f"the network puts all {len(images)} calibration images into class {classes.flat[0]}",
            "INT8 ranges of one class fit no other; use a pool that covers the classes",
        )
    return logits


def _softmax_at_the_end(source: onnx.ModelProto) -> list[str]:
    """Probabilities in 256 steps would lose every class but the likeliest: an embedded softmax stays in fp32."""
    outputs = {value.name for value in source.graph.output}
    return [node.name for node in source.graph.node if node.op_type == "Softmax" and outputs.intersection(node.output)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser prints its progress and logs advice on pre-processing that an exported graph has no need of."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
