"""Results of a stage as they come in: facts, table rows and notes, in a JSON file that every addition replaces."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfadc.reporting.markdown import table_lines

if TYPE_CHECKING:
    from pathlib import Path

    import torch

#: Longest text of a table's cell; kernels of C++ templates have names of hundreds of characters.
_WIDEST = 160


@dataclass(frozen=True)
class Job:
    """Order to a stage.

    Args:
        device: where networks run.
        tiny: smallest sizes, to try the program out; the figures mean nothing.
        seconds: until the stage is ended from outside.
        work: folder for what stages leave to later ones.
        commit: of dfadc, where no checkout tells it.
        started: monotonic seconds, the same in all processes, at which the stage's process was started.
    """

    device: torch.device
    tiny: bool
    seconds: float
    work: Path
    commit: str
    started: float

    @property
    def seconds_left(self) -> float:
        """Seconds until the stage is ended."""
        return self.started + self.seconds - time.monotonic()

    @property
    def is_cuda(self) -> bool:
        """True on an NVIDIA GPU."""
        return self.device.type == "cuda"


class Record:
    """Results of a stage so far.

    Args:
        path: of its JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, Any] = {}
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._notes: list[str] = []

    def fact(self, name: str, value: object) -> None:
        """A single value."""
        self._facts[name] = value
        self._write()

    def row(self, table: str, **cells: object) -> None:
        """A row of a table; all its rows have the same columns."""
        self._tables.setdefault(table, []).append(cells)
        self._write()

    def note(self, text: str) -> None:
        """A remark."""
        self._notes.append(text)
        self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"facts": self._facts, "tables": self._tables, "notes": self._notes}))
        partial.replace(self._path)


def read_record(path: Path) -> dict[str, Any]:
    """Record that a stage wrote; empty where it wrote none."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def to_markdown(results: dict[str, Any]) -> str:
    """All stages as a page: outcome, facts, tables and notes of each, and the end of the output of one that failed."""
    lines = ["# Measured on a GPU", "", f"    {results['command']}", ""]
    for name, stage in results["stages"].items():
        lines += [f"## {name}", "", f"{stage['outcome']}, {stage['seconds']:.0f} s of at most {stage['limit']:.0f}", ""]
        facts = [[key, _cell(value)] for key, value in stage.get("facts", {}).items()]
        if facts:
            lines += [*table_lines(["fact", "value"], facts), ""]
        for title, rows in stage.get("tables", {}).items():
            columns = list(rows[0])
            cells = [[_cell(row.get(column)) for column in columns] for row in rows]
            lines += [f"**{title}**", "", *table_lines(columns, cells), ""]
        lines += [f"- {note}" for note in stage.get("notes", ())]
        if stage.get("error"):
            lines += ["", "```text", *stage["error"], "```"]
        lines.append("")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "–" if value is None else str(value)[:_WIDEST]
