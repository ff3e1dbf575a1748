"""The run folder: the files of a run, its record and its metrics. Free of torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write_text, read_json, remove_leftovers, storage_errors, without_nan, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCHEMA = "dfadc.run_folder/1"


class _Entry:
    """A file or folder of a run, by its name in the run folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. Opening one reads nothing but ``run.json``."""

    path: Path

    #: The resolved recipe.
    recipe = _Entry("recipe.toml")
    #: The record: versions, device, teacher, student, contract, costs.
    record_file = _Entry("run.json")
    #: One JSON line a log interval.
    metrics = _Entry("metrics.jsonl")
    checkpoints = _Entry("checkpoints")
    #: The finished student.
    student = _Entry("student.safetensors")
    #: The averaged generator.
    generator = _Entry("generator.safetensors")
    #: The generator trained against the teacher alone.
    prior = _Entry("prior.safetensors")
    #: Images for INT8 calibration, disjoint from the samples.
    calibration = _Entry("calibration.npz")
    #: The frozen verification samples.
    samples = _Entry("samples.npz")
    #: Exported models, with ``manifest.json`` beside the folder.
    artifacts = _Entry("artifacts")
    #: The last verification's report, in three forms.
    report_json = _Entry("report.json")
    report_md = _Entry("report.md")
    report_html = _Entry("report.html")
    #: The last measured speeds.
    bench = _Entry("bench.json")

    def record(self) -> dict[str, Any]:
        """Reads ``run.json``.

        Raises:
            DfadcError: this is no run folder, or its record is of another schema.
        """
        try:
            record: dict[str, Any] = read_json(self.record_file, schema=SCHEMA)
        except DfadcError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                raise DfadcError(f"{self.path} is not a run folder: it has no run.json") from exc
            raise
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

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``; NaN and infinity become null, because JSON has neither.

        Raises:
            StorageFailed: the disk is full or not writable.
        """
        hint = f"free some space, then go on: dfadc distill --resume {self.path}"
        with storage_errors(f"write {self.metrics}", hint), self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(without_nan(line), allow_nan=False) + "\n")

    def trim_metrics(self, step: int) -> None:
        """Drops lines past ``step``: they are computed again after a resume."""
        kept = [json.dumps(without_nan(line), allow_nan=False) for line in self.read_metrics() if line["step"] <= step]
        atomic_write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def remove_checkpoints(self) -> None:
        """Removes the checkpoints of a finished run, which cannot be resumed; at 224 px they take gigabytes.

        Raises:
            StorageFailed: the folder is not writable.
        """
        with storage_errors(f"remove {self.checkpoints}"):
            if self.checkpoints.exists():
                shutil.rmtree(self.checkpoints)

    def clear_leftovers(self) -> None:
        """Removes the temporary files of a killed process."""
        for folder in (self.path, self.checkpoints, self.artifacts):
            remove_leftovers(folder)


def open_run(path: Path | str) -> RunFolder:
    """Opens a run folder.

    Raises:
        DfadcError: there is no run.
    """
    folder = RunFolder(Path(path))
    folder.record()
    return folder
