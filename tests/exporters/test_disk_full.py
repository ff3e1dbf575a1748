from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from exporters.base import ExportRequest
from exporters.registry import get_exporter

if TYPE_CHECKING:
    from pathlib import Path

#: The operating system refuses files beyond 60 kB, as a full disk would, C++ writers included.
SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from dfadc.errors import DfadcError
from exporters.base import BuildSettings, ExportRequest
from exporters.registry import get_exporter

request, source, images, target = ExportRequest.parse(sys.argv[1]), *map(Path, sys.argv[2:])
settings = BuildSettings(calibration=np.load(images), calibrator="minmax")
exporter = get_exporter(request.name)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    exporter.export(source, target, request, settings)
except DfadcError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("text", ["onnx:fp16", "onnx:int8", "openvino", "tensorrt-rtx"])
def test_a_full_disk_is_exit_7_and_leaves_what_was_there(
    text: str, student_onnx: Path, images: np.ndarray, tmp_path: Path
) -> None:
    request = ExportRequest.parse(text)
    capability = get_exporter(request.name).capability()
    if not capability.can_build:
        pytest.skip(f"{capability.reason}: {capability.install}")
    np.save(tmp_path / "images.npy", images[:4].repeat(4, axis=0))
    target = tmp_path / "artifacts" / request.file_name
    target.parent.mkdir()
    target.write_text("the earlier artifact")
    arguments = [text, str(student_onnx), str(tmp_path / "images.npy"), str(target)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (7, "")
    assert [(path.name, path.read_text()) for path in target.parent.iterdir()] == [
        (target.name, "the earlier artifact")
    ]
