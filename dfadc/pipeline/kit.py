"""The device kit of a run: its typed ONNX files, its samples and its gates in one folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dfadc.pipeline.gates import gate_thresholds
from dfadc.pipeline.provenance import check_lineage
from dfadc.recipe.load import load_recipe
from exporters.kit.write import FOLDER, write_kit
from exporters.manifest import Manifest, check_record

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.run_folder import RunFolder
    from exporters.exporter import BatchProfile


def write_device_kit(run: RunFolder, manifest: Manifest, batch: BatchProfile) -> Path:
    """Writes ``artifacts/kit`` with every ONNX of the manifest that TensorRT parses.

    Raises:
        DfadcError: an ONNX is not the one that was exported, or is of another student than the samples.
        StorageFailed: the folder cannot be written.
    """
    records = [known for known in manifest.artifacts if known.exporter == "onnx" and known.preset in ("", "portable")]
    for record in records:
        check_record(record, run.path)
    check_lineage(run, Manifest(tuple(records)))
    return write_kit(
        run.artifacts / FOLDER,
        [run.path / record.file for record in records],
        run.samples,
        thresholds=asdict(gate_thresholds(load_recipe(run.recipe))),
        batch=batch,
    )
