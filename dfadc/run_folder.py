"""The run folder: where a run keeps what, and how it is opened, claimed and described. Free of torch."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, StorageFailed
from dfadc.storage import atomic_write_text, is_temporary, remove_leftovers, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCHEMA = "dfadc.run_folder/1"
#: The lock file of a run folder, see :mod:`dfadc.run_lock`.
LOCK = ".lock"
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
    def prior(self) -> Path:
        """The generator trained against the teacher alone."""
        return self.path / "prior.safetensors"

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

    @property
    def report_html(self) -> Path:
        """The same as one page to look at."""
        return self.path / "report.html"

    @property
    def samples_png(self) -> Path:
        """Some of the samples by the teacher's class."""
        return self.path / "samples.png"

    @property
    def curves_png(self) -> Path:
        """The metrics over the run."""
        return self.path / "curves.png"

    @property
    def bench(self) -> Path:
        """The last measured speeds."""
        return self.path / "bench.json"

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
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise DfadcError(f"{self.record_file} has schema {schema!r}, this dfadc reads {SCHEMA!r}")
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
        """Adds a line to ``metrics.jsonl``; a number that is not finite becomes null, for JSON has none.

        Raises:
            StorageFailed: the disk is full or not writable.
        """
        try:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as exc:
            raise StorageFailed(
                f"cannot write {self.metrics}: {exc.strerror or exc}",
                f"free some space, then go on: dfadc distill --resume {self.path}",
            ) from exc

    def trim_metrics(self, step: int) -> None:
        """Drops lines past ``step``: they are computed again after a resume."""
        kept = [json.dumps(_finite(line), allow_nan=False) for line in self.read_metrics() if line["step"] <= step]
        atomic_write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def remove_checkpoints(self) -> None:
        """Removes the checkpoints of a finished run, which would go on from nowhere; at 224 px they take gigabytes.

        Raises:
            StorageFailed: the folder is not writable.
        """
        try:
            if self.checkpoints.exists():
                shutil.rmtree(self.checkpoints)
        except OSError as exc:
            raise StorageFailed(f"cannot remove {self.checkpoints}: {exc.strerror or exc}") from exc

    def clear_leftovers(self) -> None:
        """Removes what a killed process was about to write."""
        for folder in (self.path, self.checkpoints, self.artifacts):
            remove_leftovers(folder)


def _finite(value: Any) -> Any:
    """The same JSON values, with null for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_run(path: Path | str) -> RunFolder:
    """Opens a run folder.

    Raises:
        DfadcError: there is no run.
    """
    folder = RunFolder(Path(path))
    folder.record()
    return folder


def check_claimable(path: Path, *, force: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Says before any work is done what :func:`claim_folder` would refuse; changes nothing.

    Args:
        path: of the folder.
        force: whether a run that lies there may be replaced.
        inputs: what a run reads, by the name that a person gave it.

    Raises:
        DfadcError: something is there that must not be lost, be it an input.
        StorageFailed: the folder cannot be looked into.
    """
    folder = RunFolder(path)
    try:
        if path.exists() and not path.is_dir():
            raise DfadcError(f"the output {path} is a file", "choose another --out")
        for name, file in (inputs or {}).items():
            if lies_in(file, path):
                raise DfadcError(f"{name} {file} lies in the output folder {path}", "choose another --out")
        if not path.exists() or _is_unused(folder):
            return
        if not _holds_run(folder):
            raise DfadcError(f"{path} is not empty and holds no run", "choose another --out")
    except OSError as exc:
        raise StorageFailed(f"cannot read {path}: {exc.strerror or exc}", "choose another --out") from exc
    if not force:
        raise DfadcError(
            f"{path} already holds a run",
            f"--resume {path} goes on with it, --force replaces it, or choose --out",
        )


def claim_folder(path: Path, *, force: bool) -> RunFolder:
    """An empty run folder at ``path``.

    Raises:
        DfadcError: something is there that must not be lost.
        StorageFailed: the folder cannot be made.
    """
    check_claimable(path, force=force)
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The folder itself stays: it may be a mount point, or where the shell stands.
        for entry in path.iterdir():
            if entry.name == LOCK:  # held, by whoever claims
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        folder.checkpoints.mkdir()
    except OSError as exc:
        raise StorageFailed(
            f"cannot create the run folder {path}: {exc.strerror or exc}", "choose a writable --out"
        ) from exc
    return folder


def lies_in(file: Path, folder: Path) -> bool:
    """Whether a file, or a link on the way to it, would be gone with a folder."""
    there = folder.resolve()
    ways = (*(way.resolve() for way in (file.absolute(), *file.absolute().parents)), *file.resolve().parents)
    return there in ways


def _is_unused(folder: RunFolder) -> bool:
    """Empty, or as a run leaves it that was stopped before it was described."""
    return _status(folder) == "starting" or all(
        entry.name == LOCK
        or is_temporary(entry)
        or (entry == folder.checkpoints and entry.is_dir() and not any(entry.iterdir()))
        for entry in folder.path.iterdir()
    )


def _holds_run(folder: RunFolder) -> bool:
    """Whether a dfadc of any version wrote the record."""
    return _status(folder) is not None


def _status(folder: RunFolder) -> str | None:
    """Of a run of any version; None where there is none, for a file of that name alone may be somebody else's."""
    try:
        record = json.loads(folder.record_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_ours = isinstance(record, dict) and str(record.get("schema")).startswith(SCHEMA.partition("/")[0] + "/")
    return str(record.get("status")) if is_ours else None


def refuse_several_processes() -> None:
    """Refuses a launcher such as torchrun, each of whose processes would make a run of its own in one folder.

    Raises:
        DfadcError: the environment says that there are several.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise DfadcError(
            f"a launcher started {size} processes (WORLD_SIZE), and a run is made by one",
            "call dfadc itself, without torchrun; elsewhere unset WORLD_SIZE",
        )


def environment() -> dict[str, Any]:
    """Command, versions, platform and, from a checkout, the commit of dfadc: what a run must record to be repeated."""
    versions: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": _command(),
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def _command() -> str:
    """This process as a person would type it: without the folder that its program lies in."""
    program = Path(sys.argv[0])
    # `python -m package` names the file inside the package.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


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
