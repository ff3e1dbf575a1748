"""Statements of files about a teacher: metadata inside it, and a sidecar ``teacher.toml`` beside it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError
from dfadc.networks.network_file import ARCHITECTURE_KEY, CONTRACT_KEY, STEM_KEY, parse_contract_json
from dfadc.networks.published_config import read_published_configs
from dfadc.networks.stems import Stem, parse_stem

if TYPE_CHECKING:
    from dfadc.teacher.read import TeacherFile


@dataclass(frozen=True, slots=True)
class Statement:
    """Contract fields, architecture and stem that one file states."""

    source: str
    fields: ContractFields
    architecture: str | None = None
    stem: Stem | None = None


def read_statements(contents: TeacherFile) -> list[Statement]:
    """Statements of the file's metadata, its sidecar and published configurations, the strongest first."""
    statements = []
    metadata = contents.metadata
    if any(key in metadata for key in (ARCHITECTURE_KEY, CONTRACT_KEY)):
        text = metadata.get(CONTRACT_KEY)
        known = {} if text is None else parse_contract_json(text, contents.path)
        statements.append(
            Statement(
                "metadata of the file",
                ContractFields.from_dict(known),
                metadata.get(ARCHITECTURE_KEY),
                parse_stem(metadata.get(STEM_KEY, "default"), contents.path),
            )
        )
    if (sidecar := _sidecar_of(contents.path)) is not None:
        statements.append(_read_sidecar(sidecar))
    for name, fields in read_published_configs(contents.path):
        statements.append(Statement(name, fields))
    return statements


def sidecar_paths(path: Path) -> tuple[str, ...]:
    """Paths at which a sidecar is looked for, the teacher's own name first."""
    return tuple(dict.fromkeys((str(path.with_suffix(".toml")), str(path.parent / "teacher.toml"))))


def stated_output(path: Path) -> str | None:
    """The index or key of the logits among several outputs that a sidecar states; None where none does.

    Raises:
        DfadcError: the sidecar cannot be read.
    """
    sidecar = _sidecar_of(path)
    output = None if sidecar is None else _values(sidecar).get("output")
    return None if output is None else str(output)


def _sidecar_of(path: Path) -> Path | None:
    return next((Path(sidecar) for sidecar in sidecar_paths(path) if Path(sidecar).is_file()), None)


def _values(path: Path) -> dict[str, Any]:
    """Fields of a sidecar, those of its section ``contract`` among them."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise DfadcError(f"cannot read the sidecar {path}: {exc}") from exc
    return {**values.pop("contract", {}), **values}


def _read_sidecar(path: Path) -> Statement:
    values = _values(path)
    values.pop("output", None)  # see stated_output
    architecture, stem = values.pop("architecture", None), values.pop("stem", None)
    try:
        fields = ContractFields.from_dict(values)
    except DfadcError as exc:
        raise DfadcError(f"{path}: {exc.message}", exc.hint) from exc
    return Statement(
        path.name,
        fields,
        None if architecture is None else str(architecture),
        None if stem is None else parse_stem(stem, path),
    )
