"""Doctor stage: export backends, device, bf16 and torch.compile on this machine, and how to install what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dfadc._version import __version__
from dfadc.errors import RequirementMissing
from exporters.exporter import Capability
from exporters.registry import exporter_names, get_exporter, unknown_value
from exporters.sessions import openvino_core

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "dfadc.doctor/1"


@dataclass(frozen=True, slots=True)
class Finding:
    """Availability of one feature of training, and what was found or why there is none."""

    available: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Capability of each export's backend; findings on device, cuda, bf16 and torch.compile; versions."""

    backends: dict[str, Capability]
    training: dict[str, Finding]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": SCHEMA, "platform": platform.platform(), **asdict(self)}

    def require(self, names: Sequence[str]) -> None:
        """Checks that everything in ``names`` is available.

        Args:
            names: a backend, which must build here; ``NAME:run``, which must run here; or a finding about training.

        Raises:
            DfadcError: a name is unknown.
            RequirementMissing: something is missing; all missing names are listed, with the first install command.
        """
        missing, hints = [], []
        valid = {*self.training, *self.backends, *(f"{name}:run" for name in self.backends)}
        for name in names:
            if name not in valid:
                raise unknown_value("requirement", name, valid)
            if name in self.training:
                finding = self.training[name]
                if not finding.available:
                    missing.append(f"{name} ({finding.detail})")
                continue
            backend = self.backends[name.removesuffix(":run")]
            if not (backend.can_run if name.endswith(":run") else backend.can_build):
                missing.append(f"{name} ({backend.reason})")
                hints.append(backend.install)
        if missing:
            raise RequirementMissing(f"required and missing: {'; '.join(missing)}", next(filter(None, hints), ""))


def diagnose() -> Diagnosis:
    """Examines every backend and the training features; an unexpected error of a backend is a finding, not a crash."""
    import torch  # noqa: PLC0415 - the slow part

    return Diagnosis(
        backends={name: _capability(name) for name in exporter_names()},
        training=_training(),
        versions={"dfadc": __version__, "python": platform.python_version(), "torch": str(torch.__version__)},
    )


def _capability(name: str) -> Capability:
    try:
        capability = get_exporter(name).capability()
        saturates = name == "openvino" and capability.can_run and openvino_core.saturates()
        return replace(capability, reason=openvino_core.CAUSE) if saturates else capability
    except Exception as exc:  # a backend may raise anything, and the others must still be examined
        return Capability(can_build=False, can_run=False, reason=f"broken: {type(exc).__name__}: {exc}")


def _training() -> dict[str, Finding]:
    import torch  # noqa: PLC0415

    from dfadc.distillation.compute.policy import choose_device, choose_policy  # noqa: PLC0415
    from dfadc.recipe.schema import ComputeSettings  # noqa: PLC0415

    device = choose_device()
    policy = choose_policy(ComputeSettings(), device)
    cuda = torch.cuda.is_available()
    return {
        "device": Finding(available=True, detail=f"{device.type}, {torch.get_num_threads()} CPU threads"),
        "cuda": Finding(cuda, torch.cuda.get_device_name(0) if cuda else "torch sees no CUDA GPU"),
        "bf16": Finding(policy.precision == "bf16", policy.reason),
        "torch.compile": _compiler(device.type),
    }


def _compiler(device: str) -> Finding:
    """Requirements of torch.compile. It is not tried: the first compilation takes up to minutes."""
    if device == "cuda":
        has_triton = find_spec("triton") is not None
        return Finding(has_triton, "triton is installed" if has_triton else "triton is not installed")
    if device != "cpu":
        return Finding(available=False, detail=f"not known to work on {device}")
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        return Finding(available=False, detail="no C++ compiler (g++ or clang++) is installed")
    return Finding(available=True, detail=f"C++ compiler {compiler}; `distill` measures whether compiling pays")
