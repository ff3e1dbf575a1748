"""Device kit of a run: typed ONNX files, samples and gates in one folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dfadc.pipeline.gates import gate_thresholds
from dfadc.pipeline.lineage import check_lineage
from dfadc.recipe.load import load_recipe
from exporters.kit.write import FOLDER, write_kit
from exporters.manifest import Manifest, check_record

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.run_folder import RunFolder
    from exporters.exporter import BatchProfile


def write_device_kit(run: RunFolder, manifest: Manifest, batch: BatchProfile) -> Path:
    """Writes ``artifacts/kit`` with every ONNX file of the manifest that TensorRT parses.

    Raises:
        DfadcError: an ONNX file was changed after its export, or belongs to another student than the samples.
        StorageFailed: the folder cannot be written.
    """
    records = [
        record for record in manifest.artifacts if record.exporter == "onnx" and record.preset in ("", "portable")
    ]
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
