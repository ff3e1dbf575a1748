"""Tables on stdout that lose nothing on a narrow terminal: prose wraps, and a table too wide is stacked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dfadc.cli.streams import result_stream

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

#: A column with a longer cell is prose, which may wrap; a number, a name or a verdict may not.
_PROSE = 32
#: Columns of a terminal around a cell: two blanks and a line.
_FRAME = 3


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on stdout; on a pipe as wide as necessary, on a narrow terminal each row as a block."""
    stream = result_stream()
    natural = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    widths = _fit(columns, rows, natural, _terminal_width(stream))
    if widths is None:
        for row in rows:
            _print_block(stream, columns, row)
        return
    table = Table()
    for column, width in zip(columns, widths, strict=True):
        table.add_column(escape(column), width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(file=stream, highlight=False, width=_framed(widths)).print(table)


def _print_block(stream: TextIO, columns: Sequence[str], row: Sequence[str]) -> None:
    """Writes a row as lines: its name, then each column that is not empty; the terminal wraps a long value."""
    lines = [row[0], *(f"  {column}: {value}" for column, value in zip(columns[1:], row[1:], strict=True) if value)]
    stream.write("\n".join(lines) + "\n")
    stream.flush()


def _terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal; None without a terminal, or if its width is unknown."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    return (int(columns) if columns.isdecimal() else os.get_terminal_size(stream.fileno()).columns) or None


def _fit(
    columns: Sequence[str], rows: Sequence[Sequence[str]], natural: Sequence[int], available: int | None
) -> list[int] | None:
    """Widths of the columns that fill at most ``available``; None if they do not fit although prose wraps.

    Names, the first column, never wrap.
    """
    if available is None or _framed(natural) <= available:
        return list(natural)
    widths = []
    for index, column in enumerate(columns):
        longest = max((cell_len(row[index]) for row in rows), default=0)
        word = max(map(cell_len, column.split()), default=0)
        widths.append(max(word, _PROSE if index and longest > _PROSE else longest))
    while _framed(widths) < available:
        lacking = [whole - width for whole, width in zip(natural, widths, strict=True)]
        widths[lacking.index(max(lacking))] += 1
    return widths if _framed(widths) <= available else None


def _framed(widths: Sequence[int]) -> int:
    return sum(widths) + _FRAME * len(widths) + 1
