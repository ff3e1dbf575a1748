"""Session of an ONNX file on ONNX Runtime, which is imported when the first session opens."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, RequirementMissing, RuntimeRefused
from exporters.sessions.session import DEFAULT_BATCH_SIZE, BatchedSession

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

#: The first release that reads the ONNX files of dfadc: opset 20 and IR version 9.
LEAST_ONNXRUNTIME = "1.17"


class OnnxRuntimeSession(BatchedSession):
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

    #: Number of outputs that the graph must have; None for any number.
    _num_outputs: int | None = 1

    def __init__(
        self,
        path: Path | bytes,
        *,
        threads: int = 0,
        provider: str = "CPUExecutionProvider",
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        import onnxruntime  # noqa: PLC0415 - 0.2 s that the other sessions need not spend

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
        self.device = provider
        self._input_name: str = inputs[0].name

    def close(self) -> None:
        """Drops the ONNX Runtime session."""
        self._session = None

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with _onnxruntime_errors("ONNX Runtime cannot run these images"):
            logits: NDArray[np.float32] = self._session.run(None, {self._input_name: images})[0]
        return logits


def check_release(version: str, name: str) -> None:
    """Raises RequirementMissing if this release of ONNX Runtime is too old for the files of dfadc."""
    here, least = ([int(part) for part in text.split(".")[:2]] for text in (version, LEAST_ONNXRUNTIME))
    if here < least:
        raise RequirementMissing(
            f"{name} needs ONNX Runtime {LEAST_ONNXRUNTIME} or newer, and {version} is installed",
            f"pip install 'onnxruntime>={LEAST_ONNXRUNTIME}'",
        )


#: ONNX Runtime's errors for bytes that are not ONNX; its other errors mean that it does not support the model.
_NOT_ONNX = ("InvalidProtobuf", "InvalidArgument", "NoSuchFile")


@contextmanager
def _onnxruntime_errors(doing: str, *, refuses: bool = False) -> Iterator[None]:
    """Turns ONNX Runtime's errors, which share no base class, into DfadcError, or RuntimeRefused with ``refuses``."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state  # noqa: PLC0415

    kinds: list[type[Exception]] = [RuntimeError, ValueError]
    kinds += [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    try:
        yield
    except tuple(kinds) as exc:
        refused = refuses and type(exc).__name__ not in _NOT_ONNX
        raise (RuntimeRefused if refused else DfadcError)(f"{doing}: {exc}") from exc
