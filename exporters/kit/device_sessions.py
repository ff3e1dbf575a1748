"""Sessions for a device that has numpy and one runtime: no torch, no onnx, nothing else of dfadc's dependencies."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing, RuntimeRefused
from exporters.sessions.onnx_runtime import DEFAULT_BATCH_SIZE, ChunkedSession, OnnxRuntimeSession
from exporters.sessions.openvino_core import REMARK, exact_settings, shared_core

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

#: What runs an ONNX file, in this order of preference, and what runs an engine.
ONNX_RUNTIMES = ("onnxruntime", "openvino")
ENGINE_RUNTIMES = ("tensorrt",)


def fitting_runtimes(path: Path, runtime: str = "") -> Sequence[str]:
    """The runtimes that take such a file; of them only the named one, where one is named.

    Raises:
        DfadcError: no file is run by a runtime of that name.
    """
    known = (*ONNX_RUNTIMES, *ENGINE_RUNTIMES)
    if runtime and runtime not in known:
        raise DfadcError(f"unknown runtime {runtime!r}", f"one of {', '.join(known)}")
    fitting = ENGINE_RUNTIMES if path.suffix == ".engine" else ONNX_RUNTIMES
    return tuple(name for name in fitting if runtime in ("", name))


def open_on_device(path: Path, runtime: str = "", *, threads: int = 0) -> ChunkedSession:
    """A session for ``path`` with the first runtime that is here, or with the named one.

    Raises:
        DfadcError: the runtime is unknown or does not take such a file, or the file is damaged.
        RequirementMissing: no runtime for it is here.
    """
    fitting = fitting_runtimes(path, runtime)
    if not fitting:
        raise DfadcError(f"{runtime} does not run {path.name}", f"one of {', '.join(fitting_runtimes(path))} does")
    present = [name for name in fitting if find_spec(name) is not None]
    if not present:
        raise RequirementMissing(f"{path.name} needs {' or '.join(fitting)}, not installed")
    match present[0]:
        case "onnxruntime":
            return OnnxRuntimeSession(path, threads=threads)
        case "openvino":
            return OpenVinoOnnxSession(path, threads=threads)
        case _:
            return TensorRtEngineSession(path)


class OpenVinoOnnxSession(ChunkedSession):
    """An ONNX file on OpenVINO's CPU plugin, computing in fp32 what is not quantised.

    Raises:
        RuntimeRefused: OpenVINO does not take the file.
    """

    def __init__(self, path: Path, *, threads: int = 0, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        super().__init__(batch_size=batch_size)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = shared_core()
            model = core.read_model(path)
            exact = exact_settings(model)
            self._compiled: Any = core.compile_model(model, "CPU", {**settings, **exact})
        except RuntimeError as exc:
            raise RuntimeRefused(f"OpenVINO cannot load {path}: {exc}") from exc
        self.remark = REMARK if exact else ""

    @property
    def device(self) -> str:
        """The OpenVINO device."""
        return "OpenVINO CPU"

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.array(self._compiled(images)[0], np.float32)


class TensorRtEngineSession(ChunkedSession):
    """An engine that trtexec built on this device; its memory comes from torch where that is here, or cuda-python.

    Raises:
        RequirementMissing: neither torch with a GPU nor cuda-python is here, or the engine does not load here.
    """

    def __init__(self, path: Path) -> None:
        trt = import_module("tensorrt")
        self._memory = _memory()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise RequirementMissing(f"{path.name} does not load here", "build it on this device: ./build.sh")
        self._context: Any = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._input = next(name for name in names if is_input[name])
        self._output = next(name for name in names if not is_input[name])
        _, _, highest = self._engine.get_tensor_profile_shape(self._input, 0)
        super().__init__(batch_size=min(DEFAULT_BATCH_SIZE, highest[0]))

    @property
    def device(self) -> str:
        """The backend."""
        return "TensorRT"

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self._context.set_input_shape(self._input, images.shape)
        logits = np.empty(tuple(self._context.get_tensor_shape(self._output)), np.float32)
        source, target = self._memory.upload(images), self._memory.upload(logits)
        try:
            self._context.set_tensor_address(self._input, source.address)
            self._context.set_tensor_address(self._output, target.address)
            if not self._context.execute_async_v3(self._memory.stream):
                raise DfadcError("the engine failed", "did its build end without an error?")
            self._memory.download(target, logits)
        finally:
            self._memory.free(source)
            self._memory.free(target)
        return logits


class _Buffer:
    """Device memory: its address, and what owns it."""

    def __init__(self, address: int, owner: object) -> None:
        self.address = address
        self.owner = owner


class _TorchMemory:
    """CUDA tensors of torch."""

    def __init__(self) -> None:
        self._torch: Any = import_module("torch")
        self._stream = self._torch.cuda.Stream()
        self.stream: int = self._stream.cuda_stream

    def upload(self, array: NDArray[np.float32]) -> _Buffer:
        tensor = self._torch.from_numpy(array).cuda()
        self._torch.cuda.synchronize()
        return _Buffer(tensor.data_ptr(), tensor)

    def download(self, buffer: _Buffer, array: NDArray[np.float32]) -> None:
        self._stream.synchronize()
        owner: Any = buffer.owner
        array[...] = owner.cpu().numpy()

    def free(self, buffer: _Buffer) -> None:
        buffer.owner = None


class _CudaPythonMemory:
    """The CUDA runtime through cuda-python."""

    def __init__(self) -> None:
        newer = find_spec("cuda.bindings") is not None
        self._cuda: Any = import_module("cuda.bindings.runtime" if newer else "cuda.cudart")
        self._stream = self._call(self._cuda.cudaStreamCreate())
        self.stream = int(self._stream)

    def upload(self, array: NDArray[np.float32]) -> _Buffer:
        address = self._call(self._cuda.cudaMalloc(array.nbytes))
        to_device = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpy(address, array.ctypes.data, array.nbytes, to_device))
        return _Buffer(int(address), address)

    def download(self, buffer: _Buffer, array: NDArray[np.float32]) -> None:
        self._call(self._cuda.cudaStreamSynchronize(self._stream))
        to_host = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpy(array.ctypes.data, buffer.address, array.nbytes, to_host))

    def free(self, buffer: _Buffer) -> None:
        self._call(self._cuda.cudaFree(buffer.address))

    def _call(self, returned: tuple[Any, ...]) -> Any:
        """The value of a call; its first part is the error."""
        if int(returned[0]) != 0:
            raise DfadcError(f"CUDA failed: {returned[0]}")
        return returned[1] if len(returned) > 1 else None


def _memory() -> _TorchMemory | _CudaPythonMemory:
    if find_spec("torch") is not None and import_module("torch").cuda.is_available():
        return _TorchMemory()
    if find_spec("cuda") is not None:
        return _CudaPythonMemory()
    raise RequirementMissing("an engine needs torch or cuda-python beside tensorrt", "pip install cuda-python")
