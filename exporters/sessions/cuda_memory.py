"""GPU memory for engines, from torch or else from cuda-python; neither is imported before it is used."""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Buffer(NamedTuple):
    """A float32 array in GPU memory: its address, and the object that owns or describes it."""

    address: int
    owner: Any


class TorchMemory:
    """CUDA tensors of torch on a stream of their own: the default stream makes an engine synchronise twice."""

    def __init__(self) -> None:
        self._torch: Any = import_module("torch")
        self._stream = self._torch.cuda.Stream()
        self.stream: int = self._stream.cuda_stream
        self.gpu: str = self._torch.cuda.get_device_name(0)

    def upload(self, array: NDArray[np.float32]) -> Buffer:
        """Copies an array to the GPU."""
        with self._torch.cuda.stream(self._stream):
            tensor = self._torch.from_numpy(array).cuda()
        return Buffer(tensor.data_ptr(), tensor)

    def allocate(self, shape: tuple[int, ...]) -> Buffer:
        """Memory for an array."""
        with self._torch.cuda.stream(self._stream):
            tensor = self._torch.empty(shape, dtype=self._torch.float32, device="cuda")
        return Buffer(tensor.data_ptr(), tensor)

    def download(self, buffer: Buffer) -> NDArray[np.float32]:
        """Waits for the stream and copies an array to the host."""
        self._stream.synchronize()
        array: NDArray[np.float32] = buffer.owner.cpu().numpy()
        return array

    def free(self, buffer: Buffer) -> None:
        """Nothing to do: torch frees a tensor with its last reference."""


class CudaPythonMemory:
    """Allocations of the CUDA runtime through cuda-python."""

    def __init__(self) -> None:
        newer = find_spec("cuda.bindings") is not None
        self._cuda: Any = import_module("cuda.bindings.runtime" if newer else "cuda.cudart")
        self._stream = self._call(self._cuda.cudaStreamCreate())
        self.stream = int(self._stream)
        self.gpu = ""

    def upload(self, array: NDArray[np.float32]) -> Buffer:
        """Copies an array to the GPU."""
        buffer = self.allocate(array.shape)
        to_device = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpy(buffer.address, array.ctypes.data, array.nbytes, to_device))
        return buffer

    def allocate(self, shape: tuple[int, ...]) -> Buffer:
        """Memory for an array."""
        size = int(np.prod(shape)) * np.dtype(np.float32).itemsize
        return Buffer(int(self._call(self._cuda.cudaMalloc(size))), shape)

    def download(self, buffer: Buffer) -> NDArray[np.float32]:
        """Waits for the stream and copies an array to the host."""
        self._call(self._cuda.cudaStreamSynchronize(self._stream))
        array = np.empty(buffer.owner, np.float32)
        to_host = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpy(array.ctypes.data, buffer.address, array.nbytes, to_host))
        return array

    def free(self, buffer: Buffer) -> None:
        """Frees the memory of an array."""
        self._call(self._cuda.cudaFree(buffer.address))

    def _call(self, returned: tuple[Any, ...]) -> Any:
        """The value that a CUDA call returned; the first part of the tuple is its error code."""
        if int(returned[0]) != 0:
            raise DfadcError(f"CUDA failed: {returned[0]}")
        return returned[1] if len(returned) > 1 else None


def open_memory() -> TorchMemory | CudaPythonMemory:
    """Memory of the first GPU.

    Raises:
        RequirementMissing: there is no GPU, or neither torch nor cuda-python can reach it.
    """
    if not has_cuda_driver():
        raise RequirementMissing("an engine runs on an NVIDIA GPU, and there is none here")
    if find_spec("torch") is not None and import_module("torch").cuda.is_available():
        return TorchMemory()
    if find_spec("cuda") is not None:
        return CudaPythonMemory()
    raise RequirementMissing("an engine needs torch with CUDA, or cuda-python", "pip install cuda-python")


def has_cuda_driver() -> bool:
    """True if the driver's library loads: without it torch sees no GPU, and importing torch takes seconds."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True
