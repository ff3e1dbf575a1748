"""`dfadc bench`: latency and throughput of each artifact that runs here, beside the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_json, print_line, say
from dfadc.cli.tables import print_table

if TYPE_CHECKING:
    from dfadc.pipeline.bench import Bench, BenchRow


def bench(
    target: Annotated[Path, typer.Argument(help="Run folder, or one artifact.")],
    batch: Annotated[int, typer.Option(min=1, help="Images per call of the throughput.")] = 32,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of every network; 0 takes OMP_NUM_THREADS, else all cores.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.001, help="Seconds for each latency and each throughput.")] = 2.0,
    trust_teacher: options.TrustTeacher = False,
    factory: options.Factory = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the teacher and every artifact of a run, or one artifact, on this machine."""
    from dfadc.pipeline.bench import BenchSettings, bench_file, bench_run  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.run_folder import open_run  # noqa: PLC0415

    settings = BenchSettings(
        batch=batch, threads=threads, seconds=seconds, trust_teacher=trust_teacher, factories=factory or ()
    )
    measured = bench_run(open_run(target), settings) if target.is_dir() else bench_file(target, settings)
    if as_json:
        print_json(measured.to_dict())
    else:
        _print(measured)
    for note in measured.notes:
        say(f"note: {note}")


def _print(measured: Bench) -> None:
    facts = measured.to_dict()
    columns = ("network", "size", "median", "p95", "speed-up", f"images/s at {facts['batch']}", "ratio", "device")
    print_table(columns, [_row(row) for row in measured.rows])
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    print_line(
        f"{facts['machine']}; {threads} each (from {facts['threads_source']}); speed-up and ratio against the teacher"
    )
    for row in measured.rows:
        if row.not_run:
            print_line(f"NOT RUN: {row.name}: {row.not_run}")


def _row(row: BenchRow) -> tuple[str, ...]:
    size = "–" if row.size_bytes is None else f"{row.size_bytes / 1e6:.2f} MB"
    if row.timing is None:
        return row.name, size, "NOT RUN", "–", "–", "–", "–", "–"
    return (
        row.name,
        size,
        f"{row.timing.latency_ms:.2f} ms",
        f"{row.timing.latency_p95_ms:.2f} ms",
        _times(row.speedup),
        f"{row.timing.throughput:,.0f}",
        _times(row.throughput_ratio),
        row.timing.device,
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"
