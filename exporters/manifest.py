"""manifest.json: source, tools, files and hashes of every artifact of a run. Free of torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError
from dfadc.storage import sha256_file, storage_errors, write_json
from exporters.registry import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from exporters.exporter import ExportResult

SCHEMA = 1
FILE_NAME = "manifest.json"
#: Reason why a file that :meth:`Manifest.unlisted` returns is not judged.
NOT_LISTED = "in no manifest: its source is unknown; export it again"


class DamagedManifest(DfadcError):
    """The manifest cannot be read; the next export writes a new one."""


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """One artifact. Files are POSIX paths relative to the manifest.

    The fields are those of :class:`ExportResult` and its request, except ``extra_files``: further file -> sha256.
    """

    file: str
    sha256: str
    size_bytes: int
    parent_sha256: str | None
    exporter: str
    tool_versions: Mapping[str, str]
    requested_precision: str
    effective_precision: str
    preset: str
    targets: tuple[str, ...]
    extra_files: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def from_result(cls, result: ExportResult, folder: Path) -> ArtifactRecord:
        """The record of ``result`` in the manifest of ``folder``, which must contain its files."""
        return cls(
            file=_relative(result.path, folder),
            sha256=result.sha256,
            size_bytes=result.size_bytes,
            parent_sha256=result.parent_sha256,
            exporter=result.request.name,
            tool_versions=dict(sorted(result.tool_versions.items())),
            requested_precision=str(result.request.precision),
            effective_precision=result.effective_precision,
            preset=result.request.preset,
            targets=result.targets,
            extra_files={_relative(path, folder): sha256_file(path) for path in result.extra_files},
            notes=result.notes,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArtifactRecord:
        """Reads plain JSON values.

        Raises:
            DamagedManifest: a field is missing or unknown, or a file lies outside the manifest's folder.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise DamagedManifest(f"malformed artifact in the manifest: fields {sorted(set(values) ^ names)} differ")
        record = cls(**{**values, "targets": tuple(values["targets"]), "notes": tuple(values["notes"])})
        for file in (record.file, *record.extra_files):
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts:
                raise DamagedManifest(f"the manifest names {file!r}, which is outside its folder")
        return record


@dataclass(frozen=True, slots=True)
class Manifest:
    """All artifacts of a run, in the order in which they were built."""

    artifacts: tuple[ArtifactRecord, ...] = ()

    def add(self, record: ArtifactRecord) -> Manifest:
        """A manifest with ``record`` in place of any earlier one of the same file."""
        return Manifest((*(other for other in self.artifacts if other.file != record.file), record))

    def find(self, file: str) -> ArtifactRecord | None:
        """The record of ``file``, a path relative to the manifest; None if there is none."""
        return next((record for record in self.artifacts if record.file == file), None)

    def unlisted(self, artifacts: Path) -> list[Path]:
        """Files in a folder with an artifact's extension that the manifest does not list: their source is unknown."""
        listed = {Path(record.file).name for record in self.artifacts}
        kinds = {f".{target.extension}" for target in TARGETS.values()}
        files = sorted(artifacts.iterdir()) if artifacts.is_dir() else []
        return [path for path in files if path.suffix in kinds and path.name not in listed and path.name[0] != "."]

    def write(self, folder: Path) -> None:
        """Writes ``folder/manifest.json``, whole or not at all."""
        artifacts = [dataclasses.asdict(record) for record in self.artifacts]
        write_json(folder / FILE_NAME, {"schema": SCHEMA, "artifacts": artifacts})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads ``folder/manifest.json``.

        Raises:
            DfadcError: it is missing or has another schema.
            DamagedManifest: it is not JSON, or not of this form.
        """
        path = folder / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["schema"] != SCHEMA:
                raise DfadcError(f"{path} has schema {values['schema']}, this version reads {SCHEMA}")
            return cls(tuple(map(ArtifactRecord.from_dict, values["artifacts"])))
        except FileNotFoundError as exc:
            raise DfadcError(f"{path} does not exist", "is this the folder of a finished run?") from exc
        except OSError as exc:
            raise DfadcError(f"cannot read {path}: {exc.strerror or exc}") from exc
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise DamagedManifest(
                f"{path} is damaged: {type(exc).__name__}: {exc}", "export the artifacts again"
            ) from exc


@contextmanager
def restored_on_failure(folder: Path, earlier: ArtifactRecord | None) -> Iterator[None]:
    """Restores the files of an earlier artifact if the block, which replaces the artifact and its record, fails.

    Otherwise the manifest would name bytes that are gone. The files are hard-linked, so they take no space.

    Raises:
        StorageFailed: the folder cannot be written.
    """
    if earlier is None:
        yield
        return
    files = [folder / file for file in (earlier.file, *earlier.extra_files) if (folder / file).is_file()]
    with storage_errors(f"write {folder}", "free some space"):
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".earlier.")
        for path in files:
            try:
                os.link(path, Path(scratch.name) / path.name)
            except OSError:  # the file system has no hard links
                shutil.copyfile(path, Path(scratch.name) / path.name)
    with scratch:
        try:
            yield
        except BaseException:  # Ctrl-C too
            for path in files:
                (Path(scratch.name) / path.name).replace(path)
            raise


def changed_artifacts(manifest: Manifest, folder: Path) -> dict[str, str]:
    """Maps each artifact whose bytes are not those that were exported to the reason."""
    changed = {}
    for record in manifest.artifacts:
        try:
            check_record(record, folder)
        except DfadcError as exc:
            changed[record.file] = exc.message
    return changed


def check_unchanged(folder: Path) -> Manifest:
    """Reads the manifest of ``folder`` and compares every file with it.

    Raises:
        DfadcError: an artifact is missing, or its bytes are not those that were exported; it is named.
    """
    manifest = Manifest.read(folder)
    for record in manifest.artifacts:
        check_record(record, folder)
    return manifest


def check_record(record: ArtifactRecord, folder: Path) -> None:
    """Compares the files of one artifact with its record.

    Raises:
        DfadcError: a file is missing, or its bytes differ.
    """
    for file, expected in {record.file: record.sha256, **record.extra_files}.items():
        try:
            actual = sha256_file(folder / file)
        except OSError as exc:
            raise DfadcError(
                f"{folder / file} is in the manifest but cannot be read: {exc.strerror or exc}",
                f"export {record.exporter}:{record.requested_precision} again",
            ) from exc
        if actual != expected:
            raise DfadcError(
                f"{folder / file} is not the file that was exported: sha256 {actual[:12]}…, manifest {expected[:12]}…",
                f"export {record.exporter}:{record.requested_precision} again",
            )


def _relative(path: Path, folder: Path) -> str:
    """``path`` as the manifest of ``folder`` names it."""
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError as exc:
        raise DfadcError(f"{path} is outside {folder}, whose manifest should list it") from exc
