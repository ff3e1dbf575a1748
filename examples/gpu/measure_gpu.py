"""Measures dfadc on a CUDA GPU, offline, within a budget of minutes: tests, speed, accuracy, memory, engines.

    python examples/gpu/measure_gpu.py --minutes 8 --out runs/gpu

Writes ``gpu.json`` and ``gpu.md`` after every stage, so that a run that is cut short keeps what it has. Each stage is a
process of its own with a limit, at which it is ended with its children; what it had measured by then counts. A stage
that fails is reported with the end of its output and does not stop the others. From a source tree that is not
installed, set PYTHONPATH to its root.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torchvision
import typer
from commands import distil, run_gpu_tests, use_engines
from loops import compare_loops
from record import Job, Record, read_record, to_markdown
from steps import step_at_224, step_of_auto

from dfadc import __version__
from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError
from dfadc.provenance import environment

if TYPE_CHECKING:
    from collections.abc import Callable

#: Lines of a failed stage's output that are kept.
_ERROR_LINES = 40
#: Tracebacks without frames around them.
_PLAIN_ERRORS = {"TYPER_STANDARD_TRACEBACK": "1", "_TYPER_STANDARD_TRACEBACK": "1"}
#: A CPU may be busy with other things: limits are that much longer where the program is tried out.
_TINY_FACTOR = 5
#: Seconds that are kept for the last stages to end.
_RESERVE_SECONDS = 3


class Stage(NamedTuple):
    """A part of the measurement.

    Args:
        run: measures.
        limit: seconds after which it is ended.
    """

    run: Callable[[Job, Record], None]
    limit: float


def describe(job: Job, record: Record) -> None:
    """GPU, driver, releases and commit."""
    facts = environment()
    if job.is_cuda:
        record.fact("GPU", torch.cuda.get_device_name(job.device))
        record.fact("memory, GB", torch.cuda.get_device_properties(job.device).total_memory / 1e9)
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)  # noqa: S603
        record.fact("driver, power limit", shown.stdout.strip())
    record.fact("torch", torch.__version__)
    record.fact("torchvision", torchvision.__version__)
    record.fact("CUDA of torch", torch.version.cuda)
    record.fact("cuDNN", torch.backends.cudnn.version())
    record.fact("CPU cores", os.cpu_count())
    record.fact("Python", platform.python_version())
    record.fact("dfadc", __version__)
    record.fact("commit", job.commit or facts["git_commit"])
    for name, version in facts["versions"].items():
        if name not in ("dfadc", "torch", "torchvision"):
            record.fact(name, version)


#: In the order of their worth; the last takes what is left.
STAGES = {
    "environment": Stage(describe, 30),
    "GPU tests": Stage(run_gpu_tests, 150),
    "auto, 1 minute": Stage(partial(distil, minutes=1), 120),
    "step of auto": Stage(step_of_auto, 45),
    "step at 224 px": Stage(step_at_224, 90),
    "the paper's loop": Stage(compare_loops, 120),
    "TensorRT-RTX": Stage(partial(use_engines, minutes=1), 130),
    "auto, 3 minutes": Stage(partial(distil, minutes=3), 270),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.md and the log.")] = Path("runs/gpu"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes after which the program ends.")] = 8,
    *,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program out.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Smallest sizes; the figures mean nothing.")] = False,
    commit: Annotated[str, typer.Option(help="Commit to record, where there is no checkout.")] = "",
    only: Annotated[list[str] | None, typer.Option(help=f"Stage (repeatable): {', '.join(STAGES)}.")] = None,
    order: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure dfadc on a GPU."""
    if order is not None:
        _run_here(json.loads(order.read_text()))
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise DfadcError("torch sees no CUDA GPU", "--device cpu --tiny tries the program out")
    if unknown := [name for name in only or () if name not in STAGES]:
        raise DfadcError(f"there is no stage {unknown[0]!r}", f"stages: {', '.join(STAGES)}")
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes - _RESERVE_SECONDS
    results: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "tiny": tiny, "stages": {}}
    with tempfile.TemporaryDirectory() as work:
        for name, stage in STAGES.items():
            if only and name not in only:
                continue
            limit = min(stage.limit * (_TINY_FACTOR if tiny else 1), ends - time.monotonic())
            settings = {"stage": name, "device": device, "tiny": tiny, "work": work, "commit": commit, "seconds": limit}
            results["stages"][name] = _run_apart(settings, out / "gpu.log")
            print(f"{name}: {results['stages'][name]['outcome']}", flush=True)
            (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (out / "gpu.md").write_text(to_markdown(results))


def _run_apart(settings: dict[str, Any], log: Path) -> dict[str, Any]:
    """Runs a stage in a process of its own, which is ended with its children when its time is up."""
    limit, started = settings["seconds"], time.monotonic()
    if limit <= 0:
        return {"outcome": "NOT RUN: no time was left", "seconds": 0.0, "limit": 0.0}
    work = Path(settings["work"])
    facts, order, output = work / "facts.json", work / "order.json", work / "output.txt"
    facts.unlink(missing_ok=True)
    order.write_text(json.dumps({**settings, "facts": str(facts), "started": started}))
    command = [sys.executable, __file__, "--order", str(order)]
    with output.open("w") as stream:
        process = subprocess.Popen(  # noqa: S603 -- this file
            command, stdout=stream, stderr=subprocess.STDOUT, process_group=0, env={**os.environ, **_PLAIN_ERRORS}
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    printed = output.read_text(errors="replace")
    with log.open("a") as stream:
        stream.write(f"==== {settings['stage']}\n{printed}\n")
    failed = f"FAILED: exit code {code}" if code is not None else "ENDED at its limit"
    outcome = {"outcome": "done" if code == 0 else failed, "seconds": time.monotonic() - started, "limit": limit}
    error = [] if code == 0 else printed.splitlines()[-_ERROR_LINES:]
    return {**outcome, **read_record(facts), "error": error}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage and the programs that it started."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _run_here(settings: dict[str, Any]) -> None:
    job = Job(
        device=torch.device(settings["device"]),
        tiny=settings["tiny"],
        seconds=settings["seconds"],
        work=Path(settings["work"]),
        commit=settings["commit"],
        started=settings["started"],
    )
    STAGES[settings["stage"]].run(job, Record(Path(settings["facts"])))


if __name__ == "__main__":
    run_as_script(main)
