"""`dfadc inspect`: describes a teacher file or an artifact, without running code from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfadc.cli import options
from dfadc.cli.console import print_json
from dfadc.cli.tables import print_table

if TYPE_CHECKING:
    from dfadc.teacher.inspect import TeacherReport


#: Suffixes of artifacts of `dfadc export`.
_ARTIFACTS = (".onnx", ".xml", ".engine")


def inspect(
    file: Annotated[Path, typer.Argument(help="Teacher file, or an artifact: .onnx, .xml (OpenVINO) or .engine.")],
    teacher_arch: options.TeacherArchitecture = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    task: options.Task = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe FILE: a teacher's kind, layers and contract, or an artifact's inputs, dtypes and operators."""
    if file.suffix in _ARTIFACTS:
        _inspect_artifact(file, as_json=as_json)
        return
    from dfadc.teacher.inspect import inspect_teacher  # noqa: PLC0415 -- keeps `--help` light

    fields = options.contract_fields(input_size, mean, std, num_classes, task)
    teacher = inspect_teacher(file, architecture=teacher_arch, fields=fields)
    if as_json:
        print_json(teacher.to_dict())
    else:
        print_table(("property", "value"), list(_rows(teacher)))


def _inspect_artifact(file: Path, *, as_json: bool) -> None:
    from exporters.describe import describe_artifact  # noqa: PLC0415 -- keeps `--help` light

    artifact = describe_artifact(file)
    if as_json:
        print_json(artifact)
    else:
        print_table(("property", "value"), list(_artifact_rows(artifact)))


def _artifact_rows(artifact: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One row for each property, input, output and metadata entry."""
    for name, value in artifact.items():
        if name in ("inputs", "outputs"):
            for tensor in value:
                shape = " x ".join(map(str, tensor["shape"]))
                yield name.removesuffix("s"), f"{tensor['name']}: {tensor['dtype']} {shape}"
        elif name == "metadata":
            yield from ((key, str(entry)) for key, entry in value.items())
        elif isinstance(value, dict):
            counts = (
                f"{key} {count:,}" if isinstance(count, int) else f"{key} {count}" for key, count in value.items()
            )
            yield name, ", ".join(counts) or "none"
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "any"
        else:
            yield name, _number(value)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _rows(teacher: TeacherReport) -> Iterator[tuple[str, str]]:
    """One row for each property; the norm layers are counted, the contract's fields carry their sources."""
    values = teacher.to_dict()
    if isinstance(teacher.norm_layers, tuple):
        described = (
            (layer.kind, "" if layer.has_statistics else " without statistics") for layer in teacher.norm_layers
        )
        kinds = Counter(kind + statistics for kind, statistics in described)
        values["norm_layers"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    for name in ("num_parameters", "flops", "size_bytes"):
        if isinstance(values[name], int):
            values[name] = f"{values[name]:,}"
    sources = values.pop("contract_sources")
    contract = values.pop("contract")
    for name, value in values.items():
        yield name, ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    for name, value in contract.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield f"contract.{name}", f"{shown}  ({sources[name]})" if name in sources else shown
