"""The same student gives the same bytes in fp16 and INT8, in another process too; fp32: see its exporter's tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np

from dfadc.verification.samples import SampleSet
from exporters.exporter import BuildSettings, ExportRequest
from exporters.to_onnx.exporter import DerivedOnnxExporter

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.run_folder import RunFolder

TYPED = ("onnx:fp16", "onnx:int8", "onnx:int8:ort-cpu")
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from exporters.exporter import BuildSettings, ExportRequest
from exporters.registry import get_exporter

source, folder, images, *texts = sys.argv[1:]
settings = BuildSettings(calibration=np.load(images))
for request in map(ExportRequest.parse, texts):
    print(get_exporter("onnx").export(Path(source), Path(folder) / request.file_name, request, settings).sha256)
"""


def test_the_same_student_and_images_give_the_same_bytes(finished_run: RunFolder, tmp_path: Path) -> None:
    """Another folder, another order of hashes, another number of threads."""
    source = finished_run.artifacts / "student.onnx"
    images = SampleSet.load(finished_run.samples).normalised()[::6]
    settings = BuildSettings(calibration=images)
    first = []
    for request in map(ExportRequest.parse, TYPED):
        path = tmp_path / "first" / request.file_name
        DerivedOnnxExporter().export(source, path, request, settings)
        first.append(hashlib.sha256(path.read_bytes()).hexdigest())
    np.save(tmp_path / "images.npy", images)
    second = subprocess.run(  # noqa: S603 -- our own interpreter
        [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "second"), str(tmp_path / "images.npy"), *TYPED],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert second.stdout.split() == first
    assert len(set(first)) == len(TYPED)
