"""INT8 ONNX from the fp32 one, calibrated on generated images. Free of torch."""

from __future__ import annotations

import io
import logging
import tempfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from dfadc.errors import DfadcError, ExportFailed, StorageFailed
from dfadc.verification.agreement import Agreement, compare
from exporters.base import unknown_value
from exporters.onnx_file import INPUT_NAME, OPSET, first_line, opset_of
from exporters.precision import check_is_fp32
from exporters.sessions import OnnxRuntimeSession

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

CALIBRATORS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
#: Tries every calibrator and keeps the one that agrees best with the fp32 graph on the held-out images.
AUTO = "auto"
#: Every n-th calibration image is held out.
_HOLD_OUT_EVERY = 4
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
    """

    model: onnx.ModelProto
    calibrator: str
    held_out: Agreement


def quantise(
    source: onnx.ModelProto,
    images: NDArray[np.float32],
    *,
    preset: str = "portable",
    calibrator: str = AUTO,
    keep_fp32: Iterable[str] = (),
) -> Quantised:
    """Quantises an fp32 graph to INT8, weights per channel.

    Args:
        source: the fp32 graph; it is not changed.
        images: (N, C, H, W) float32 images as the graph takes them; a quarter is held out to judge the result.
        preset: a key of :data:`PRESETS`.
        calibrator: a key of :data:`CALIBRATORS`, or "auto".
        keep_fp32: names of nodes that stay in fp32.

    Raises:
        DfadcError: preset or calibrator is unknown, the source is not an fp32 graph, or the images are too few, not
            finite, or all of one class.
        ExportFailed: the quantiser gives up, or its result is not what the preset promises.
    """
    if preset not in PRESETS:
        raise unknown_value("int8 preset", preset, PRESETS)
    if calibrator not in (AUTO, *CALIBRATORS):
        raise unknown_value("calibrator", calibrator, (AUTO, *CALIBRATORS))
    check_is_fp32(source)
    excluded = sorted(set(keep_fp32))
    if unknown := sorted(set(excluded) - {node.name for node in source.graph.node}):
        raise DfadcError(f"no node {unknown[0]!r} in the graph to keep in fp32", "dfadc inspect lists the nodes")
    reference = _reference_logits(source, images)
    held_out = np.arange(len(images)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
    candidates = []
    for name in CALIBRATORS if calibrator == AUTO else (calibrator,):
        model = _quantise_static(source, images[~held_out], PRESETS[preset], CALIBRATORS[name], excluded)
        check_census(model, preset)
        candidates.append(Quantised(model, name, compare(_logits(model, images[held_out]), reference[held_out])))
    return max(candidates, key=lambda candidate: (candidate.held_out.k, candidate.held_out.sqnr_db))


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
    excluded: Sequence[str],
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
                    nodes_to_exclude=list(excluded),
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
    kept = {entry.key: entry.value for entry in source.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    return model


def _reference_logits(source: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The fp32 graph's answers to the calibration images, which must be worth calibrating with."""
    if len(images) < _MIN_IMAGES:
        raise DfadcError(
            f"{len(images)} calibration images are too few for INT8", f"give {_MIN_IMAGES} or better 512 to 1024"
        )
    if not np.isfinite(images).all():
        raise DfadcError("the calibration images hold NaN or infinite values", "did training diverge?")
    logits = _logits(source, images)
    if len(set(logits.argmax(axis=1).tolist())) < 2:
        raise DfadcError(
            f"the network puts all {len(images)} calibration images into class {logits[0].argmax()}",
            "INT8 ranges of one class fit no other; use a pool that covers the classes",
        )
    return logits


def _logits(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    with OnnxRuntimeSession(model.SerializeToString(), threads=1) as session:
        return session.run(images)


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
