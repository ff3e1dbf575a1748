"""Stages that run programs as a person does: pytest, and the `dfadc` command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from record import Job, Record

ROOT = Path(__file__).resolve().parents[2]
FASHION_MNIST = ROOT / "examples" / "fashion_mnist"
MARK = "pytest.mark.gpu"
#: What a tiny run computes in place of a training of minutes.
_TINY = ("--steps", "2", "--batch-size", "16", "--set", "verify.num_samples=192", "--set", "calibration.num_images=32")
#: Seconds of a distil command beside its training: start, plan, samples, export, verification.
OVERHEAD_SECONDS = 40
#: Fewer seconds of training than this are not worth a run.
_LEAST_SECONDS = 30
_FEW_STEPS = "20"


def run_gpu_tests(job: Job, record: Record) -> None:
    """``pytest -m gpu``: number of tests passed, failed and skipped, and why those failed.

    Only files with such tests are collected: the others may import what is not installed here. Warnings are shown and
    are no errors, for each release of torch has others.
    """
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    chosen = ["-m", "gpu"] if job.is_cuda else ["-k", "on_device and cpu and (session or memory or inherited)"]
    report = job.work / "tests.xml"
    command = [
        "-m",
        "pytest",
        *chosen,
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        f"--junitxml={report}",
        "-v",
    ]
    try:
        done = _run(*command, *map(str, files), seconds=job.seconds_left - 5)
    except subprocess.TimeoutExpired as exc:
        printed = (exc.stdout or b"").decode(errors="replace").splitlines()
        record.fact("passed before the time was up", sum(" PASSED" in line for line in printed))
        record.note("\n".join(line for line in printed if " FAILED" in line or " ERROR" in line))
        raise DfadcError(f"pytest did not end in time; it printed last: {printed[-3:]}") from exc
    record.fact("exit code", done.returncode)
    record.fact("last line", (done.stdout.splitlines() or [""])[-1])
    if not report.is_file():
        raise DfadcError(f"pytest ended without a report:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    suites = list(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314 -- pytest wrote it
    for count in ("tests", "failures", "errors", "skipped"):
        record.fact(count, sum(int(suite.get(count, 0)) for suite in suites))
    for case in (case for suite in suites for case in suite.iter("testcase")):
        name = f"{case.get('classname')}::{case.get('name')}"
        for outcome in (each for each in case if each.tag in ("failure", "error", "skipped")):
            text = (outcome.text or "").strip()[-1500:] if outcome.tag != "skipped" else ""
            record.note(f"{outcome.tag}: {name}: {outcome.get('message')}\n{text}".rstrip())


def distil(job: Job, record: Record, minutes: float) -> None:
    """``dfadc distill`` on the Fashion-MNIST teacher: what comes of a budget of minutes on this machine."""
    seconds = min(60 * minutes, job.seconds_left - OVERHEAD_SECONDS)
    if seconds < _LEAST_SECONDS and not job.tiny:
        record.note(f"not run: {job.seconds_left:.0f} s are left, and {OVERHEAD_SECONDS} s of them are no training")
        return
    length = _TINY if job.tiny else ("--minutes", f"{seconds / 60:.2f}")
    out = run_folder(job, minutes)
    data = FASHION_MNIST / "test_2000.npz"
    report = _distil(job, record, out, (*length, "--data", str(data)))
    facts, accuracy = report["run"], report["accuracy"]
    record.fact("training, s (with samples)", facts["seconds"])
    record.fact("steps", facts["recipe"]["steps"])
    record.fact("precision", facts["precision"])
    record.fact("images/s at the end", report["curves"]["last"]["images_per_second"])
    for name in ("teacher", "student"):
        low, high = accuracy[f"{name}_low"], accuracy[f"{name}_high"]
        record.fact(f"accuracy of the {name}", f"{accuracy[name]:.2%} [{low:.2%}, {high:.2%}] of {accuracy['n']}")
    record.fact("agreement on samples", f"{report['student']['agreement']:.2%}")
    for note in facts["notes"]:
        record.note(note)


def run_folder(job: Job, minutes: float) -> Path:
    """Folder of the run of so many minutes."""
    return job.work / f"run-{minutes:g}"


def use_engines(job: Job, record: Record, minutes: float) -> None:
    """``dfadc export``, ``verify`` and ``bench`` of TensorRT-RTX engines of the student of an earlier stage.

    On the CPU there are none, and the other artifacts are verified and timed again.
    """
    if job.is_cuda and find_spec("tensorrt_rtx") is None:
        record.note("not run: the package tensorrt_rtx is not installed here")
        return
    run = run_folder(job, minutes)
    if not (run / "report.json").is_file():
        record.note(f"the run of {minutes:g} minutes is not there: the student is one of {_FEW_STEPS} steps")
        length = _TINY if job.tiny else ("--steps", _FEW_STEPS)
        _distil(job, record, run, (*length, "--force"))
    names = ("tensorrt-rtx", "tensorrt-rtx:fp16") if job.is_cuda else ()
    for name in names:
        _dfadc(job, record, "export", str(run), "--export", name)
    report = _dfadc(job, record, "verify", str(run), "--data", str(FASHION_MNIST / "test_2000.npz"))
    for name, artifact in report.get("artifacts", {}).items():
        against_student = artifact.get("comparisons", {}).get("A", {}).get("all", {})
        record.row(
            "Artifacts",
            artifact=name,
            verdict=artifact["verdict"],
            **{"agreement with the student": against_student.get("agreement"), "accuracy": artifact.get("accuracy")},
            reasons="; ".join(artifact.get("reasons", [])),
        )
    seconds = "0.05" if job.tiny else "1"
    for name, network in _dfadc(job, record, "bench", str(run), "--seconds", seconds).get("networks", {}).items():
        record.row(
            "Speed",
            network=name,
            **{"latency, ms": network.get("latency_ms"), "p95, ms": network.get("latency_p95_ms")},
            **{"images/s": network.get("throughput"), "batch": network.get("batch")},
            device=network.get("device") or network.get("not_run"),
        )


def _distil(job: Job, record: Record, out: Path, options: tuple[str, ...]) -> dict[str, Any]:
    teacher = FASHION_MNIST / "teacher.safetensors"
    where = ("--out", str(out), "--device", str(job.device))
    exports = ("--export", "onnx", *(() if job.tiny else ("--export", "onnx:fp16")))
    return _dfadc(job, record, "distill", str(teacher), "--student", "compact_resnet_20", *options, *exports, *where)


def _dfadc(job: Job, record: Record, *arguments: str) -> dict[str, Any]:
    """Runs a command and gives what it prints as JSON.

    Raises:
        DfadcError: it printed none.
    """
    started = time.monotonic()
    done = _run("-m", "dfadc", *arguments, "--json", seconds=job.seconds_left - 2)
    shown = [argument.replace(f"{job.work}/", "").replace(f"{ROOT}/", "") for argument in arguments]
    record.row(
        "Commands",
        command=f"dfadc {' '.join(shown)}",
        **{"exit code": done.returncode, "wall, s": time.monotonic() - started},
        error=next((line for line in done.stderr.splitlines() if line.startswith("error:")), ""),
    )
    sys.stderr.write(done.stderr)
    try:
        printed: dict[str, Any] = json.loads(done.stdout)
    except ValueError as exc:
        ended = f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"
        raise DfadcError(f"dfadc {arguments[0]} printed no report:\n{ended}") from exc
    return printed


def _run(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1, seconds))  # noqa: S603
