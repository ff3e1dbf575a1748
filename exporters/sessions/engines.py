"""Sessions for the engines, and the choice of a session for a file. Importing it loads no torch and no backend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import DfadcError, ExportFailed, RequirementMissing, RuntimeRefused
from dfadc.storage import sha256_file
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.onnx_runtime import DEFAULT_BATCH_SIZE, ChunkedSession, OnnxRuntimeSession
from exporters.sessions.openvino_core import REMARK, exact_settings, shared_core
from exporters.to_onnx.file import INPUT_NAME
from exporters.to_openvino.exporter import import_openvino
from exporters.to_tensorrt.api import TENSORRT, TENSORRT_RTX, TensorRtApi
from exporters.to_tensorrt.exporter import SIDECAR_SCHEMA, cuda_gpu, sidecar_path

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def open_session(path: Path, *, threads: int = 0, batch_size: int = DEFAULT_BATCH_SIZE) -> ChunkedSession:
    """The session for an artifact, by the kind of its file: .onnx, .xml (OpenVINO) or .engine.

    Raises:
        DfadcError: the kind is unknown, or the file is missing or damaged.
        RequirementMissing, RuntimeRefused: this machine cannot run it; the message is the reason for a verdict NOT RUN.
    """
    match path.suffix:
        case ".onnx":
            return OnnxRuntimeSession(path, threads=threads, batch_size=batch_size)
        case ".xml":
            return OpenVinoSession(path, threads=threads, batch_size=batch_size)
        case ".engine":
            return TensorRtSession(path, batch_size=batch_size)
        case _:
            raise DfadcError(f"{path} is not an artifact that can be run", "give a .onnx, .xml or .engine file")


def check_runs(path: Path, input_size: tuple[int, int, int]) -> None:
    """Runs an artifact that was just written on one black image, in a process of its own; one of another machine not.

    Raises:
        ExportFailed: its runtime refuses it or crashes.
    """
    try:
        with IsolatedSession(open_session, path, threads=1, batch_size=1) as session:
            session.run(np.zeros((1, *input_size), np.float32))
    except RequirementMissing:
        return
    except DfadcError as exc:
        raise ExportFailed(f"{path.name} was built and does not run: {exc.message}", exc.hint) from exc


class OpenVinoSession(ChunkedSession):
    """An OpenVINO IR, or an ONNX file, on one OpenVINO device.

    Args:
        path: the .xml, with its .bin beside it.
        threads: CPU threads; 0 lets OpenVINO choose.
        device_name: "CPU", "GPU", ...; never OpenVINO's AUTO.
        batch_size: images per call.

    Raises:
        DfadcError: a file is missing, or is no OpenVINO IR.
        RequirementMissing: openvino or the device is missing.
        RuntimeRefused: OpenVINO does not load the model.
    """

    def __init__(
        self, path: Path, *, threads: int = 0, device_name: str = "CPU", batch_size: int = DEFAULT_BATCH_SIZE
    ) -> None:
        import_openvino()
        check_ir(path)
        core = shared_core()
        if device_name not in core.available_devices:
            raise RequirementMissing(f"OpenVINO has no {device_name} here", f"available: {core.available_devices}")
        # Where a CPU computes bf16, OpenVINO runs fp32 graphs in it unless told not to.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            exact = exact_settings(model, device_name)
            settings.update(exact)
            self._compiled: Any = core.compile_model(model, device_name, settings)
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
        self._device_name = device_name
        self.remark = REMARK if exact else ""

    @property
    def device(self) -> str:
        """The OpenVINO device."""
        return self._device_name

    def close(self) -> None:
        """Drops the compiled model."""
        self._compiled = None

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            logits: NDArray[np.float32] = np.array(self._compiled(images)[0])
        except RuntimeError as exc:
            raise DfadcError(f"OpenVINO cannot run these images: {exc}") from exc
        return logits


class TensorRtSession(ChunkedSession):
    """A TensorRT or TensorRT-RTX engine with its sidecar, on torch CUDA tensors.

    An engine is native code: it is loaded only if its bytes are those the sidecar names, by the release that built it.

    Args:
        path: the .engine, with its .engine.json beside it.
        batch_size: images per call; at most what the engine was built for.

    Raises:
        DfadcError: the sidecar is missing or does not fit, or the engine cannot be loaded.
        RequirementMissing: there is no GPU, or the package or its release is not here.
    """

    def __init__(self, path: Path, *, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        facts = read_sidecar(path)
        backend = TENSORRT_RTX if facts["exporter"] == TENSORRT_RTX.name else TENSORRT
        api = TensorRtApi(backend)
        built_by = facts["versions"][backend.module_name]
        if built_by != api.version:
            raise RequirementMissing(
                f"{path.name} was built by {backend.name} {built_by}, and {api.version} is installed",
                f"export it again, or install {backend.module_name}=={built_by}",
            )
        if cuda_gpu() is None:
            raise RequirementMissing(f"{path.name} runs on an NVIDIA GPU, and there is none here (or no torch)")
        import torch  # noqa: PLC0415 - needed for CUDA memory only

        self._torch = torch
        self._logger = api.collecting_logger()
        self._runtime = api.module.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            said = "; ".join(self._logger.errors[-3:]) or "no reason given"
            raise RequirementMissing(f"{path.name} does not load on {cuda_gpu()}: {said}", "build it for this GPU")
        self._context: Any = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._output_name = next(name for name in names if name != INPUT_NAME)
        lowest, _, highest = facts["batch"]
        super().__init__(batch_size=min(batch_size, highest), fixed_batch=lowest > 1)
        if self._fixed_batch:
            self.batch_size = max(self.batch_size, lowest)
        self._device_name = f"{backend.name} on {cuda_gpu()}"

    @property
    def device(self) -> str:
        """Backend and GPU."""
        return self._device_name

    def close(self) -> None:
        """Frees the engine's memory."""
        self._context = self._engine = None

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        torch = self._torch
        stream = torch.cuda.Stream()  # the default stream would make the engine synchronise twice
        with torch.cuda.stream(stream):
            device_images = torch.from_numpy(images).cuda()
            self._context.set_input_shape(INPUT_NAME, tuple(device_images.shape))
            shape = tuple(self._context.get_tensor_shape(self._output_name))
            device_logits = torch.empty(shape, dtype=torch.float32, device="cuda")
            self._context.set_tensor_address(INPUT_NAME, device_images.data_ptr())
            self._context.set_tensor_address(self._output_name, device_logits.data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise DfadcError(f"the engine failed: {'; '.join(self._logger.errors[-3:])}")
        stream.synchronize()
        logits: NDArray[np.float32] = device_logits.cpu().numpy()
        return logits


def read_sidecar(engine: Path) -> dict[str, Any]:
    """The facts about an engine, after comparing its bytes with them.

    Raises:
        DfadcError: engine or sidecar is missing or damaged, or the engine's bytes are not those that were built.
    """
    path = sidecar_path(engine)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        actual = sha256_file(engine)
        if facts["schema"] != SIDECAR_SCHEMA:
            raise DfadcError(f"{path} has schema {facts['schema']}, this version reads {SIDECAR_SCHEMA}")
        expected, _, _ = facts["sha256"], facts["versions"], facts["batch"]
    except OSError as exc:
        raise DfadcError(
            f"cannot read {exc.filename}: {exc.strerror}", f"an engine needs its sidecar {path.name} beside it"
        ) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise DfadcError(f"{path} is damaged: {type(exc).__name__}: {exc}", "export the engine again") from exc
    if actual != expected:
        raise DfadcError(
            f"{engine} is not the engine that was built: sha256 {actual[:12]}…, sidecar {expected[:12]}…",
            "engines are native code; export it again",
        )
    values: dict[str, Any] = facts
    return values


def check_ir(path: Path) -> None:
    """OpenVINO tries every reader it has on a file that is not IR, and prints what each one thinks of it."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as exc:
        raise DfadcError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if path.suffix != ".xml" or not start.lstrip().startswith((b"<?xml", b"<net")):
        raise DfadcError(f"{path} is not an OpenVINO IR", "give the .xml file")
    if not path.with_suffix(".bin").is_file():
        raise DfadcError(f"{path.with_suffix('.bin')} is missing: an OpenVINO model is two files")
