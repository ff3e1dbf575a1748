from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from command_line import disk_that_holds, files_of, run_command, run_python

from dfadc.run_folder import RunFolder
from exporters.exporter import ExportRequest
from exporters.manifest import check_unchanged
from exporters.registry import get_exporter

if TYPE_CHECKING:
    from pathlib import Path

#: The operating system refuses files beyond 60 kB, as a full disk would, C++ writers included.
SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from dfadc.errors import DfadcError
from exporters.exporter import BuildSettings, ExportRequest
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
    done = run_python(SCRIPT, text, student_onnx, tmp_path / "images.npy", target)
    assert (done.code, done.err) == (7, "")
    assert [(path.name, path.read_text()) for path in target.parent.iterdir()] == [
        (target.name, "the earlier artifact")
    ]


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def assert_storage_fails(run: RunFolder, *arguments: object, room: int) -> None:
    """The command ends with exit code 7 and one error, and the run is as it was, to the last byte."""
    before = files_of(run.path)
    with disk_that_holds(room):
        outcome = run_command("export", run.path, *arguments, "--quiet")
    assert outcome.code == 7, outcome.err
    assert len(outcome.errors) == 1
    assert "File too large" in outcome.errors[0]
    assert len(outcome.hints) == 1
    assert files_of(run.path) == before
    assert list(run.path.rglob(".*")) == [run.path / ".lock"]


def test_the_fp32_onnx(run_copy: RunFolder) -> None:
    (run_copy.artifacts / "student.onnx").write_text("the earlier artifact")
    assert_storage_fails(run_copy, "-e", "onnx", room=10_000)


def test_the_device_kit(run_copy: RunFolder) -> None:
    assert run_command("export", run_copy.path, "-e", "kit").code == 0
    (run_copy.artifacts / "kit" / "notes.txt").write_text("the earlier kit")
    assert_storage_fails(run_copy, "-e", "kit", room=15_000)
    assert run_command("export", run_copy.path, "-e", "kit").code == 0
    assert not (run_copy.artifacts / "kit" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("export", "changed"),
    [
        ("onnx:fp16", ("--keep-fp32", "classifier/Gemm")),
        ("tensorrt-rtx:fp16", ("--gpu", "sm89")),
        ("openvino:fp16", ()),
    ],
)
def test_the_manifest(export: str, changed: tuple[str, ...], run_copy: RunFolder) -> None:
    """The artifact is written by then: it must not stay, for the manifest that is there names the earlier one."""
    capability = get_exporter(ExportRequest.parse(export).name).capability()
    if not capability.can_build:
        pytest.skip(f"{capability.reason}: {capability.install}")
    assert run_command("export", run_copy.path, "-e", export, "--quiet").code == 0
    manifest = run_copy.path / "manifest.json"
    values = json.loads(manifest.read_text())
    values["artifacts"][0]["notes"] = ["x" * 2_000_000]
    if not changed:  # the earlier artifact was another
        record = next(entry for entry in values["artifacts"] if export.startswith(entry["exporter"] + ":"))
        for file in (record["file"], *record["extra_files"]):
            (run_copy.path / file).write_text("the earlier artifact")
    manifest.write_text(json.dumps(values))
    assert_storage_fails(run_copy, "-e", export, *changed, room=1_500_000)
    if changed:
        check_unchanged(run_copy.path)
