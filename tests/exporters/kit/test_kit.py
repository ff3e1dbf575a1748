"""The device kit is checked as on a device: by its own program, with numpy and one runtime, without torch or dfadc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from command_line import files_of, run_command
from crashing_model import write_crashing_model
from onnx import numpy_helper

from dfadc.errors import StorageFailed
from exporters.kit.write import carried_files, write_kit

if TYPE_CHECKING:
    from command_line import Outcome

    from dfadc.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
#: What a device lacks. dfadc itself must come from the kit.
ABSENT = ("torch", "onnx", "pydantic", "typer", "rich", "scipy")
#: Python reads it first, in the program and in the processes that it starts.
SITE = "import sys\nfor name in {absent!r}:\n    sys.modules[name] = None\n"
PROGRAM = """\
import runpy, sys
sys.argv = ["check.py", *{arguments!r}]
try:
    runpy.run_path("check.py", run_name="__main__")
finally:
    sys.stderr.write("dfadc from " + sys.modules["dfadc"].__file__ + "\\n")
"""


@pytest.fixture(scope="module")
def run_with_kit(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    run = tmp_path_factory.mktemp("kit") / "run"
    shutil.copytree(finished_run.path, run)
    outcome = run_command("export", run, "-e", "kit", "-e", "onnx:fp16", "--batch", "1,2,8")
    assert outcome.code == 0, outcome.err
    return run, outcome


@pytest.fixture
def kit(run_with_kit: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """The kit alone, somewhere else."""
    shutil.copytree(run_with_kit[0] / "artifacts" / "kit", tmp_path / "kit")
    return tmp_path / "kit"


def check(kit: Path, *arguments: str, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    site = kit.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(absent=absent))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    program = PROGRAM.format(arguments=arguments)
    done = subprocess.run(  # noqa: S603 -- our own interpreter
        [sys.executable, "-c", program], cwd=kit, env=environment, capture_output=True, text=True, check=False
    )
    assert f"dfadc from {kit}" in done.stderr, done.stderr
    return done


def damage(model: Path) -> None:
    """Turns the sign of the last layer's weights: the file is sound, and its answers are wrong."""
    loaded = onnx.load(model)
    weight = [tensor for tensor in loaded.graph.initializer if len(tensor.dims) == 2][-1]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(loaded, model)


def test_it_holds_what_a_device_needs_and_our_own_modules(run_with_kit: tuple[Path, Outcome]) -> None:
    run, outcome = run_with_kit
    kit = run / "artifacts" / "kit"
    assert "device kit" in outcome.err
    for file in carried_files():
        assert (kit / file).read_bytes() == (ROOT / file).read_bytes()
    assert {"dfadc/verification/gate.py", "exporters/kit/check.py"} <= set(carried_files())
    for file in ("student.onnx", "student.fp16.onnx"):
        assert (kit / file).read_bytes() == (kit.parent / file).read_bytes()
    assert (kit / "samples.npz").read_bytes() == (run / "samples.npz").read_bytes()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_good_model_passes_as_verify_says(runtime: str, kit: Path, run_with_kit: tuple[Path, Outcome]) -> None:
    pytest.importorskip(runtime)
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[runtime]
    absent = (*ABSENT, other)
    assert check(kit, "student.onnx", absent=absent).returncode == 0
    done, verified = check(kit, "--json", absent=absent), run_command("verify", run_with_kit[0], "--json")
    assert done.returncode == verified.code, done.stderr
    on_device, here = json.loads(done.stdout), json.loads(verified.out)
    assert on_device["verdict"] == here["verdict"]
    assert on_device["artifacts"]["student.onnx"]["verdict"] == "PASS"
    assert on_device["gate"]["min_agreement"] == here["gate"]["min_agreement"]
    for name in ("student.onnx", "student.fp16.onnx"):
        assert on_device["artifacts"][name]["verdict"] == here["artifacts"][name]["verdict"]
        if runtime == "onnxruntime":
            assert on_device["artifacts"][name]["reasons"] == here["artifacts"][name]["reasons"]
            assert on_device["artifacts"][name]["comparisons"] == here["artifacts"][name]["comparisons"]
    assert on_device["student"] == here["student"]


def test_a_damaged_model_fails_as_verify_says(kit: Path) -> None:
    assert check(kit, "student.onnx").returncode == 0
    damage(kit / "student.onnx")
    done = check(kit, "student.onnx")
    assert done.returncode == 3
    assert "verdict: FAIL" in done.stdout
    assert "differ from the fp32 student's" in done.stdout
    assert "warning: student.onnx is not the file that was exported" in done.stderr
    verified = run_command("verify", kit / "student.onnx", "--samples", kit / "samples.npz")
    assert verified.code == 3


def test_a_model_that_crashes_the_runtime_fails_and_the_others_are_judged(kit: Path) -> None:
    write_crashing_model(kit / "student.fp16.onnx")
    done = check(kit, "--json")
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert report["artifacts"]["student.fp16.onnx"]["verdict"] == "FAIL"
    (reason,) = report["artifacts"]["student.fp16.onnx"]["reasons"]
    assert "the runtime crashed (signal 11) while opening student.fp16.onnx" in reason
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"


def test_what_cannot_run_is_never_a_pass(kit: Path) -> None:
    done = check(kit, absent=(*ABSENT, "onnxruntime", "openvino"))
    assert done.returncode == 4
    assert "NOT RUN" in done.stdout
    assert "verdict: PASS" not in done.stdout
    missing_engine = check(kit, "student.fp16.engine", "student.onnx")
    assert missing_engine.returncode == 4
    assert "./build.sh" in missing_engine.stdout


@pytest.mark.parametrize("file", ["kit.json", "samples.npz", "student.onnx"])
def test_a_damaged_kit_is_named(file: str, kit: Path) -> None:
    (kit / file).write_bytes((kit / file).read_bytes()[:100])
    done = check(kit)
    assert done.returncode == 2, done.stdout
    assert "error: " in done.stderr
    assert file in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_is_wrong_usage(kit: Path) -> None:
    done = check(kit, "student.int8.onnx")
    assert done.returncode == 2
    assert "student.int8.onnx is not a model of this kit" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("student.onnx", "student.fp16.onnx")])
def test_a_named_runtime_checks_what_it_runs(arguments: tuple[str, ...], kit: Path) -> None:
    (kit / "student.engine").write_bytes(b"an engine that build.sh left here")
    done = check(kit, *arguments, "--runtime", "onnxruntime", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] != 2, done.stderr
    assert report["artifacts"]["student.onnx"]["verdict"] == "PASS"
    if not arguments:
        assert report["artifacts"]["student.engine"]["verdict"] == "NOT RUN"
        assert report["artifacts"]["student.engine"]["reasons"] == ["onnxruntime does not run student.engine"]
    asked = check(kit, "student.engine", "--runtime", "onnxruntime")
    assert asked.returncode == 2
    assert "onnxruntime does not run student.engine" in asked.stderr
    unknown = check(kit, "--runtime", "onxruntime")
    assert unknown.returncode == 2
    assert "unknown runtime 'onxruntime'" in unknown.stderr


def build_with(kit: Path, help_text: str) -> subprocess.CompletedProcess[str]:
    """Runs build.sh with a shell program that prints a trtexec's help and writes down its arguments."""
    (kit / "help").write_text(help_text)
    trtexec = kit / "trtexec"
    trtexec.write_text('#!/bin/sh\n[ "$1" = --help ] && cat help && exit\necho "$@" >> said\n')
    trtexec.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(trtexec)}
    return subprocess.run(  # noqa: S603 -- the script that is tested
        [kit / "build.sh", "--verbose"], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("banner", "found"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # trtexec --help\n", "belongs to TensorRT 8,"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v9200] # trtexec --help\n", "belongs to TensorRT 9,"),
        ("", "does not name its TensorRT release,"),
    ],
)
def test_a_trtexec_that_chooses_the_precision_itself_is_refused(banner: str, found: str, kit: Path) -> None:
    done = build_with(kit, f"{banner}=== Model Options ===\n  --onnx=<file>  ONNX model\n  --noTF32\n")
    assert done.returncode == 4
    assert f"{found} and this kit needs TensorRT 10" in done.stderr
    assert not (kit / "said").exists()


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("v100300] [b14", ("--stronglyTyped", "--noTF32", "--skipInference")),
        ("v110000] [b1", ("--skipInference",)),
        ("v11.1.0.106] [b48", ("--skipInference",)),
    ],
)
def test_the_build_script_passes_the_flags_that_trtexec_has(version: str, flags: tuple[str, ...], kit: Path) -> None:
    """10 has --stronglyTyped, 11 may have it no more."""
    banner = f"&&&& RUNNING TensorRT.trtexec [TensorRT {version}] # trtexec --help"
    done = build_with(kit, "\n".join((banner, "=== Model Options ===", *flags, "")))
    assert done.returncode == 0, done.stderr
    first, second = (kit / "said").read_text().splitlines()
    assert "--onnx=student.onnx --saveEngine=student.engine" in first
    assert "--onnx=student.fp16.onnx --saveEngine=student.fp16.engine" in second
    assert "--minShapes=images:1x1x8x8 --optShapes=images:2x1x8x8 --maxShapes=images:8x1x8x8 --verbose" in second
    for flag in ("--stronglyTyped", "--noTF32", "--skipInference"):
        assert (flag in second.split()) == (flag in flags)
    absent = subprocess.run(  # noqa: S603
        [kit / "build.sh"], env={**os.environ, "TRTEXEC": str(kit / "none")}, capture_output=True, check=False
    )
    assert absent.returncode == 4


def test_the_models_of_a_kit_are_those_of_the_manifest(finished_run: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    before = (run / "manifest.json").read_bytes()
    assert run_command("export", run, "-e", "kit", "--quiet").code == 0
    assert (run / "manifest.json").read_bytes() == before  # what is there is taken as it is
    assert np.load(run / "artifacts" / "kit" / "samples.npz")["images"].dtype == np.uint8
    assert [path.name for path in (run / "artifacts" / "kit").glob("*.onnx")] == ["student.onnx"]
    assert run_command("export", run, "-e", "kit", "--gpu", "sm86").code == 2


def test_a_kit_that_cannot_be_replaced_is_still_there(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is out of the way already when the new one cannot take its place."""
    before, rename = files_of(kit), Path.rename

    def fail_once_it_is_gone(path: Path, target: Path) -> Path:
        if Path(target) == kit and not kit.exists():
            monkeypatch.undo()
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once_it_is_gone)
    with pytest.raises(StorageFailed, match="No space left"):
        write_kit(kit, [kit / "student.onnx"], kit / "samples.npz", thresholds={})
    assert files_of(kit) == before
    assert list(tmp_path.iterdir()) == [kit]
