"""Calibration: activation ranges for INT8, measured by ONNX Runtime. Free of torch."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, TensorsData, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from dfadc.errors import ExportFailed
from dfadc.storage import storage_errors
from exporters.to_onnx.file import INPUT_NAME, first_line, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

CALIBRATORS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
#: Operators that ONNX Runtime quantises; sorted, because the order of a set differs between processes.
OPERATORS = sorted({*QLinearOpsRegistry, *QDQRegistry})
_BATCH_SIZE = 16


def calibrate(source: onnx.ModelProto, images: NDArray[np.float32], method: CalibrationMethod) -> TensorsData:
    """The ranges of a graph's activations over ``images``, one batch in memory at a time.

    Raises:
        ExportFailed: ONNX Runtime cannot run the graph.
        StorageFailed: the folder of temporary files cannot be written.
    """
    with quantiser_errors(), tempfile.TemporaryDirectory(prefix="dfadc-int8-") as folder:
        path, augmented = Path(folder) / "fp32.onnx", Path(folder) / "augmented.onnx"
        path.write_bytes(source.SerializeToString())
        calibrator = create_calibrator(path, OPERATORS, augmented.as_posix(), CalibrationMethod(method))
        for start in range(0, len(images), _BATCH_SIZE):
            calibrator.collect_data(_OneBatch(images[start : start + _BATCH_SIZE]))
        ranges: TensorsData = calibrator.compute_data()
        return ranges


class _OneBatch(CalibrationDataReader):  # type: ignore[misc]
    """One batch of images, as ONNX Runtime's calibrators read them."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._pending = [images]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The batch, then None."""
        return {INPUT_NAME: self._pending.pop()} if self._pending else None


@contextmanager
def quantiser_errors() -> Iterator[None]:
    """Turns the quantiser's errors into ours and keeps it quiet.

    It prints its progress and logs advice on pre-processing that an exported graph has no need of.
    """
    try:
        with storage_errors("write temporary files while quantising", "free some space or set TMPDIR"), quiet():
            yield
    except (ValueError, RuntimeError, TypeError, onnx.shape_inference.InferenceError) as exc:
        raise ExportFailed(f"the graph cannot be quantised: {first_line(exc)}") from exc
