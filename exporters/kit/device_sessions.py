"""Choice of the runtime on a device that has numpy and one runtime, and no other dependency of dfadc."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError, RequirementMissing
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.sessions.openvino_session import OpenVinoSession
from exporters.sessions.tensorrt_session import TensorRtSession

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from exporters.sessions.session import Session

#: Runtimes of ONNX files, in order of preference, and of engines.
ONNX_RUNTIMES = ("onnxruntime", "openvino")
ENGINE_RUNTIMES = ("tensorrt",)


def fitting_runtimes(path: Path, runtime: str = "") -> Sequence[str]:
    """Runtimes that take such a file; only the named one, if one is named.

    Raises:
        DfadcError: the named runtime is unknown.
    """
    runtimes = (*ONNX_RUNTIMES, *ENGINE_RUNTIMES)
    if runtime and runtime not in runtimes:
        raise DfadcError(f"unknown runtime {runtime!r}", f"one of {', '.join(runtimes)}")
    fitting = ENGINE_RUNTIMES if path.suffix == ".engine" else ONNX_RUNTIMES
    return tuple(name for name in fitting if runtime in ("", name))


def open_on_device(path: Path, runtime: str = "", *, threads: int = 0) -> Session:
    """A session for ``path`` with the first runtime that is installed, or with the named one.

    An engine has no sidecar here: trtexec built it on this device.

    Raises:
        DfadcError: the runtime is unknown or does not take such a file, or the file is damaged.
        RequirementMissing: no runtime for it is installed.
    """
    fitting = fitting_runtimes(path, runtime)
    if not fitting:
        raise DfadcError(f"{runtime} does not run {path.name}", f"one of {', '.join(fitting_runtimes(path))} does")
    installed = [name for name in fitting if find_spec(name) is not None]
    if not installed:
        raise RequirementMissing(f"{path.name} needs {' or '.join(fitting)}, not installed")
    match installed[0]:
        case "onnxruntime":
            return OnnxRuntimeSession(path, threads=threads)
        case "openvino":
            return OpenVinoSession(path, threads=threads)
        case _:
            return TensorRtSession(path)
