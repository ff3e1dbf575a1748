"""Session of an OpenVINO IR or an ONNX file on OpenVINO, which is imported when the first session opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing, RuntimeRefused
from exporters.sessions.openvino_core import REMARK, exact_settings, import_openvino, shared_core
from exporters.sessions.session import DEFAULT_BATCH_SIZE, BatchedSession

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class OpenVinoSession(BatchedSession):
    """An OpenVINO IR, or an ONNX file, on one OpenVINO device, computing in fp32 what is not quantised.

    Args:
        path: the .onnx, or the .xml with its .bin beside it.
        threads: CPU threads; 0 lets OpenVINO choose.
        device_name: "CPU", "GPU", ...; never OpenVINO's AUTO.
        batch_size: images per call; a file with a fixed batch has its own.

    Raises:
        DfadcError: a file is missing, or is neither OpenVINO IR nor ONNX.
        RequirementMissing: openvino or the device is missing.
        RuntimeRefused: OpenVINO does not load the model.
    """

    def __init__(
        self, path: Path, *, threads: int = 0, device_name: str = "CPU", batch_size: int = DEFAULT_BATCH_SIZE
    ) -> None:
        import_openvino()
        if path.suffix != ".onnx":
            check_ir(path)
        core = shared_core()
        if device_name not in core.available_devices:
            raise RequirementMissing(f"OpenVINO has no {device_name} here", f"available: {core.available_devices}")
        # Where a CPU computes bf16, OpenVINO runs fp32 graphs in it by default.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            exact = exact_settings(model, device_name)
            self._compiled: Any = core.compile_model(model, device_name, {**settings, **exact})
        except RuntimeError as exc:
            raise RuntimeRefused(f"OpenVINO cannot load {path}: {exc}", "export it again") from exc
        if len(self._compiled.inputs) != 1 or len(self._compiled.outputs) != 1:
            raise DfadcError(f"{path} does not have one input of images and one output of logits")
        active = self._compiled.get_property("EXECUTION_DEVICES")
        if active != [device_name]:
            raise DfadcError(f"OpenVINO runs {path} on {active}, not on {device_name}")
        shape = self._compiled.inputs[0].partial_shape
        sides = tuple(side.get_length() for side in list(shape)[1:] if side.is_static)
        super().__init__(
            batch_size=shape[0].get_length() if shape[0].is_static else batch_size,
            fixed_batch=shape[0].is_static,
            input_size=sides if len(sides) == 3 else None,
        )
        self.device = device_name
        self.remark = REMARK if exact else ""

    def close(self) -> None:
        """Drops the compiled model."""
        self._compiled = None

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            logits: NDArray[np.float32] = np.array(self._compiled(images)[0])
        except RuntimeError as exc:
            raise DfadcError(f"OpenVINO cannot run these images: {exc}") from exc
        return logits


def check_ir(path: Path) -> None:
    """Checks that ``path`` is an OpenVINO IR with its weights beside it.

    OpenVINO itself would try every reader it has on any other file, and print an error for each.

    Raises:
        DfadcError: a file is missing, or is not OpenVINO IR.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as exc:
        raise DfadcError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if path.suffix != ".xml" or not start.lstrip().startswith((b"<?xml", b"<net")):
        raise DfadcError(f"{path} is not an OpenVINO IR", "give the .xml file")
    if not path.with_suffix(".bin").is_file():
        raise DfadcError(f"{path.with_suffix('.bin')} is missing: an OpenVINO model is two files")
