from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING

import pytest

from dfadc.errors import DfadcError
from exporters.manifest import ArtifactRecord, Manifest, check_unchanged

if TYPE_CHECKING:
    from pathlib import Path

    from exporters.exporter import ExportResult


@pytest.fixture
def run_folder(exported: ExportResult, tmp_path: Path) -> Path:
    path = tmp_path / "artifacts" / "student.onnx"
    path.parent.mkdir()
    shutil.copy(exported.path, path)
    (path.parent / "student.bin").write_bytes(b"weights")
    result = dataclasses.replace(exported, path=path, extra_files=(path.parent / "student.bin",))
    Manifest().add(ArtifactRecord.from_result(result, tmp_path)).write(tmp_path)
    return tmp_path


def test_written_and_read_are_equal(run_folder: Path, exported: ExportResult) -> None:
    manifest = check_unchanged(run_folder)
    assert manifest == Manifest.read(run_folder)
    record = manifest.find("artifacts/student.onnx")
    assert record is not None
    assert record.sha256 == exported.sha256
    assert record.parent_sha256 is None
    assert record.requested_precision == "fp32"
    assert "torch" in record.tool_versions
    assert manifest.find("artifacts/student.fp16.onnx") is None


def test_a_file_is_listed_once(run_folder: Path) -> None:
    manifest = Manifest.read(run_folder)
    newer = dataclasses.replace(manifest.artifacts[0], sha256="0" * 64)
    assert manifest.add(newer).artifacts == (newer,)


@pytest.mark.parametrize("file", ["artifacts/student.onnx", "artifacts/student.bin"])
def test_changed_bytes_are_named(run_folder: Path, file: str) -> None:
    path = run_folder / file
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DfadcError, match=f"{file} is not the file that was exported"):
        check_unchanged(run_folder)
    path.unlink()
    with pytest.raises(DfadcError, match=f"{file} is in the manifest but cannot be read"):
        check_unchanged(run_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"schema": 2, "artifacts": []}', "has schema 2"),
        ('{"schema": 1, "artifacts": [{"file": "x"}]}', "malformed artifact"),
        ('{"schema": 1, "artifacts": 3}', "is damaged"),
    ],
)
def test_a_damaged_manifest_is_a_clear_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DfadcError, match=message):
        Manifest.read(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(run_folder: Path) -> None:
    path = run_folder / "manifest.json"
    values = json.loads(path.read_text())
    values["artifacts"][0]["file"] = "../../etc/passwd"
    path.write_text(json.dumps(values))
    with pytest.raises(DfadcError, match="outside its folder"):
        check_unchanged(run_folder)


def test_missing_manifest_and_outside_file(tmp_path: Path, exported: ExportResult) -> None:
    with pytest.raises(DfadcError, match=r"manifest\.json does not exist"):
        Manifest.read(tmp_path)
    with pytest.raises(DfadcError, match="is outside"):
        ArtifactRecord.from_result(exported, tmp_path)
