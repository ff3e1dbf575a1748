"""Table of exports: students of many families through every export, each judged against its student.

    python examples/targets/table.py                                   # 19 families at 32 px
    python examples/targets/table.py --family vit --family swin_t --size 64

Each family runs in its own process, so that a native crash while building is a cell of the table too. Every cell other
than PASS is explained below the table. A cell is broken if a runtime crashed, if an fp32 or fp16 artifact does not
pass, or if its process ended before it; the exit code is then 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from students import FAMILIES, TrainedStudent, read_digits, train_student

from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError, RequirementMissing, RuntimeCrashed, RuntimeRefused
from dfadc.pipeline.inference import VerificationInputs, run_artifact
from dfadc.reporting.markdown import table_lines
from dfadc.verification.agreement import ALL_SOURCES
from dfadc.verification.checks import Verdict
from dfadc.verification.judge import (
    ArtifactFile,
    ArtifactResult,
    artifact_failed,
    artifact_not_run,
    verify_artifact,
)
from dfadc.verification.thresholds import Thresholds
from exporters.exporter import KEEP_FP32_AUTO, BuildSettings, ExportRequest, Precision
from exporters.registry import get_exporter
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.ranges import measure_activations

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPORTS = ("onnx", "onnx:fp16", "onnx:int8", "onnx:int8:ort-cpu", "openvino:fp16", "openvino:int8", "tensorrt-rtx:fp16")
#: Digits for calibration; none of them is used for judging.
NUM_CALIBRATION = 256
#: The student is its own teacher here: only comparison A is meaningful.
THRESHOLDS = Thresholds(min_agreement=None, min_coverage=None, max_student_drop=None, source="digits")


class Cell(NamedTuple):
    """Result of one export of one family.

    Args:
        family: a key of ``FAMILIES``.
        export: one of the exports.
        text: verdict and agreement with the student, or "not built".
        why: the reason, for anything but PASS.
        is_broken: True if it is a fault.
    """

    family: str
    export: str
    text: str
    why: str = ""
    is_broken: bool = False


def main(
    family: Annotated[list[str] | None, typer.Option(help="Families; by default all.")] = None,
    *,
    export: Annotated[list[str] | None, typer.Option(help="Exports; by default all seven.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
    steps: Annotated[int, typer.Option(help="Training steps of 32 digits each.")] = 600,
    calibrator: Annotated[str, typer.Option(help="minmax, percentile, entropy or auto.")] = "auto",
    keep_fp32: Annotated[str, typer.Option(help="auto or none: layers of INT8 that stay in fp32.")] = KEEP_FP32_AUTO,
    out: Annotated[Path, typer.Option(help="File of the cells, a line of JSON each.")] = Path("runs/targets.jsonl"),
    in_process: Annotated[bool, typer.Option(help="Make the cells in this process, and no table.")] = False,
) -> None:
    """Prints the table; exits with 1 if a cell is broken."""
    families, exports = family or list(FAMILIES), export or list(EXPORTS)
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise DfadcError(f"unknown family {unknown[0]!r}", f"families: {', '.join(FAMILIES)}")
    if in_process:
        for name in families:
            for cell in make_cells(name, exports, size=size, steps=steps, calibrator=calibrator, keep_fp32=keep_fp32):
                add_cell(out, cell)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = ("--size", str(size), "--steps", str(steps), "--calibrator", calibrator, "--keep-fp32", keep_fp32)
    for name in families:
        _in_a_process(name, exports, out, (*settings, "--out", str(out)))
    chosen = {(name, wanted) for name in families for wanted in exports}
    found = [cell for cell in read_cells(out) if (cell.family, cell.export) in chosen]
    rows = [(name, *(cell.text for cell in found if cell.family == name)) for name in families]
    print("\n".join([f"{size} px, {steps} training steps", "", *table_lines(("family", *exports), rows)]))
    broken = [cell for cell in found if cell.is_broken]
    explained = [cell for cell in found if cell.why and not cell.is_broken]
    for title, listed in (("Broken", broken), ("Explained", explained)):
        if listed:
            print("\n".join(["", f"{title}:", "", *(f"- {cell.family} {cell.export}: {cell.why}" for cell in listed)]))
    if broken:
        raise typer.Exit(1)


def make_cells(
    family: str, exports: list[str], *, size: int, steps: int, calibrator: str, keep_fp32: str = KEEP_FP32_AUTO
) -> Iterator[Cell]:
    """Trains a student and makes, runs and judges its exports, one after the other."""
    digits = read_digits(size)
    student = train_student(family, digits, steps=steps)
    settings = BuildSettings(
        calibration=digits.training[:NUM_CALIBRATION],
        calibrator=calibrator,
        keep_fp32=(KEEP_FP32_AUTO,) if keep_fp32 == KEEP_FP32_AUTO else (),
    )
    with tempfile.TemporaryDirectory(prefix="dfadc-targets-") as folder:
        for export in exports:
            request = ExportRequest.parse(export)
            try:
                result = _make(request, Path(folder), student, family, settings)
            except DfadcError as exc:
                yield Cell(family, export, "not built", exc.message, is_broken=_must_pass(request))
                continue
            yield _cell(family, export, result, must_pass=_must_pass(request))


def _make(
    request: ExportRequest, folder: Path, student: TrainedStudent, family: str, settings: BuildSettings
) -> ArtifactResult:
    """Builds one artifact, its source first, and judges it."""
    path = folder / request.file_name
    if request.source is None:
        export_onnx(student.module, path, contract=student.samples.contract, metadata={"architecture": family})
    else:
        source = folder / request.source.file_name
        if not source.exists():
            _make(request.source, folder, student, family, settings)
        if request.precision is Precision.FP16:
            ranges = measure_activations(load_onnx(source), student.samples.batches(100))
            settings = replace(settings, fp16_ranges=ranges)
        get_exporter(request.name).export(source, path, request, settings)
    file = ArtifactFile(path.name, str(request.precision), path.stat().st_size)
    try:
        outputs = run_artifact(path, VerificationInputs(student.samples))
    except RequirementMissing as exc:
        return artifact_not_run(file, exc.message)
    except (RuntimeCrashed, RuntimeRefused) as exc:
        return artifact_failed(file, exc.message)
    return verify_artifact(file, outputs.outputs, samples=student.samples, thresholds=THRESHOLDS)


def _must_pass(request: ExportRequest) -> bool:
    """False for INT8, which may lose too much, and for engines, which may lack an operator; True for fp32 and fp16."""
    return request.precision is not Precision.INT8 and request.name != "tensorrt-rtx"


def _cell(family: str, export: str, result: ArtifactResult, *, must_pass: bool) -> Cell:
    found, judgement = result.export.get(ALL_SOURCES), result.judgement
    if found is None:
        broken = judgement.verdict is Verdict.FAIL or must_pass
        return Cell(family, export, str(judgement.verdict), "; ".join(judgement.reasons), is_broken=broken)
    why = "; ".join(check.message for check in judgement.checks if check.verdict is Verdict.FAIL)
    text = f"{Verdict.FAIL if why else Verdict.PASS} {found.agreement:.1%}"
    return Cell(family, export, text, why, is_broken=bool(why) and must_pass)


def read_cells(out: Path) -> list[Cell]:
    """The cells of a file, none where there is no such file."""
    return [Cell(*json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []


def add_cell(out: Path, cell: Cell) -> None:
    """Adds a cell to a file."""
    with out.open("a") as stream:
        stream.write(json.dumps(cell) + "\n")


def _in_a_process(family: str, exports: list[str], out: Path, settings: tuple[str, ...]) -> None:
    """Makes the missing cells of one family; those that its process did not come to are broken."""
    wanted = [
        each for each in exports if (family, each) not in {(cell.family, cell.export) for cell in read_cells(out)}
    ]
    if not wanted:
        return
    options = [part for export in wanted for part in ("--export", export)]
    command = [sys.executable, __file__, "--family", family, *options, *settings, "--in-process"]
    done = subprocess.run(command, stdout=sys.stderr, check=False)  # noqa: S603 - this program
    made = {cell.export for cell in read_cells(out) if cell.family == family}
    print(f"{family}: {len(made.intersection(exports))} of {len(exports)} exports", file=sys.stderr)
    for export in wanted:
        if export not in made:
            add_cell(out, Cell(family, export, "crashed", f"its process ended with {done.returncode}", is_broken=True))


if __name__ == "__main__":
    run_as_script(main)
