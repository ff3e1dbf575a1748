"""The run folder: where a run keeps what, and how it is opened, claimed and described. Free of torch."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, StorageFailed
from dfadc.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCHEMA = "dfadc.run/1"
#: Packages whose versions decide what a run computes.
RECORDED_PACKAGES = ("dfadc", "torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. Opening one reads nothing but ``run.json``."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def record_file(self) -> Path:
        """What the run is: versions, device, teacher, student, contract, costs."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a log interval."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.path / "student.safetensors"

    @property
    def generator(self) -> Path:
        """The averaged generator."""
        return self.path / "generator.safetensors"

    @property
    def calibration(self) -> Path:
        """Images for INT8 calibration, disjoint from the samples."""
        return self.path / "calibration.npz"

    @property
    def samples(self) -> Path:
        """The frozen verification samples."""
        return self.path / "samples.npz"

    @property
    def artifacts(self) -> Path:
        """Exported models, with ``manifest.json`` beside the folder."""
        return self.path / "artifacts"

    @property
    def report_json(self) -> Path:
        """The last verification's report."""
        return self.path / "report.json"

    @property
    def report_md(self) -> Path:
        """The same as Markdown."""
        return self.path / "report.md"

    def record(self) -> dict[str, Any]:
        """Reads ``run.json``.

        Raises:
            DfadcError: this is no run folder, or its record is of another schema.
        """
        try:
            record: dict[str, Any] = json.loads(self.record_file.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise DfadcError(f"{self.path} is not a run folder: it has no run.json") from exc
        except (OSError, ValueError) as exc:
            raise DfadcError(f"cannot read {self.record_file}: {exc}") from exc
        if record.get("schema") != SCHEMA:
            raise DfadcError(f"{self.record_file} has schema {record.get('schema')!r}, this dfadc reads {SCHEMA!r}")
        return record

    def update_record(self, changes: Mapping[str, Any]) -> None:
        """Merges values into ``run.json``, atomically."""
        write_json(self.record_file, {**self.record(), **changes})

    def contract(self) -> ImageContract:
        """The contract that teacher and student share."""
        return ImageContract.from_dict(self.record()["contract"])

    def require_finished(self) -> None:
        """Refuses a run that has no student yet.

        Raises:
            DfadcError: the run was not finished.
        """
        if self.record().get("status") != "finished" or not self.student.exists():
            raise DfadcError(
                f"the run {self.path} is not finished: it has no student yet", f"dfadc distill --resume {self.path}"
            )

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut short by a crash is left out."""
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def trim_metrics(self, step: int) -> None:
        """Drops lines past ``step``: they are computed again after a resume."""
        kept = [json.dumps(line) for line in self.read_metrics() if line["step"] <= step]
        self.metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def open_run(path: Path | str) -> RunFolder:
    """Opens a run folder.

    Raises:
        DfadcError: there is no run.
    """
    folder = RunFolder(Path(path))
    folder.record()
    return folder


def claim_folder(path: Path, *, force: bool) -> RunFolder:
    """An empty run folder at ``path``.

    Raises:
        DfadcError: something is there that must not be lost.
        StorageFailed: the folder cannot be made.
    """
    folder = RunFolder(path)
    try:
        if path.exists() and not path.is_dir():
            raise DfadcError(f"the output {path} is a file", "choose another --out")
        if path.exists() and any(path.iterdir()):
            if not folder.record_file.exists():
                raise DfadcError(f"{path} is not empty and holds no run", "choose another --out")
            if not force:
                raise DfadcError(
                    f"{path} already holds a run",
                    f"--resume {path} goes on with it, --force replaces it, or choose --out",
                )
            shutil.rmtree(path)
        folder.checkpoints.mkdir(parents=True)
    except OSError as exc:
        raise StorageFailed(
            f"cannot create the run folder {path}: {exc.strerror or exc}", "choose a writable --out"
        ) from exc
    return folder


def environment() -> dict[str, Any]:
    """Versions, platform and, from a source checkout, the commit of dfadc: what a run must record to be repeated."""
    versions: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
