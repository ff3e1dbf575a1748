"""The results file as a Markdown table, and accuracy against time as a plot.

    python examples/benchmark/summary.py runs/benchmark.jsonl

prints a table for each task and budget and writes ``runs/benchmark.png``. The file may be of a grid that is still
running.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from methods import METHODS
from shares import PARTS
from tasks import TASKS

from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes

Line = dict[str, Any]

#: Okabe and Ito's colours, each with two line styles: one look a method, the same in every panel.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LOOKS = dict(zip(METHODS, [(c, s) for s in ("-", (0, (4, 1.5))) for c in COLOURS], strict=False))


def main(
    results: Annotated[Path, typer.Argument(help="What run.py wrote.")] = Path("runs/benchmark.jsonl"),
    *,
    plot: Annotated[Path | None, typer.Option(help="PNG to write; else beside the results.")] = None,
) -> None:
    """Prints the tables and writes the plot."""
    lines = read_results(results)
    if not lines:
        raise DfadcError(f"{results} holds no results", "python examples/benchmark/run.py makes some")
    groups = {key: list(group) for key, group in groupby(sorted(lines, key=_order), key=_title)}
    for title, group in groups.items():
        print("\n".join(["", f"### {title}", "", *table(group)]))
    print("\n" + "\n".join(machines(lines)))
    path = plot or results.with_suffix(".png")
    write_plot(path, groups)
    print(f"wrote {path}", file=sys.stderr)


def read_results(path: Path) -> list[Line]:
    """The lines of a results file; none where there is no file. What a crash cut short is left out."""
    lines: list[Line] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def table(lines: Sequence[Line]) -> list[str]:
    """Markdown of one task and budget: a row a method, mean ± standard deviation over the seeds."""
    heads = ("method", "seeds", "accuracy", "agreement", "steps", "images generated", "seconds", *PARTS, "peak memory")
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    refused: dict[str, list[str]] = {}
    for method, group in groupby(lines, key=lambda line: line["method"]):
        cells = list(group)
        done = [cell for cell in cells if cell["outcome"] == "done"]
        if done:
            rows.append(f"| {method} | {len(done)} | {' | '.join(_row(done))} |")
        for cell in cells:
            if cell["outcome"] != "done":
                refused.setdefault(cell["outcome"], []).append(f"{method} (seed {cell['seed']})")
    notes = [f"- {', '.join(methods)}: {outcome}" for outcome, methods in refused.items()]
    return rows + (["", "No result:", "", *notes] if notes else [])


def _row(cells: Sequence[Line]) -> list[str]:
    seconds = statistics.mean(cell["run_seconds"] for cell in cells)
    shares = {part: statistics.mean(cell["shares"].get(part, 0.0) for cell in cells) for part in PARTS}
    memory = [cell["memory_mebibytes"] for cell in cells if cell["memory_mebibytes"] is not None]
    return [
        _spread([100 * cell["accuracy"] for cell in cells]),
        _spread([100 * cell["agreement"] for cell in cells]),
        f"{statistics.mean(cell['steps'] for cell in cells):,.0f}",
        f"{statistics.mean(cell['images_generated'] for cell in cells):,.0f}",
        f"{seconds:.1f}",
        *(f"{seconds * shares[part]:.1f}" for part in PARTS),
        f"{statistics.mean(memory):,.0f} MiB" if memory else "–",
    ]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def machines(lines: Iterable[Line]) -> list[str]:
    """Origin of the results; more than one line where they were mixed."""
    found = {
        f"{line['device']}, {line['threads']} threads, {line['platform']}, torch {line['versions']['torch']}, "
        f"commit {line['git_commit'] or 'unknown'}"
        for line in lines
    }
    return [f"- {machine}" for machine in sorted(found)]


def write_plot(path: Path, groups: dict[str, list[Line]]) -> None:
    """Accuracy against time: a panel a task and budget, a line a method.

    Raises:
        StorageFailed: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and only this needs it

    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(6.5 * columns, 4 * rows + 0.8), layout="constrained")
    panels = [figure.add_subplot(rows, columns, number + 1) for number in range(len(groups))]
    for axes, (title, lines) in zip(panels, groups.items(), strict=True):
        _draw(axes, lines)
        axes.set_title(title.replace(" (", "\n("), loc="left", fontsize=9)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    axes.axhline(100 * lines[0]["teacher_accuracy"], color="#888888", linewidth=1, label="teacher")
    done = [line for line in lines if line["outcome"] == "done"]
    for method, group in groupby(done, key=lambda line: line["method"]):
        curves = [[*line["curve"], (line["run_seconds"], line["accuracy"])] for line in group]
        # The n-th looks of all seeds together; runs of very few steps are looked at less often.
        points = [[statistics.mean(axis) for axis in zip(*looks, strict=True)] for looks in zip(*curves, strict=False)]
        colour, style = LOOKS[method]
        seconds, accuracies = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else None
        percent = [100 * accuracy for accuracy in accuracies]
        axes.plot(seconds, percent, color=colour, linestyle=style, linewidth=1.5, marker=marker, label=method)
    axes.set_xlabel("seconds of distillation", fontsize=9)
    axes.set_ylabel("accuracy on real images (%)", fontsize=9)
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _order(line: Line) -> tuple[int, str, int, int]:
    tasks, methods = list(TASKS), list(METHODS)
    return tasks.index(line["task"]), _title(line), methods.index(line["method"]), line["seed"]


def _title(line: Line) -> str:
    teacher = f"teacher {100 * line['teacher_accuracy']:.2f}%, {line['num_test_images']:,} test images"
    return f"{line['task']}, {line['budget']} ({teacher}, student {line['student']})"


if __name__ == "__main__":
    run_as_script(main)
