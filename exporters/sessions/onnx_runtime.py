"""Loaded networks behind one verb, ``run(images) -> logits``. Importing this module loads no torch and no backend."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import DfadcError, RequirementMissing, RuntimeRefused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray
    from torch import nn
    from typing_extensions import Self

DEFAULT_BATCH_SIZE = 64
#: The first release that reads the ONNX files of dfadc: opset 20 and IR version 9.
LEAST_ONNXRUNTIME = "1.17"


class ChunkedSession(ABC):
    """The part that sessions share: what ``run`` accepts, and its split into batches the backend can take.

    Args:
        batch_size: images per call of the backend.
        fixed_batch: the backend takes exactly ``batch_size`` images; the last chunk is filled up and cut.
        input_size: (C, H, W) the network takes; None where only the backend knows.
    """

    #: Why answers to the same images may be others elsewhere; empty where there is no such reason.
    remark = ""

    def __init__(
        self, *, batch_size: int, fixed_batch: bool = False, input_size: tuple[int, ...] | None = None
    ) -> None:
        self.batch_size = batch_size
        self._fixed_batch = fixed_batch
        self._input_size = input_size

    @property
    @abstractmethod
    def device(self) -> str:
        """What computes, as the backend itself reports it."""

    @abstractmethod
    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs at most ``batch_size`` images."""

    def close(self) -> None:  # noqa: B027 - a hook: most backends need nothing
        """Frees what the backend holds; the session cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps (N, C, H, W) float32 images, as the network takes them, to (N, K) float32 logits.

        Raises:
            DfadcError: the images have the wrong shape or dtype, or there are none.
        """
        self._check_images(images)
        if self.batch_size < 1:
            raise DfadcError(f"batch size {self.batch_size} is below 1")
        chunks = []
        for start in range(0, len(images), self.batch_size):
            chunk = np.ascontiguousarray(images[start : start + self.batch_size])
            missing = self.batch_size - len(chunk) if self._fixed_batch else 0
            if missing:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
            logits = self._run_batch(chunk)
            chunks.append(logits[: len(logits) - missing].astype(np.float32, copy=False))
        return np.concatenate(chunks)

    def _check_images(self, images: NDArray[np.float32]) -> None:
        if images.dtype != np.float32:
            raise DfadcError(f"images are {images.dtype}, not float32", "convert and normalise them first")
        if images.ndim != 4 or len(images) == 0:
            raise DfadcError(f"images have shape {images.shape}, not (N, C, H, W) with N of at least 1")
        if self._input_size is not None and images.shape[1:] != self._input_size:
            raise DfadcError(f"images are {_by(images.shape[1:])}, the network takes {_by(self._input_size)}")


class TorchSession(ChunkedSession):
    """A torch module in eval mode. The module is left as it is; one in training mode or elsewhere is copied.

    Args:
        module: maps (N, C, H, W) to one tensor of logits.
        device: "cpu", "cuda", "mps", ...
        batch_size: images per forward pass.
    """

    def __init__(self, module: nn.Module, device: str = "cpu", *, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        import torch  # noqa: PLC0415 - the other sessions run where there is no torch

        super().__init__(batch_size=batch_size)
        self._torch = torch
        self._device = torch.device(device)
        elsewhere = any(tensor.device.type != self._device.type for tensor in module.state_dict().values())
        training = any(part.training for part in module.modules())
        self._module = copy.deepcopy(module).to(self._device).eval() if elsewhere or training else module

    @property
    def device(self) -> str:
        """The torch device."""
        return str(self._device)

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            logits = self._module(self._torch.from_numpy(images).to(self._device))
        if not isinstance(logits, self._torch.Tensor):
            raise DfadcError(f"the network returns {type(logits).__name__}, not a tensor of logits")
        array: NDArray[np.float32] = logits.float().cpu().numpy()
        return array


class OnnxRuntimeSession(ChunkedSession):
    """An ONNX file on ONNX Runtime.

    Args:
        path: the ONNX file, or its bytes.
        threads: threads inside one operator; 0 lets ONNX Runtime choose.
        provider: the execution provider; anything else becoming active is an error.
        batch_size: images per call; a file with a fixed batch has its own.

    Raises:
        DfadcError: the file is missing or damaged, or the provider is not active.
        RequirementMissing: ONNX Runtime is too old, or has no such provider here.
        RuntimeRefused: ONNX Runtime does not know an operator, the opset or the IR version of the file.
    """

    #: How many outputs the graph must have; None for any number.
    _num_outputs: int | None = 1

    def __init__(
        self,
        path: Path | bytes,
        *,
        threads: int = 0,
        provider: str = "CPUExecutionProvider",
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        import onnxruntime  # noqa: PLC0415 - 0.2 s, and other sessions do without

        name = "the ONNX bytes" if isinstance(path, bytes) else str(path)
        if not isinstance(path, bytes) and not path.is_file():
            raise DfadcError(f"{name} does not exist")
        check_release(onnxruntime.__version__, name)
        if provider not in onnxruntime.get_available_providers():
            raise RequirementMissing(
                f"ONNX Runtime has no {provider} here", f"available: {', '.join(onnxruntime.get_available_providers())}"
            )
        options = onnxruntime.SessionOptions()
        # Without VNNI, integer kernels add pairs of products in 16 bits and saturate; with this they do not.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # the reason of a failure is in its exception
        with _onnxruntime_errors(f"ONNX Runtime cannot load {name}", refuses=True):
            source = path if isinstance(path, bytes) else str(path)
            self._session: Any = onnxruntime.InferenceSession(source, options, providers=[provider])
        if (active := self._session.get_providers()[0]) != provider:
            raise DfadcError(f"ONNX Runtime fell back from {provider} to {active} for {name}")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != (self._num_outputs or len(outputs)) or len(inputs[0].shape) != 4:
            raise DfadcError(
                f"{name} has {len(inputs)} inputs and {len(outputs)} outputs, not one of images and logits"
            )
        batch, *input_size = inputs[0].shape
        fixed = isinstance(batch, int) and batch > 0
        super().__init__(
            batch_size=batch if fixed else batch_size,
            fixed_batch=fixed,
            input_size=tuple(input_size) if all(isinstance(side, int) for side in input_size) else None,
        )
        self._provider = provider
        self._input_name: str = inputs[0].name

    @property
    def device(self) -> str:
        """The active execution provider."""
        return self._provider

    def close(self) -> None:
        """Drops the ONNX Runtime session."""
        self._session = None

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with _onnxruntime_errors("ONNX Runtime cannot run these images"):
            logits: NDArray[np.float32] = self._session.run(None, {self._input_name: images})[0]
        return logits


def check_release(version: str, name: str) -> None:
    """Raises RequirementMissing where this release of ONNX Runtime is too old for our files."""
    here, least = ([int(part) for part in text.split(".")[:2]] for text in (version, LEAST_ONNXRUNTIME))
    if here < least:
        raise RequirementMissing(
            f"{name} needs ONNX Runtime {LEAST_ONNXRUNTIME} or newer, and {version} is installed",
            f"pip install 'onnxruntime>={LEAST_ONNXRUNTIME}'",
        )


#: ONNX Runtime's errors for bytes that are no ONNX; any other of them says that it does not take the model in the file.
_NO_ONNX = ("InvalidProtobuf", "InvalidArgument", "NoSuchFile")


@contextmanager
def _onnxruntime_errors(doing: str, *, refuses: bool = False) -> Iterator[None]:
    """Turns ONNX Runtime's errors, which share no base class, into ours: RuntimeRefused where it may refuse a model."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state  # noqa: PLC0415

    kinds: list[type[Exception]] = [RuntimeError, ValueError]
    kinds += [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    try:
        yield
    except tuple(kinds) as exc:
        refused = refuses and type(exc).__name__ not in _NO_ONNX
        raise (RuntimeRefused if refused else DfadcError)(f"{doing}: {exc}") from exc


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
