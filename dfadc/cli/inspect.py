"""`dfadc inspect`: describes a teacher file or an artifact, without running code from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfadc.cli import options
from dfadc.cli.console import print_json, say
from dfadc.cli.tables import print_table
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.teacher.inspect import TeacherReport


#: Suffixes of artifacts of `dfadc export`.
_ARTIFACTS = (".onnx", ".xml", ".engine")


def inspect(  # noqa: PLR0913, PLR0917 -- the signature is the command line
    file: Annotated[Path, typer.Argument(help="Teacher file, or an artifact: .onnx, .xml (OpenVINO) or .engine.")],
    teacher_arch: options.TeacherArchitecture = None,
    arch_arg: options.ArchitectureArguments = None,
    teacher_weights: options.TeacherWeights = None,
    output: options.TeacherOutput = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    task: options.Task = None,
    write_sidecar: Annotated[
        bool, typer.Option("--write-sidecar", help="Write what is known into a .toml beside FILE, the gaps marked.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Describe FILE: a teacher's kind, layers and contract, or an artifact's inputs, dtypes and operators.

    An .onnx file is described as an artifact, and as a teacher where a flag is about one.
    """
    about_teacher = (teacher_arch, arch_arg, teacher_weights, output, input_size, mean, std, num_classes, task)
    if file.suffix in _ARTIFACTS and not (write_sidecar or any(flag is not None for flag in about_teacher)):
        _inspect_artifact(file, as_json=as_json)
        return
    from dfadc.teacher.inspect import inspect_teacher  # noqa: PLC0415 -- keeps `--help` light

    fields = options.contract_fields(input_size, mean, std, num_classes, task)
    named = options.architecture(teacher_arch, arch_arg)
    teacher = inspect_teacher(file, architecture=named, fields=fields, weights=teacher_weights, output=output)
    if as_json:
        print_json(teacher.to_dict())
    else:
        print_table(("property", "value"), list(_rows(teacher)))
    if write_sidecar and (teacher.problem is None or teacher.weights):
        from dfadc.teacher.write_sidecar import write_sidecar as write  # noqa: PLC0415 -- keeps `--help` light

        say(f"sidecar: {write(teacher)}")
    if teacher.problem is not None:
        raise DfadcError(teacher.problem, teacher.hint)
    if teacher.hint:
        say(f"hint: {teacher.hint}")


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
    # The error after the table says it once.
    values = _without_repetition(values, {f"unknown, because {values.pop('problem')}"})
    weights = values.pop("weights")
    sources = values.pop("contract_sources")
    contract = values.pop("contract")
    notes = values.pop("notes") or ["none"]
    for name, value in values.items():
        yield name, ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    yield from (("notes", line) for line in notes)
    for name, value in contract.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield f"contract.{name}", f"{shown}  ({sources[name]})" if name in sources else shown
    yield from (("weights", line) for line in weights)


def _without_repetition(values: dict[str, Any], said: set[str]) -> dict[str, Any]:
    """The values with each reason for one that is unknown said once."""
    short: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            short[key] = _without_repetition(value, said)
            continue
        is_reason = isinstance(value, str) and value.startswith("unknown, because ")
        short[key] = "unknown" if is_reason and value in said else value
        if is_reason:
            said.add(value)
    return short
