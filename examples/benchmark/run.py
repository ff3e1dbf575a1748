"""Runs a grid of methods, tasks and seeds, one process a cell, and appends every result to a JSON-lines file.

    OMP_NUM_THREADS=2 python examples/benchmark/run.py --out runs/benchmark.jsonl --task digits --task colour

A cell that the file holds is not run again: the same command goes on where it was stopped, and a longer one adds what
is missing. ``summary.py`` makes the table and the plot.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer
from cell import Cell, run_cell
from measure import Budget
from methods import METHODS
from summary import read_results
from tasks import TASKS

from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError, StorageFailed


def main(
    *,
    out: Annotated[Path, typer.Option(help="Results file, appended to.")] = Path("runs/benchmark.jsonl"),
    task: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TASKS)}; all by default.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of every method.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Budget of a cell.")] = 90.0,
    images: Annotated[int | None, typer.Option(min=1, help="Budget in images updated on, instead.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of Fashion-MNIST's idx files; else downloads.")] = None,
) -> None:
    """Runs what the results file lacks."""
    tasks, methods = _choose(task, TASKS, "task"), _choose(method, METHODS, "method")
    budget = Budget(seconds, images)
    # Seeds outermost: a grid that is stopped early has something of every method.
    cells = [Cell(t, m, seed, budget) for seed in range(seeds) for t in tasks for m in methods]
    known = [{name: line[name] for name in cells[0].key()} for line in read_results(out)]
    missing = [cell for cell in cells if cell.key() not in known]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them in {out}", flush=True)
    for number, cell in enumerate(missing, start=1):
        line = _run_apart(cell, data)
        append_result(out, line)
        said = line["outcome"] if line["outcome"] != "done" else f"accuracy {line['accuracy']:.2%}"
        print(f"{number}/{len(missing)} {cell.task}, {cell.method}, seed {cell.seed}: {said}", flush=True)


def append_result(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to the results file.

    Raises:
        StorageFailed: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            stream.seek(max(0, stream.tell() - 1))
            cut_short = stream.read() not in (b"", b"\n")
            stream.write((b"\n" if cut_short else b"") + json.dumps(line).encode() + b"\n")
    except OSError as exc:
        raise StorageFailed(f"cannot write {path}: {exc.strerror or exc}", "choose a writable --out") from exc


def _run_apart(cell: Cell, data: Path | None) -> dict[str, Any]:
    """A process for each cell: its memory is its own, and nothing of one reaches another."""
    with ProcessPoolExecutor(1, mp_context=_context()) as executor:
        try:
            return executor.submit(run_cell, cell, data).result()
        except BrokenProcessPool as exc:
            raise DfadcError(
                f"the process of {cell.task}, {cell.method}, seed {cell.seed} was killed", "is there enough memory?"
            ) from exc


def _context() -> multiprocessing.context.BaseContext:
    """Processes are forked off one that has imported everything and computed nothing; on Windows they start anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dfadc.training.run", "sklearn.datasets"])
    return context


def _choose(wanted: list[str] | None, known: dict[str, Any], kind: str) -> list[str]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise DfadcError(f"unknown {kind} {unknown[0]!r}", f"known: {', '.join(known)}")
    return list(dict.fromkeys(wanted or known))


if __name__ == "__main__":
    run_as_script(main)
