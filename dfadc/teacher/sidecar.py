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
    from dfadc.teacher.teacher_file import TeacherFile


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
    sidecar, values = _read_sidecar(contents.path)
    if sidecar is not None:
        values.pop("output", None)  # see stated_output
        architecture, stem = values.pop("architecture", None), values.pop("stem", None)
        try:
            fields = ContractFields.from_dict(values)
        except DfadcError as exc:
            raise DfadcError(f"{sidecar}: {exc.message}", exc.hint) from exc
        name = None if architecture is None else str(architecture)
        statements.append(Statement(sidecar.name, fields, name, None if stem is None else parse_stem(stem, sidecar)))
    return statements + [Statement(name, fields) for name, fields in read_published_configs(contents.path)]


def sidecar_paths(path: Path) -> tuple[str, ...]:
    """Paths at which a sidecar is looked for, the teacher's own name first."""
    return tuple(dict.fromkeys((str(path.with_suffix(".toml")), str(path.parent / "teacher.toml"))))


def stated_output(path: Path) -> str | None:
    """The index or key of the logits among several outputs that a sidecar states; None where none does.

    Raises:
        DfadcError: the sidecar cannot be read.
    """
    output = _read_sidecar(path)[1].get("output")
    return None if output is None else str(output)


def _read_sidecar(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """The sidecar of a teacher, where there is one, and its fields, those of its section ``contract`` among them."""
    sidecar = next((Path(each) for each in sidecar_paths(path) if Path(each).is_file()), None)
    if sidecar is None:
        return None, {}
    try:
        values: dict[str, Any] = tomllib.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise DfadcError(f"cannot read the sidecar {sidecar}: {exc}") from exc
    return sidecar, {**values.pop("contract", {}), **values}
