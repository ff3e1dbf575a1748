"""Options that several commands share, each declared once, and the parsing of their text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfadc.contract import ContractFields
from dfadc.contract import Task as TaskName
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Mapping

_contract = partial(typer.Option, rich_help_panel="Image contract")
_gate = partial(typer.Option, rich_help_panel="Gates")
_output = partial(typer.Option, rich_help_panel="Output")
#: An image with more channels is no image: a last number up to this is one of channels.
_MOST_CHANNELS = 4

TeacherArchitecture = Annotated[
    str | None,
    _contract(
        "--teacher-arch",
        help="torchvision:NAME, timm:NAME, smp:NAME:ENCODER, file.py:factory, package.module:factory or one of dfadc's "
        "networks.",
    ),
]
ArchitectureArguments = Annotated[
    list[str] | None,
    _contract(
        "--arch-arg",
        help="NAME=VALUE that --teacher-arch is built with (repeatable); for a library's network stem=small|pooled and "
        "activation=relu|gelu|….",
    ),
]
TeacherWeights = Annotated[
    str | None,
    _contract(
        "--teacher-weights",
        help="Weights of a checkpoint that holds several: ema (the default where it has some), raw, a key or a prefix.",
    ),
]
TeacherOutput = Annotated[
    str | None,
    _contract(
        "--output", help="Index or key of the logits where the teacher gives several outputs, e.g. 0 or heads.colour."
    ),
]
InputSize = Annotated[str | None, _contract("--input-size", help="CxHxW, e.g. 3x32x32.")]
Mean = Annotated[str | None, _contract(help="Per-channel pixel mean in [0,1], e.g. 0.5,0.5,0.5.")]
Std = Annotated[str | None, _contract(help="Per-channel pixel standard deviation.")]
NumClasses = Annotated[int | None, _contract(help="Length of the logits; 2 makes two classes of one logit.")]
Task = Annotated[
    TaskName | None,
    _contract(
        "--task",
        help="One class for each image, several labels for each (a sigmoid each), or one class for each pixel.",
    ),
]
TrustTeacher = Annotated[
    bool, typer.Option("--trust-teacher", help="Let the teacher file run code (TorchScript, .pt2, pickled modules).")
]
Factory = Annotated[
    list[str] | None,
    typer.Option(
        "--factory", help="package.module:factory that the run may import for its student or teacher (repeatable)."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="ImageFolder or .npz with labels: adds accuracy. It evaluates; it never trains or selects."),
]
SetGate = Annotated[
    list[str] | None, _gate("--set", help="Gate of the recipe, e.g. verify.min_int8_agreement=0.95 (repeatable).")
]
MinAgreement = Annotated[
    float | None, _gate(min=0, max=1, help="Lower bound of the student's agreement with the teacher.")
]
MinAccuracy = Annotated[float | None, _gate(min=0, max=1, help="Lower bound of the accuracy on the images of --data.")]
Baseline = Annotated[
    Path | None, _gate(help="File of `dfadc baseline`: each network is compared with itself in it, in pairs.")
]
MaxDrop = Annotated[
    float | None,
    _gate(
        min=0,
        max=1,
        help="Fail if the drop against --baseline exceeds this and is significant (one-sided exact McNemar, p < .05).",
    ),
]
Require = Annotated[list[str] | None, _gate(help="Artifact file that must have run, else exit 4 (repeatable).")]
Junit = Annotated[Path | None, _output(help="Also write the gates' outcomes as JUnit XML.")]
AsJson = Annotated[bool, _output("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, _output("--quiet", "-q", help="Print results and errors only.")]
Verbose = Annotated[bool, _output("--verbose", "-v", help="Print every source and check.")]
KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        help="ONNX node that stays in fp32 (repeatable); auto, the default, keeps the fewest layers with which INT8 "
        "passes its gate; none keeps none.",
    ),
]
Exports = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        "-e",
        help="NAME[:PRECISION[:PRESET]] or kit (repeatable); by default ONNX in fp32, fp16 and INT8, and every engine "
        "whose backend is installed.",
    ),
]


def architecture(name: str | None, arguments: list[str] | None) -> str | None:
    """``--teacher-arch`` with the arguments of ``--arch-arg``.

    Raises:
        DfadcError: an argument cannot be read, or no architecture is named.
    """
    if not arguments:
        return name
    from dfadc.networks.architecture_name import add_arguments  # noqa: PLC0415 -- keeps `--help` light

    return add_arguments(name, arguments)


def gates(
    *,
    min_agreement: float | None,
    min_accuracy: float | None,
    max_drop: float | None,
    data: Path | None,
    baseline: Path | None,
) -> list[str]:
    """The gates' flags as settings of the recipe; None leaves a setting as it is.

    Raises:
        DfadcError: a gate lacks its data or baseline.
    """
    if min_accuracy is not None and data is None:
        raise DfadcError(f"--min-accuracy {min_accuracy:g} needs labelled images", "pass --data")
    if max_drop is not None and baseline is None:
        raise DfadcError(f"--max-drop {max_drop:g} needs a baseline", "pass --baseline")
    return assignments(
        {
            "verify.min_agreement": min_agreement,
            "verify.min_accuracy": min_accuracy,
            "verify.max_baseline_drop": max_drop,
        }
    )


def assignments(fields: Mapping[str, object]) -> list[str]:
    """Flags as settings of the recipe, as ``--set`` takes them; None leaves a setting as it is."""
    return [f"{path}={value}" for path, value in fields.items() if value is not None]


def nodes_in_fp32(names: list[str] | None) -> tuple[str, ...] | None:
    """``--keep-fp32`` as ``BuildSettings.keep_fp32``; None if it was not passed.

    Raises:
        DfadcError: "none" is passed with other names.
    """
    if names is None or "none" not in names:
        return None if not names else tuple(names)
    if set(names) != {"none"}:
        raise DfadcError(f"--keep-fp32 none and {', '.join(set(names) - {'none'})} contradict each other", "leave one")
    return ()


def contract_fields(
    input_size: str | None, mean: str | None, std: str | None, num_classes: int | None, task: TaskName | None = None
) -> ContractFields:
    """The contract's fields from the flags.

    Raises:
        DfadcError: a value does not parse.
    """
    return ContractFields(
        input_size=None if input_size is None else parse_input_size(input_size),
        mean=None if mean is None else _parse_floats("--mean", mean),
        std=None if std is None else _parse_floats("--std", std),
        num_classes=num_classes,
        task=task,
    )


def parse_input_size(text: str) -> tuple[int, int, int]:
    """`3x32x32` -> (3, 32, 32).

    Raises:
        DfadcError: it is not three whole numbers above 0.
    """
    parts = text.lower().replace(",", "x").replace("\N{MULTIPLICATION SIGN}", "x").split("x")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise DfadcError(f"--input-size {text!r} is not CxHxW", "e.g. --input-size 3x32x32")
    channels, height, width = map(int, parts)
    if width <= _MOST_CHANNELS < min(channels, height):
        raise DfadcError(
            f"--input-size {text} has its channels last (HxWxC)", f"write --input-size {width}x{channels}x{height}"
        )
    return channels, height, width


def parse_batch(text: str) -> tuple[int, int, int]:
    """`8` -> (1, 8, 8), at most 8 images; `1,4,16` -> (1, 4, 16): lowest, optimum, highest.

    Raises:
        DfadcError: it is neither one whole number nor three.
    """
    parts = text.split(",")
    if len(parts) not in {1, 3} or not all(part.strip().isdigit() for part in parts):
        raise DfadcError(f"--batch {text!r} is not LOWEST,OPTIMUM,HIGHEST", "e.g. --batch 1,8,64, or --batch 64")
    numbers = [int(part) for part in parts]
    return (1, numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1], numbers[2])


def _parse_floats(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as exc:
        raise DfadcError(
            f"{flag} {text!r} is not a comma-separated list of numbers", f"e.g. {flag} 0.5,0.5,0.5"
        ) from exc
