"""`dfadc doctor`: what it says of this machine holds, and what a CI job requires of it is checked."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest
import torch
from command_line import command_process, finish_command, run_command

from dfadc.errors import RequirementMissing
from dfadc.pipeline.doctor import Diagnosis, Finding, diagnose
from exporters.exporter import Capability
from exporters.registry import exporter_names

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose()


def test_every_backend_is_looked_at(diagnosis: Diagnosis) -> None:
    assert set(diagnosis.backends) == set(exporter_names())
    assert diagnosis.backends["onnx"].can_build
    assert diagnosis.backends["onnx"].can_run
    for name, package in {
        "openvino": "openvino",
        "tensorrt-rtx": "tensorrt_rtx",
        "tensorrt": "tensorrt",
    }.items():
        found = diagnosis.backends[name]
        installed = importlib.util.find_spec(package) is not None
        assert bool(found.version) == installed
        assert installed or "pip install" in found.install
        assert found.reason or (found.can_build and found.can_run)


def test_json_is_what_the_table_shows(diagnosis: Diagnosis) -> None:
    outcome = run_command("doctor", "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    assert json.loads(outcome.out) == diagnosis.to_dict()
    lines = run_command("doctor").out.splitlines()
    rows = {cells[1]: cells[2:-1] for line in lines if (cells := [cell.strip() for cell in line.split("│")])[1:]}
    yes = {True: "yes", False: "no"}
    for name, found in diagnosis.backends.items():
        able = [yes[found.can_build], yes[found.can_run]]
        assert rows[name] == [*able, found.version or "–", found.reason, found.install]
    for name, finding in diagnosis.training.items():
        assert rows[name] == [yes[finding.available], finding.detail]
    assert len(rows) == len(diagnosis.backends) + len(diagnosis.training)


def test_kernels_that_saturate_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="pip install openvino")
    monkeypatch.setattr("exporters.sessions.openvino_core.saturates", lambda: True)
    found = diagnose().backends["openvino"]
    assert "lacks VNNI" in found.reason
    assert found.can_run


def test_a_requirement_that_is_missing_exits_4_after_the_table(diagnosis: Diagnosis) -> None:
    assert run_command("doctor", "--require", "onnx", "--require", "onnx:run").code == 0
    absent = next((name for name, found in diagnosis.backends.items() if not found.can_run), None)
    if absent is None:
        pytest.skip("every backend runs here")
    outcome = run_command("doctor", "--require", f"{absent}:run", "--require", "onnx")
    assert outcome.code == 4
    assert "backend" in outcome.out
    assert f"{absent}:run" in outcome.errors[0]
    assert diagnosis.backends[absent].reason in outcome.errors[0]


def test_each_requirement_is_held_against_what_it_names() -> None:
    """To build and to run are two things, and all that is missing is named at once, with the first install line."""
    found = Diagnosis(
        backends={
            "onnx": Capability(can_build=True, can_run=True),
            "tensorrt-rtx": Capability(can_build=True, can_run=False, reason="no GPU"),
            "openvino": Capability(can_build=False, can_run=False, reason="not there", install="pip install openvino"),
        },
        training={"cuda": Finding(available=False, detail="no CUDA"), "bf16": Finding(available=True, detail="AMX")},
        versions={},
    )
    found.require(["onnx", "onnx:run", "tensorrt-rtx", "bf16"])
    for name, reason in (("tensorrt-rtx:run", "no GPU"), ("openvino", "not there"), ("cuda", "no CUDA")):
        with pytest.raises(RequirementMissing) as caught:
            found.require(["onnx", name])
        assert caught.value.message == f"required and missing: {name} ({reason})"
    with pytest.raises(RequirementMissing) as caught:
        found.require(["cuda", "tensorrt-rtx:run", "openvino:run"])
    assert caught.value.message.count(";") == 2
    assert caught.value.hint == "pip install openvino"


def test_the_compiler_of_this_machine_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA compiles with triton")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = diagnose().training["torch.compile"]
    assert (absent.available, "no C++ compiler" in absent.detail) == (False, True)
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    present = diagnose().training["torch.compile"]
    assert (present.available, str(tmp_path / "clang++") in present.detail) == (True, True)


def test_an_unknown_requirement_is_wrong_usage() -> None:
    outcome = run_command("doctor", "--require", "tensort")
    assert outcome.code == 2
    assert "did you mean tensorrt" in outcome.hints[0]


def test_a_backend_that_is_gone_or_broken_is_a_finding_and_no_crash(tmp_path: Path) -> None:
    """A package that fails on import in a way no adapter expects, and one that is not there at all."""
    (tmp_path / "tensorrt.py").write_text("1 / 0\n")
    preamble = f"sys.modules['tensorrt_rtx'] = None\nsys.path.insert(0, {str(tmp_path)!r})"
    with command_process("doctor", "--json", "--require", "tensorrt-rtx", preamble=preamble) as process:
        outcome = finish_command(process)
    assert outcome.code == 4, outcome.err
    assert outcome.hints == ["hint: pip install tensorrt-rtx"]
    backends = json.loads(outcome.out)["backends"]
    for name in ("tensorrt", "tensorrt-rtx"):
        assert not backends[name]["can_build"]
        assert not backends[name]["can_run"]
    assert "not installed" in backends["tensorrt-rtx"]["reason"]
    assert backends["tensorrt"]["reason"] == "broken: ZeroDivisionError: division by zero"
