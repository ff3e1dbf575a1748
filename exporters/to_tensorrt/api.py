"""Builds engines with ``tensorrt`` 10, ``tensorrt`` 11 or ``tensorrt_rtx``; only this file knows their differences.

All three build strongly typed networks: precision lives in the ONNX graph, never in builder flags, which 11 and RTX no
longer have.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, ExportFailed
from exporters.exporter import ignore
from exporters.registry import unknown_value
from exporters.sessions.tensorrt_session import TENSORRT, TENSORRT_RTX, Backend, collecting_logger
from exporters.to_onnx.file import INPUT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from exporters.exporter import BatchProfile, ProgressCallback

#: Layers that hold weights: their dtype is the precision of the network.
_WEIGHTED_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


class TensorRtApi:
    """An imported backend.

    Raises:
        RequirementMissing: the package, or a library it needs, is not installed.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.module: Any = backend.import_module()
        self.version: str = self.module.__version__
        self._major = int(self.version.partition(".")[0])

    @property
    def chooses_gpus(self) -> bool:
        """True if engines can be built for GPUs by name; otherwise they are built for the GPU of this machine."""
        return self.backend.name == TENSORRT_RTX.name

    def gpu_names(self) -> tuple[str, ...]:
        """The compute capabilities an engine can be built for, e.g. "sm86"; empty where that cannot be chosen."""
        if not self.chooses_gpus:
            return ()
        return tuple(name.lower() for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """True if engines run on GPUs of a compute capability, e.g. (8, 6).

        TensorRT-RTX 1.7 runs on RTX GPUs from Turing on and on newer ones than it knows, not on Volta and Hopper
        (seen on an H200: "TensorRT-RTX does not support this compute capability").
        """
        names = self.gpu_names()
        newest = max((int(name.removeprefix("sm")) for name in names), default=0)
        number = 10 * capability[0] + capability[1]
        return not names or f"sm{number}" in names or number > newest

    def check_gpus(self, gpus: Sequence[str]) -> None:
        """Raises DfadcError for a GPU that this backend cannot build for."""
        if gpus and not self.chooses_gpus:
            raise DfadcError(
                f"{self.backend.name} builds for the GPU of this machine, not for {', '.join(gpus)}",
                "leave --gpu out and build on the device, or use tensorrt-rtx",
            )
        for gpu in gpus:
            if gpu not in self.gpu_names():
                raise unknown_value("GPU", gpu, self.gpu_names())

    def network_flags(self) -> int:
        """Flags of ``create_network``: 10 needs one for strong typing, which 11 and RTX always use."""
        if self.backend.name == TENSORRT.name and self._major <= 10:
            return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return 0

    def progress_monitor(self, on_progress: ProgressCallback, interrupted: Sequence[object]) -> Any:
        """An IProgressMonitor that calls ``on_progress``.

        An exception of ``on_progress`` cancels the build and is kept in ``.raised``; any item in ``interrupted``
        cancels it too.
        """
        trt = self.module

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.raised: BaseException | None = None
                self.steps: dict[str, int] = {}

            def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:  # noqa: ARG002
                self.steps[phase] = num_steps

            def phase_finish(self, phase: str) -> None:
                self.steps.pop(phase, None)

            def step_complete(self, phase: str, step: int) -> bool:
                if self.raised is None:
                    try:
                        on_progress(phase, step + 1, self.steps.get(phase, 0))
                    except BaseException as exc:  # Ctrl-C too: nothing may pass through the builder's C++ frames
                        self.raised = exc
                return self.raised is None and not interrupted

        return Monitor()


@contextmanager
def deferred_interrupt() -> Iterator[Sequence[object]]:
    """Yields a list to which Ctrl-C appends; the previous handler is called after the block.

    Called at once it would raise inside a callback of the builder, whose C++ frames swallow the exception: of 30
    builds that were interrupted at random moments, 20 went on or failed with another error.
    """
    received: list[tuple[int, FrameType | None]] = []
    if threading.current_thread() is not threading.main_thread():  # only that one receives signals
        yield received
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)
    if received and callable(previous):
        previous(*received[0])


class ParsedNetwork:
    """A typed ONNX graph parsed by the backend. Builder, parser and logger live as long as the network.

    Raises:
        ExportFailed: the backend does not support the graph; operators and nodes are named.
    """

    def __init__(self, api: TensorRtApi, onnx_bytes: bytes) -> None:
        self._api = api
        self._logger = collecting_logger(api.module)
        self._builder = api.module.Builder(self._logger)
        self._network = self._builder.create_network(api.network_flags())
        self._parser = api.module.OnnxParser(self._network, self._logger)
        if not self._parser.parse(onnx_bytes):
            errors = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
            reasons = [
                f"operator {e.node_operator()} (node {e.node_name() or '?'}): {e.desc().strip()}" for e in errors
            ]
            raise ExportFailed(
                f"{api.backend.name} {api.version} cannot take the graph: {'; '.join(reasons) or self._logged()}"
            )

    def dtype_census(self) -> dict[str, int]:
        """Number of weighted layers by output dtype, and of layers that quantise ("quantize")."""
        counts: Counter[str] = Counter()
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            if layer.type.name in _WEIGHTED_LAYERS:
                counts[layer.get_output(0).dtype.name.lower()] += 1
            elif layer.type.name == "QUANTIZE":
                counts["quantize"] += 1
        return dict(sorted(counts.items()))

    def build(
        self,
        profile: BatchProfile,
        *,
        gpus: Sequence[str] = (),
        workspace_bytes: int | None = None,
        on_progress: ProgressCallback = ignore,
    ) -> bytes:
        """Builds the engine.

        Raises:
            DfadcError: a GPU is unknown to the backend.
            ExportFailed: the build failed, with what the backend logged.
        """
        self._api.check_gpus(gpus)
        trt = self._api.module
        config = self._builder.create_builder_config()
        self._add_profile(config, profile)
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        if gpus:
            config.num_compute_capabilities = len(gpus)
            for index, gpu in enumerate(gpus):
                config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index)
        with deferred_interrupt() as interrupted:
            monitor = self._api.progress_monitor(on_progress, interrupted)
            config.progress_monitor = monitor
            engine = self._builder.build_serialized_network(self._network, config)
        if monitor.raised is not None:
            raise monitor.raised
        if engine is None:
            where = f" for {', '.join(gpus)}" if gpus else ""
            turing = "Turing (sm75) engines must be fp16" if "sm75" in gpus else ""
            raise ExportFailed(f"{self._api.backend.name} cannot build the engine{where}: {self._logged()}", turing)
        return bytes(engine)

    def _add_profile(self, config: Any, profile: BatchProfile) -> None:
        """A dynamic batch needs an optimisation profile; a fixed one must lie within it."""
        network_input = self._network.get_input(0)
        if self._network.num_inputs != 1 or network_input.name != INPUT_NAME:
            raise DfadcError(f"the graph has {self._network.num_inputs} inputs, not one called {INPUT_NAME!r}")
        batch, *size = tuple(network_input.shape)
        if batch != -1:
            raise DfadcError(f"the graph has a fixed batch of {batch}", "export it with a dynamic batch")
        shapes = [(rows, *size) for rows in (profile.lowest, profile.optimum, profile.highest)]
        optimisation = self._builder.create_optimization_profile()
        optimisation.set_shape(INPUT_NAME, *shapes)
        config.add_optimization_profile(optimisation)

    def _logged(self) -> str:
        return "; ".join(dict.fromkeys(self._logger.errors[-5:])) or "it gave no reason"
