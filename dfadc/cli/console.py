"""Output for people: tables on stdout, everything else on stderr, a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from dfadc.cli.streams import result_stream
from dfadc.cli.tables import print_table

if TYPE_CHECKING:
    from rich.progress import Progress

    from dfadc.pipeline.distill import Observer
    from dfadc.training.callbacks import Reading
    from dfadc.training.plan import Plan
    from exporters.exporter import ProgressCallback

#: Seconds between progress lines if stderr is not a terminal.
PLAIN_INTERVAL = 10.0
#: Columns that a terminal needs for a progress bar beside a reading.
_WIDE = 130


def say(message: str, *, quiet: bool = False) -> None:
    """One line on stderr."""
    if not quiet:
        typer.echo(message, file=sys.stderr)


def print_line(text: str) -> None:
    """One line on stdout."""
    typer.echo(text, file=result_stream())


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print_line(json.dumps(value, indent=2, allow_nan=False))


def print_report(report: Mapping[str, Any], *, as_json: bool, verbose: bool) -> None:
    """Prints a verification report: JSON, or a summary table and the reasons of every verdict that is not PASS."""
    from dfadc.verification import summary  # noqa: PLC0415 -- keeps `--help` light

    if as_json:
        print_json(report)
        return
    if networks := summary.network_rows(report):
        print_table(summary.NETWORK_COLUMNS, networks)
    print_table(summary.COLUMNS, summary.summary_rows(report))
    columns, details = summary.detail_table(report)
    if details:
        print_table(columns, details)
    if verbose:
        print_table(summary.SOURCE_COLUMNS, summary.source_rows(report))
    if compared := [row for row in summary.baseline_rows(report) if verbose or row[1] in summary.JUDGED]:
        print_table(summary.BASELINE_COLUMNS, compared)
    for line in summary.reason_lines(report):
        print_line(line)
    for note in report.get("notes", ()):
        say(f"note: {note}")
    print_line(f"verdict: {summary.headline(report)}")


def plan_lines(plan: Plan) -> Iterator[str]:
    """Lines on the plan and the estimated cost of a run."""
    recipe, cost = plan.recipe, plan.estimate
    yield (
        f"plan: recipe {recipe.name}, {recipe.steps:,} steps of {recipe.student_updates} student and "
        f"{recipe.generator.steps} generator updates on {recipe.batch_size} images: {plan.images:,} images"
    )
    compiled = "compiled" if cost.compiled else "not compiled"
    yield f"      {plan.device}, {plan.precision}; {compiled}: {cost.compile_reason}"
    if recipe.compute.micro_batch:
        yield f"      gradients add up over micro-batches of {recipe.compute.micro_batch} images"
    yield "      parameters: " + ", ".join(f"{role} {number:,}" for role, number in plan.parameters.items())
    arithmetic = ""
    if plan.flops_per_step is not None:
        rate = plan.flops_per_step / cost.seconds_per_step
        arithmetic = f" of {_flops(plan.flops_per_step)}FLOPs: {_flops(rate)}FLOP/s"
    yield f"      about {_duration(plan.seconds)} at {cost.seconds_per_step:.3f} s a step{arithmetic}"
    peak = f"; {cost.peak_bytes / 2**20:,.0f} MiB at most, all together" if cost.peak_bytes else ""
    yield f"      {cost.memory_bytes / 2**20:,.0f} MiB of memory for networks, replay and activations{peak}"
    yield from (f"note: {note}" for note in plan.notes)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    names = ("device", "precision", "images", "seconds", "parameters", "flops_per_step")
    values = {name: getattr(plan, name) for name in names}
    recipe = plan.recipe.model_dump(mode="json")
    return {**values, "estimate": asdict(plan.estimate), "notes": list(plan.notes), "recipe": recipe}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{seconds / 3600:,.1f} h"


def _flops(number: float) -> str:
    """A number of three digits and the prefix of its thousands: 1.23e10 is "12.3 G"."""
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"


@contextmanager
def terminal_observer(*, quiet: bool) -> Iterator[Observer]:
    """Shows plan and progress on stderr during a run."""
    from dfadc.pipeline.distill import Observer  # noqa: PLC0415 -- keeps `--help` light

    def show_plan(plan: Plan) -> None:
        say("\n".join(plan_lines(plan)))

    if quiet:
        yield Observer()
    elif sys.stderr.isatty():
        with _progress_bar() as show_reading:
            yield Observer(on_plan=show_plan, on_reading=show_reading, on_note=say)
    else:
        yield Observer(on_plan=show_plan, on_reading=_Plain(0.0).reading, on_note=say)


def reading_line(reading: Reading) -> str:
    """A reading in one line."""
    minutes, seconds = divmod(round(reading.seconds_left), 60)
    agreement = reading.collapse or f"agreement {reading.agreement:6.1%}"
    return (
        f"loss {reading.student_loss:.3f}  class entropy {reading.class_entropy:.2f}  "
        f"{agreement}  {reading.images_per_second:,.0f} images/s  {minutes}:{seconds:02d} left"
    )


@contextmanager
def build_progress(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Progress of a build on stderr: a bar on a terminal, else a line every few seconds; nothing if quiet.

    Ctrl-C cancels the build.
    """
    if quiet:
        yield lambda *_: None
        return
    if not sys.stderr.isatty():
        yield _Plain(PLAIN_INTERVAL).build
        return
    with _progress("building", "{task.description}", transient=True) as progress:
        task = progress.add_task("", total=None, visible=False)

        def show(phase: str, done: int, steps: int) -> None:
            progress.update(task, description=escape(phase), completed=done, total=steps or None, visible=True)

        yield show


class _Plain:
    """Prints a line every few seconds where there is no terminal, the first after ``delay`` seconds."""

    def __init__(self, delay: float) -> None:
        self._next = time.monotonic() + delay

    def build(self, phase: str, done: int, steps: int) -> None:
        """A phase of a build."""
        self._say(f"building: {phase} {done}/{steps}" if steps else f"building: {phase}")

    def reading(self, reading: Reading) -> None:
        """A reading of a training, the last in any case, and every note."""
        if reading.note:
            say(f"step {reading.step}: {reading.note}")
        line = f"step {reading.step}/{reading.steps}  {reading_line(reading)}"
        self._say(line, at_once=reading.step == reading.steps)

    def _say(self, line: str, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_INTERVAL
            say(line)


@contextmanager
def _progress_bar() -> Iterator[Any]:
    with _progress("distilling", "{task.fields[line]}") as progress:
        task = progress.add_task("distilling", total=None, line="")

        def show(reading: Reading) -> None:
            if reading.note:
                progress.console.print(f"step {reading.step}: {reading.note}", markup=False)
            progress.update(task, total=reading.steps, completed=reading.step, line=reading_line(reading))

        yield show


def _progress(doing: str, line: str, *, transient: bool = False) -> Progress:
    """A bar, a count and a line of text; on a narrow terminal no bar, and the line wraps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn  # noqa: PLC0415
    from rich.table import Column  # noqa: PLC0415

    console = Console(stderr=True)
    wide: list[ProgressColumn] = [TextColumn(doing), BarColumn(bar_width=24)] if console.width >= _WIDE else []
    text = TextColumn(line, table_column=Column(overflow="fold"))
    return Progress(*wide, MofNCompleteColumn(), text, console=console, transient=transient)
