"""Session of a TensorRT or TensorRT-RTX engine, and the sidecar that says who built it. Imports no backend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.storage import sha256_file
from exporters.sessions.cuda_memory import open_memory
from exporters.sessions.session import DEFAULT_BATCH_SIZE, BatchedSession

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

SIDECAR_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Backend:
    """A package that builds and runs engines: its name in exports, its Python module, and the command to install it."""

    name: str
    module_name: str
    install: str

    def import_module(self) -> Any:
        """The package.

        Raises:
            RequirementMissing: the package, or a library it needs, is not installed.
        """
        try:
            return import_module(self.module_name)
        except (ImportError, OSError) as exc:
            raise RequirementMissing(f"{self.name} is not installed: {exc}", self.install) from exc


TENSORRT = Backend("tensorrt", "tensorrt", "pip install tensorrt --extra-index-url https://pypi.nvidia.com")
TENSORRT_RTX = Backend("tensorrt-rtx", "tensorrt_rtx", "pip install tensorrt-rtx")


class TensorRtSession(BatchedSession):
    """An engine on the GPU of this machine.

    An engine is native code: this class loads what it is given. :func:`open_engine` checks an engine against its
    sidecar first; without one, load only an engine that this machine built.

    Args:
        batch_size: images per call; at most what the engine was built for.

    Raises:
        RequirementMissing: there is no GPU, no package, or the engine does not load here.
    """

    def __init__(self, path: Path, *, backend: Backend = TENSORRT, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        trt = backend.import_module()
        self._memory = open_memory()
        self._logger = collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        gpu = f" on {self._memory.gpu}" if self._memory.gpu else ""
        if self._engine is None:
            reason = "; ".join(self._logger.errors[-3:]) or "no reason given"
            way = "build it on this device"
            if "does not support this compute capability" in reason:
                way = f"{backend.name} runs on other GPUs: verify it there, or export tensorrt on this one"
            raise RequirementMissing(f"{path.name} does not load{gpu}: {reason}", way)
        self._context: Any = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._input = next(name for name in names if is_input[name])
        self._output = next(name for name in names if not is_input[name])
        lowest, _, highest = (shape[0] for shape in self._engine.get_tensor_profile_shape(self._input, 0))
        super().__init__(batch_size=max(min(batch_size, highest), lowest), fixed_batch=lowest > 1)
        self.device = f"{backend.name}{gpu}"

    def close(self) -> None:
        """Frees the engine's memory."""
        self._context = self._engine = None

    def _run_batch(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self._context.set_input_shape(self._input, tuple(images.shape))
        source = self._memory.upload(images)
        target = self._memory.allocate(tuple(self._context.get_tensor_shape(self._output)))
        try:
            self._context.set_tensor_address(self._input, source.address)
            self._context.set_tensor_address(self._output, target.address)
            if not self._context.execute_async_v3(self._memory.stream):
                raise DfadcError(f"the engine failed: {'; '.join(self._logger.errors[-3:])}")
            return self._memory.download(target)
        finally:
            self._memory.free(source)
            self._memory.free(target)


def open_engine(path: Path, *, threads: int = 0, batch_size: int = DEFAULT_BATCH_SIZE) -> TensorRtSession:  # noqa: ARG001
    """A session for an engine whose bytes are those its sidecar names, with the release that built it.

    ``threads`` are not used: an engine runs on the GPU.

    Raises:
        DfadcError: the sidecar is missing or does not fit.
        RequirementMissing: there is no GPU, or the package or its release is not here.
    """
    facts = read_sidecar(path)
    backend = TENSORRT_RTX if facts["exporter"] == TENSORRT_RTX.name else TENSORRT
    installed = backend.import_module().__version__
    if (built_by := facts["versions"][backend.module_name]) != installed:
        raise RequirementMissing(
            f"{path.name} was built by {backend.name} {built_by}, and {installed} is installed",
            f"export it again, or install {backend.module_name}=={built_by}",
        )
    return TensorRtSession(path, backend=backend, batch_size=batch_size)


def sidecar_path(engine: Path) -> Path:
    """Path of the JSON file beside an engine: an engine file itself holds nothing but the engine."""
    return engine.with_name(engine.name + ".json")


def read_sidecar(engine: Path) -> dict[str, Any]:
    """The sidecar of an engine, after comparing the engine's bytes with it.

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


def collecting_logger(trt: Any) -> Any:
    """An ILogger that keeps errors in ``.errors``: a failed build or load returns None without a reason."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return CollectingLogger()
