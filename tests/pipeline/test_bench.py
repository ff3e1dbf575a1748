"""`dfadc bench`: every network that runs here is timed beside the teacher, and what does not run is named."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from command_line import command_process, finish_command, run_command

from dfadc.errors import DfadcError
from dfadc.pipeline.bench import BenchSettings, bench_run
from dfadc.pipeline.bench_notes import doubts, slower_in_int8
from dfadc.pipeline.export import export_student
from dfadc.run_folder import RunFolder
from exporters.benchmark import Timing, benchmark, spread_of, time_calls
from exporters.exporter import BatchProfile, BuildSettings, ExportRequest
from exporters.manifest import Manifest
from exporters.registry import get_exporter
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.session import BatchedSession

if TYPE_CHECKING:
    from pathlib import Path

EXPORTS = ("onnx:fp16", "openvino:fp16", "tensorrt-rtx:fp16")
QUICK = ("--seconds", 0.05, "--threads", 1, "--batch", 4)


class Sleeper(BatchedSession):
    """A session that takes 1 ms and 1 ms an image, or longer on a busy machine, and notes how long."""

    def __init__(self) -> None:
        super().__init__(batch_size=64)
        self.device = "clock"
        self.calls: dict[int, list[float]] = {}

    def _run_batch(self, images: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        time.sleep(1e-3 * (1 + len(images)))
        self.calls.setdefault(len(images), []).append(time.perf_counter() - started)
        return np.zeros((len(images), 2), np.float32)


@pytest.fixture(scope="module")
def run_with_engines(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("bench") / "run")
    shutil.copytree(finished_run.path, run.path)
    here = [e for e in EXPORTS if get_exporter(ExportRequest.parse(e).name).capability().can_build]
    engines = any(e.startswith("tensorrt") for e in here)
    export_student(run, here, settings=BuildSettings(batch=BatchProfile(1, 1, 8)) if engines else None)
    return run


@pytest.fixture(scope="module")
def measured(run_with_engines: RunFolder) -> dict[str, Any]:
    outcome = run_command("bench", run_with_engines.path, *QUICK, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_the_clock_is_read_rightly() -> None:
    session = Sleeper()
    timing = benchmark(session, np.zeros((8, 1, 2, 2), np.float32), seconds=0.1)
    assert 2.0 <= timing.latency_ms <= timing.latency_p95_ms
    assert timing.latency_ms == pytest.approx(1e3 * np.median(session.calls[1]), rel=0.5)
    assert timing.throughput <= 8 / 0.009
    assert timing.throughput == pytest.approx(8 / np.median(session.calls[8]), rel=0.5)
    assert timing.batch == 8
    assert timing.device == "clock"
    assert set(session.calls) == {1, 8}


def test_warm_up_is_not_counted() -> None:
    pauses = iter([0.05, 0.05, 0.05])
    durations = time_calls(lambda: time.sleep(next(pauses, 0.0)), 0.01)
    assert len(durations) >= 5
    assert max(durations) < 0.05


def test_an_answer_that_is_no_number_has_no_speed() -> None:
    class Broken(Sleeper):
        def _run_batch(self, images: np.ndarray) -> np.ndarray:
            return np.full((len(images), 2), np.nan, np.float32)

    with pytest.raises(DfadcError, match="NaN or infinity"):
        benchmark(Broken(), np.zeros((1, 1, 2, 2), np.float32), seconds=0.01)
    with pytest.raises(DfadcError, match="nothing to measure"):
        benchmark(Sleeper(), np.zeros((0, 1, 2, 2), np.float32), seconds=0.01)


def test_the_teacher_and_every_artifact_stand_side_by_side(
    measured: dict[str, Any], run_with_engines: RunFolder
) -> None:
    assert measured["schema"] == "dfadc.bench/1"
    assert measured["threads"] == 1
    assert measured["batch"] == 4
    networks = measured["networks"]
    artifacts = {record.file for record in Manifest.read(run_with_engines.path).artifacts}
    assert {f"artifacts/{name}" for name in networks if not name.startswith("teacher")} == artifacts
    assert networks["teacher"]["speedup"] == networks["teacher"]["throughput_ratio"] == 1.0
    found = networks["student.onnx"]
    assert found["not_run"] is None
    assert 0 < found["latency_ms"] <= found["latency_p95_ms"]
    assert found["speedup"] == pytest.approx(networks["teacher"]["latency_ms"] / found["latency_ms"])
    assert found["throughput_ratio"] == pytest.approx(found["throughput"] / networks["teacher"]["throughput"])


def test_the_speeds_are_kept_in_the_run_for_its_report(measured: dict[str, Any], run_with_engines: RunFolder) -> None:
    assert json.loads(run_with_engines.bench.read_text()) == measured
    hashes = {record.file: record.sha256 for record in Manifest.read(run_with_engines.path).artifacts}
    assert hashes["artifacts/student.onnx"] == measured["networks"]["student.onnx"]["sha256"]
    assert measured["networks"]["teacher"]["sha256"] is None
    outcome = run_command("report", run_with_engines.path)
    assert outcome.code == 0, outcome.err
    assert f"{measured['networks']['student.onnx']['latency_ms']:.2f} ms" in run_with_engines.report_html.read_text()


def test_every_network_gets_the_same_threads_batch_and_time(
    run_with_engines: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    timed: list[tuple[int, tuple[int, ...], float]] = []

    class Noting(IsolatedSession):
        def __init__(self, opener: Any, path: Path, **how: Any) -> None:
            opened.append(how)
            super().__init__(opener, path, **how)

        def benchmark(self, images: np.ndarray, *, seconds: float) -> Timing:
            timed.append((1, images.shape, seconds))
            return super().benchmark(images, seconds=seconds)

    def noting_benchmark(session: BatchedSession, images: np.ndarray, *, seconds: float) -> Timing:
        timed.append((torch.get_num_threads(), images.shape, seconds))
        return benchmark(session, images, seconds=seconds)

    monkeypatch.setattr("dfadc.pipeline.bench.IsolatedSession", Noting)
    monkeypatch.setattr("dfadc.pipeline.bench.benchmark", noting_benchmark)
    before = torch.get_num_threads()
    bench_run(run_with_engines, BenchSettings(batch=4, threads=before + 1, seconds=0.02))
    artifacts = Manifest.read(run_with_engines.path).artifacts
    assert opened == [{"threads": before + 1, "batch_size": 4}] * len(artifacts)
    assert timed[0][0] == before + 1  # the teacher is the first
    assert torch.get_num_threads() == before
    assert {timing[1:] for timing in timed} == {((4, 1, 8, 8), 0.02)}


def test_the_table_shows_what_was_measured(run_with_engines: RunFolder) -> None:
    outcome = run_command("bench", run_with_engines.path, *QUICK)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    measured = json.loads(run_with_engines.bench.read_text())["networks"]
    assert [row[0] for row in rows] == list(measured)
    for name, size, median, p95, speedup, throughput, ratio, device in rows:
        found = measured[name]
        assert size == ("–" if found["size_bytes"] is None else f"{found['size_bytes'] / 1e6:.2f} MB")
        if found["not_run"]:
            assert (median, p95, speedup, throughput, ratio, device) == ("NOT RUN", *"–––––")
            assert f"NOT RUN: {name}: {found['not_run']}" in outcome.out
            continue
        assert (median, p95) == (f"{found['latency_ms']:.2f} ms", f"{found['latency_p95_ms']:.2f} ms")
        assert (speedup, ratio) == (f"{found['speedup']:.2f}x", f"{found['throughput_ratio']:.2f}x")
        assert throughput == f"{found['throughput']:,.0f}"
        assert device == found["device"]


@pytest.mark.parametrize(
    ("threads", "told", "used", "source"),
    [
        (0, "3", 3, "OMP_NUM_THREADS"),
        (0, "4,2", 4, "OMP_NUM_THREADS"),
        (2, "3", 2, "--threads"),
        *((0, told, len(os.sched_getaffinity(0)), "CPU cores of this process") for told in ("", "0", "many", "-1")),
    ],
)
def test_the_number_of_threads_is_the_users(
    threads: int, told: str, used: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    settings = BenchSettings(threads=threads)
    assert (settings.num_threads, settings.threads_source) == (used, source)


def test_the_threads_are_stated(run_with_engines: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    target = run_with_engines.artifacts / "student.onnx"
    outcome = run_command("bench", target, "--seconds", 0.01, "--batch", 2)
    assert "3 threads each (from OMP_NUM_THREADS)" in outcome.out
    assert json.loads(run_command("bench", target, *QUICK, "--json").out)["threads_source"] == "--threads"


def timing(latency_ms: float = 1.0, *, throughput: float = 1000.0, calls: int = 100, spread: float = 0.0) -> Timing:
    return Timing(latency_ms, latency_ms, calls, throughput, 32, "CPU", spread)


def test_parts_of_a_measurement_are_compared() -> None:
    assert spread_of([1.0] * 50) == 0.0
    assert spread_of([1.0, 9.0, 1.0, 1.0] * 10) == 0.0  # bursts leave the medians alone
    assert spread_of([1.0] * 40 + [3.0] * 10) == 2.0
    assert spread_of([2.0, 2.0, 2.0, 2.0, 1.0]) == 1.0


def test_a_ratio_that_means_little_is_doubted() -> None:
    cores = os.cpu_count() or 1
    good = {"teacher": timing(), "student.onnx": timing()}
    assert list(doubts(good, threads=cores, load=0.3)) == []
    assert list(doubts(good, threads=cores, load=None)) == []
    assert list(doubts(good, threads=1, load=3.0 * cores)) == []  # one thread waits for no other
    (busy,) = doubts(good, threads=cores + 1, load=3.0 * cores)
    assert busy.startswith(f"the machine is busy: load average {3.0 * cores:.1f} on {cores} cores")
    (short,) = doubts({**good, "slow.onnx": timing(calls=5)}, threads=1, load=0.0)
    assert short == "too few calls for a ratio: slow.onnx (5 calls); measure longer: --seconds"
    (unsteady,) = doubts({**good, "jumps.onnx": timing(spread=0.5)}, threads=1, load=0.0)
    assert "jumps.onnx (1.5x)" in unsteady


def test_what_is_doubted_is_said_and_kept(run_with_engines: RunFolder) -> None:
    outcome = run_command("bench", run_with_engines.path, "--seconds", 0.001, "--threads", 1, "--batch", 512)
    notes = json.loads(run_with_engines.bench.read_text())["notes"]
    few = [name for name, found in networks_of(run_with_engines).items() if found.get("calls", 99) < 20]
    assert few
    assert any(note.startswith(f"too few calls for a ratio: {few[0]} (") for note in notes)
    assert all(f"note: {note}" in outcome.err for note in notes)


def networks_of(run: RunFolder) -> dict[str, dict[str, Any]]:
    networks: dict[str, dict[str, Any]] = json.loads(run.bench.read_text())["networks"]
    return networks


def test_int8_that_is_slower_is_said_in_words(run_with_engines: RunFolder) -> None:
    records = Manifest.read(run_with_engines.path).artifacts
    fp32 = next(record for record in records if record.file.endswith("/student.onnx"))
    int8 = replace(fp32, file="artifacts/student.int8.onnx", requested_precision="int8", effective_precision="int8")
    other = replace(int8, file="artifacts/student.int8.openvino.xml", exporter="openvino")
    both = (*records, int8, other)
    speeds = {"student.onnx": timing(2.0), "student.int8.openvino.xml": timing(9.0)}
    (slow,) = slower_in_int8(both, {**speeds, "student.int8.onnx": timing(5.0, throughput=400.0)})
    assert "student.int8.onnx takes 2.5 times as long for one image and 2.5 times as long for 32 images" in slow
    assert "as student.onnx" in slow
    (mixed,) = slower_in_int8(both, {**speeds, "student.int8.onnx": timing(3.0, throughput=4000.0)})
    assert "1.5 times as long for one image as student.onnx" in mixed
    assert list(slower_in_int8(both, {**speeds, "student.int8.onnx": timing(1.0, throughput=4000.0)})) == []
    assert list(slower_in_int8(both, {"student.int8.onnx": timing(5.0)})) == []


def test_an_engine_that_cannot_run_is_named_with_its_reason(
    measured: dict[str, Any], run_with_engines: RunFolder
) -> None:
    capability = get_exporter("tensorrt-rtx").capability()
    if not capability.can_build or capability.can_run:
        pytest.skip("needs tensorrt-rtx and no GPU")
    engine = measured["networks"]["student.fp16.rtx.engine"]
    assert "NVIDIA GPU" in engine["not_run"]
    assert engine["speedup"] is None
    assert "latency_ms" not in engine
    outcome = run_command("bench", run_with_engines.path, *QUICK)
    assert "NOT RUN: student.fp16.rtx.engine: " in outcome.out
    assert "1 thread each" in outcome.out
    alone = run_command("bench", run_with_engines.artifacts / "student.fp16.rtx.engine", *QUICK)
    assert alone.code == 4


def test_a_teacher_that_is_gone_is_not_run(run_with_engines: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(run_with_engines.path, run.path)
    run.update_record({"teacher": {**run.record()["teacher"], "path": str(tmp_path / "gone.pt")}})
    outcome = run_command("bench", run.path, *QUICK, "--json")
    assert outcome.code == 0, outcome.err
    networks = json.loads(outcome.out)["networks"]
    assert "gone.pt" in networks["teacher"]["not_run"]
    assert networks["student.onnx"]["speedup"] is None
    assert networks["student.onnx"]["latency_ms"] > 0


def test_one_artifact_is_measured_without_torch(run_with_engines: RunFolder) -> None:
    target = run_with_engines.artifacts / "student.fp16.onnx"
    with command_process(
        "bench", target, *QUICK, "--json", preamble="sys.modules['torch'] = None", imports_done=False
    ) as process:
        outcome = finish_command(process)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["networks"]["student.fp16.onnx"]["throughput"] > 0
