"""`dfadc export`: more artifacts from a finished run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfadc.cli import options
from dfadc.cli.console import build_progress, print_json, say
from dfadc.cli.tables import print_table
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.pipeline.export_plan import Skipped
    from dfadc.run_folder import RunFolder
    from exporters.exporter import BuildSettings, ExportResult

_ENGINES = "Engines"


def export(  # noqa: PLR0913, PLR0917 -- the signature is the command line
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    exports: options.Exports = None,
    embed_normalisation: Annotated[
        bool, typer.Option("--embed-normalisation", help="Artifacts take pixels in [0, 1] and normalise them.")
    ] = False,
    embed_softmax: Annotated[bool, typer.Option("--embed-softmax", help="Artifacts return probabilities.")] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Artifacts of a segmentation student take images of any size.")
    ] = False,
    keep_fp32: options.KeepFp32 = None,
    gpu: Annotated[
        str | None, typer.Option(help="Target GPUs of tensorrt-rtx, e.g. sm86,sm89.", rich_help_panel=_ENGINES)
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes of an engine: LOWEST,OPTIMUM,HIGHEST or HIGHEST.", rich_help_panel=_ENGINES),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Memory limit of a TensorRT tactic in MiB.", rich_help_panel=_ENGINES)
    ] = None,
    factory: options.Factory = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Export the finished student of RUN."""
    from dfadc.run_folder import open_run  # noqa: PLC0415 -- keeps `--help` light
    from exporters.exporter import BatchProfile, BuildSettings  # noqa: PLC0415

    settings = BuildSettings(
        batch=BatchProfile() if batch is None else BatchProfile(*options.parse_batch(batch)),
        gpus=() if gpu is None else tuple(dict.fromkeys(name.strip().lower() for name in gpu.split(","))),
        workspace_bytes=None if workspace is None else workspace * 2**20,
        keep_fp32=options.nodes_in_fp32(keep_fp32),
    )
    form = {
        "embed_normalisation": embed_normalisation,
        "embed_softmax": embed_softmax,
        "dynamic_size": dynamic_size,
    }
    results, error = run_exports(
        open_run(run), exports, settings=settings, form=form, factories=factory or (), quiet=quiet
    )
    rows = [(r.path.name, r.effective_precision, f"{r.size_bytes / 1e6:.2f} MB", r.sha256[:12]) for r in results]
    if as_json and (rows or error is None):
        print_json({result.path.name: _facts(result) for result in results})
    elif rows:  # a kit may be the only export
        print_table(("artifact", "precision", "size", "sha256"), rows)
    if error is not None:
        raise error


def run_exports(
    run: RunFolder,
    exports: list[str] | None,
    *,
    settings: BuildSettings,
    form: Mapping[str, bool] | None = None,
    factories: Collection[str] = (),
    quiet: bool = False,
) -> tuple[list[ExportResult], DfadcError | None]:
    """Exports and reports on stderr; ``form`` holds the options for inputs and outputs of the artifacts.

    Returns:
        The artifacts that were made, and the error that names the failed ones.
    """
    from dfadc.pipeline.export import ExportObserver, export_student  # noqa: PLC0415 -- keeps `--help` light

    reported: set[str] = set()
    results: list[ExportResult] = []

    def say_result(result: ExportResult) -> None:
        results.append(result)
        targets = f", for {', '.join(result.targets)}" if result.targets else ""
        facts = f"{result.size_bytes / 1e6:.2f} MB, {result.effective_precision}{targets}"
        say(f"exported {result.path} ({facts})", quiet=quiet)
        for note in result.notes:
            if note not in reported:  # several artifacts share the student's fp16 headroom
                say(f"  {note}", quiet=quiet)
        reported.update(result.notes)

    def say_skipped(skipped: Skipped) -> None:
        hint = f" ({skipped.hint})" if skipped.hint else ""
        say(f"not exported: {skipped.export}: {skipped.reason}{hint}", quiet=quiet)

    def say_kit(folder: Path) -> None:
        say(f"device kit {folder}: carry it to the device and run ./build.sh and check.py there", quiet=quiet)

    try:
        with build_progress(quiet=quiet) as on_progress:
            export_student(
                run,
                exports,
                **(form or {}),
                factories=factories,
                settings=replace(settings, on_progress=on_progress),
                observer=ExportObserver(on_result=say_result, on_skipped=say_skipped, on_kit=say_kit),
            )
    except DfadcError as exc:
        return results, exc
    return results, None


def _facts(result: ExportResult) -> dict[str, object]:
    """An artifact as plain JSON values."""
    return {
        "sha256": result.sha256,
        "size_bytes": result.size_bytes,
        "precision": result.effective_precision,
        "targets": list(result.targets),
        "notes": list(result.notes),
    }
