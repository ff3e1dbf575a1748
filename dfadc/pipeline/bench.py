"""Bench stage: speed of the teacher and of every artifact on this machine, with the same number of threads."""

from __future__ import annotations

import json
import os
import platform
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, RequirementMissing, RuntimeCrashed, RuntimeRefused, StorageFailed, memory_errors
from dfadc.pipeline.bench_notes import doubts, load_average, slower_in_int8
from dfadc.pipeline.lineage import check_lineage
from dfadc.run_lock import holding_writable_run, is_writable
from dfadc.storage import write_json
from exporters.benchmark import Timing, benchmark
from exporters.describe import artifact_metadata
from exporters.manifest import check_unchanged
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.open import open_session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dfadc.run_folder import RunFolder

SCHEMA = "dfadc.bench/1"
TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Settings of a benchmark.

    Args:
        batch: images per call of the throughput.
        threads: CPU threads of every network; 0 takes OMP_NUM_THREADS, else all cores of this process.
        seconds: for each latency and each throughput.
        factories: the teacher's ``module:factory``, where one has to be imported.
    """

    batch: int = 32
    threads: int = 0
    seconds: float = 2.0
    trust_teacher: bool = False
    factories: Sequence[str] = ()

    @property
    def num_threads(self) -> int:
        """The resolved number of threads, never 0."""
        return self._resolved[0]

    @property
    def threads_source(self) -> str:
        """Source of the number of threads: "--threads", "OMP_NUM_THREADS" or "CPU cores of this process"."""
        return self._resolved[1]

    @property
    def _resolved(self) -> tuple[int, str]:
        if self.threads:
            return self.threads, "--threads"
        # A list is for nested regions of OpenMP: the first number is that of the outermost.
        variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        if variable.isdecimal() and int(variable):
            return int(variable), "OMP_NUM_THREADS"
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return allowed or 1, "CPU cores of this process"


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One network: its speed, or the reason why it was not run.

    Args:
        name: "teacher", or the artifact's file name.
        size_bytes: of all files that a device needs to run it; None for the teacher.
        reference: the teacher's speed on the same kind of device; None if it was not measured.
        sha256: of the artifact in the run's manifest; None for the teacher, and outside a run.
    """

    name: str
    size_bytes: int | None
    timing: Timing | None = None
    not_run: str = ""
    reference: Timing | None = None
    sha256: str | None = None

    @property
    def speedup(self) -> float | None:
        """The teacher's median latency over this one's."""
        if self.timing is None or self.reference is None:
            return None
        return self.reference.latency_ms / self.timing.latency_ms

    @property
    def throughput_ratio(self) -> float | None:
        """This throughput over the teacher's."""
        if self.timing is None or self.reference is None:
            return None
        return self.timing.throughput / self.reference.throughput

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        measured = {} if self.timing is None else asdict(self.timing)
        ratios = {"speedup": self.speedup, "throughput_ratio": self.throughput_ratio}
        artifact = {"size_bytes": self.size_bytes, "sha256": self.sha256, "not_run": self.not_run or None}
        return {**artifact, **measured, **ratios}


@dataclass(frozen=True, slots=True)
class Bench:
    """Speed of every network, one after the other: the teacher in this process, each artifact in its own."""

    settings: BenchSettings
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": SCHEMA,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
            "threads": self.settings.num_threads,
            "threads_source": self.settings.threads_source,
            "batch": self.settings.batch,
            "seconds": self.settings.seconds,
            "networks": {row.name: row.to_dict() for row in self.rows},
            "notes": list(self.notes),
        }


_NEED_LESS_MEMORY = memory_errors("lower --batch")


@_NEED_LESS_MEMORY
@holding_writable_run
def bench_run(run: RunFolder, settings: BenchSettings | None = None) -> Bench:
    """Measures the teacher (torch) and every artifact of a run; an artifact that cannot run here is NOT RUN.

    The speeds are also written to ``bench.json`` in the run folder, for the report; if that fails, a note says so.

    Raises:
        DfadcError: an artifact's bytes are not those that were exported, or it is of another student than the samples.
    """
    settings, load = settings or BenchSettings(), load_average()
    manifest = check_unchanged(run.path)
    check_lineage(run, manifest)
    images = _images(run.contract(), settings)
    teachers = _bench_teacher(run, images, settings)
    rows = list(teachers)
    for record in manifest.artifacts:
        path = run.path / record.file
        # An engine runs on a GPU: beside the teacher on a CPU its ratio would flatter it.
        reference = teachers[-1 if path.suffix == ".engine" else 0].timing
        try:
            timing = _bench_file(path, images, settings)
        except (RequirementMissing, RuntimeRefused, RuntimeCrashed) as exc:
            rows.append(BenchRow(path.name, record.size_bytes, not_run=exc.message, sha256=record.sha256))
        else:
            rows.append(BenchRow(path.name, record.size_bytes, timing, reference=reference, sha256=record.sha256))
    timings = {row.name: row.timing for row in rows if row.timing is not None}
    notes = doubts(timings, threads=settings.num_threads, load=load)
    measured = Bench(settings, tuple(rows), (*notes, *slower_in_int8(manifest.artifacts, timings)))
    try:
        if not is_writable(run.path):
            raise StorageFailed(f"{run.path} is not writable here")
        write_json(run.bench, measured.to_dict())
    except StorageFailed as exc:
        return replace(measured, notes=(*measured.notes, f"{run.bench.name} not written: {exc.message}"))
    return measured


@_NEED_LESS_MEMORY
def bench_file(artifact: Path, settings: BenchSettings | None = None) -> Bench:
    """Measures one artifact without a run and a teacher; imports no torch.

    Raises:
        DfadcError: the artifact is damaged, or does not record its image contract.
        RequirementMissing, RuntimeRefused: it cannot run here.
        RuntimeCrashed: its runtime ended the process that ran it.
    """
    settings, load = settings or BenchSettings(), load_average()
    contract = artifact_metadata(artifact).get("dfadc.contract")
    if contract is None:
        raise DfadcError(f"{artifact} does not record its image contract", "is it an artifact of `dfadc export`?")
    images = _images(ImageContract.from_dict(json.loads(contract)), settings)
    timing = _bench_file(artifact, images, settings)
    notes = doubts({artifact.name: timing}, threads=settings.num_threads, load=load)
    return Bench(settings, (BenchRow(artifact.name, artifact.stat().st_size, timing),), tuple(notes))


def _images(contract: ImageContract, settings: BenchSettings) -> NDArray[np.float32]:
    """Noise in [0, 1]: speed does not depend on the images."""
    shape = (settings.batch, *contract.input_size)
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def _bench_file(path: Path, images: NDArray[np.float32], settings: BenchSettings) -> Timing:
    options = {"threads": settings.num_threads, "batch_size": settings.batch}
    with IsolatedSession(open_session, path, **options) as session:
        return session.benchmark(images, seconds=settings.seconds)


def _bench_teacher(run: RunFolder, images: NDArray[np.float32], settings: BenchSettings) -> tuple[BenchRow, ...]:
    """Rows of the teacher on the CPU and, if torch sees one, on the GPU."""
    import torch  # noqa: PLC0415 - artifacts need none

    from dfadc.networks.logits import answering_pixels  # noqa: PLC0415
    from dfadc.pipeline.distill import load_run_teacher  # noqa: PLC0415
    from exporters.sessions.torch_session import TorchSession  # noqa: PLC0415

    try:
        teacher = load_run_teacher(run, trust=settings.trust_teacher, factories=settings.factories)
    except DfadcError as exc:
        return (BenchRow(TEACHER, None, not_run=f"{exc.message} ({exc.hint})" if exc.hint else exc.message),)
    network, rows = answering_pixels(teacher.module, teacher.contract).eval(), []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with TorchSession(network, device, batch_size=settings.batch) as session, ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.num_threads)
            timing = benchmark(session, images, seconds=settings.seconds)
        name = TEACHER if device == "cpu" else f"{TEACHER} ({device})"
        rows.append(BenchRow(name, None, timing, reference=timing))
    return tuple(rows)
