"""`dfadc inspect`: what a teacher file is, without running code from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options
from dfadc.cli.console import print_json, print_table


def inspect(
    file: Annotated[Path, typer.Argument(help="Teacher file.")],
    teacher_arch: options.TeacherArchitecture = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what FILE is: kind, safety, architecture, layers, norm layers, parameters, FLOPs and contract."""
    from dfadc.models.inspection import inspect_teacher  # noqa: PLC0415 -- keeps `--help` light

    fields = options.contract_fields(input_size, mean, std, num_classes)
    found = inspect_teacher(file, architecture=teacher_arch, fields=fields)
    if as_json:
        print_json(found.to_dict())
        return
    print_table(("property", "value"), found.rows())
