"""`dfadc students`: student architectures with parameters and FLOPs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dfadc.cli import options
from dfadc.cli.console import print_json
from dfadc.cli.tables import print_table
from dfadc.contract import ImageContract, Task


def students(
    names: Annotated[list[str] | None, typer.Argument(help="Architectures; by default all with a fixed name.")] = None,
    input_size: Annotated[str, typer.Option("--input-size", help="CxHxW.")] = "3x32x32",
    num_classes: Annotated[int, typer.Option(min=2, help="Length of the logits.")] = 10,
    task: Annotated[
        Task, typer.Option(help="Classes or labels of each image, or classes of each pixel.")
    ] = "classification",
    as_json: options.AsJson = False,
) -> None:
    """List student architectures with parameters and FLOPs at an input size."""
    from dfadc.student.build import list_students  # noqa: PLC0415 -- keeps `--help` light

    size = options.parse_input_size(input_size)
    contract = ImageContract(input_size=size, num_classes=num_classes, task=task)
    listed = list_students(contract, names or ())
    if as_json:
        print_json([asdict(row) for row in listed])
        return
    rows = [(row.name, _millions(row.num_parameters), _millions(row.flops), row.reason or row.stem) for row in listed]
    print_table(("student", "parameters (M)", "MFLOPs", "stem"), rows)


def _millions(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.2f}"
