"""Options that several commands share, each declared once, and the parsing of their text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.contract import ContractFields

_CONTRACT = "Image contract"
_GATES = "Gates"
_OUTPUT = "Output"
#: An image with more channels is no image: a last number up to this is one of channels.
_MOST_CHANNELS = 4

TeacherArchitecture = Annotated[
    str | None,
    typer.Option(
        "--teacher-arch",
        help="torchvision:NAME, timm:NAME, smp:NAME:ENCODER, file.py:factory, package.module:factory or one of dfadc's "
        "networks.",
        rich_help_panel=_CONTRACT,
    ),
]
ArchitectureArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--arch-arg",
        help="NAME=VALUE that --teacher-arch is built with (repeatable); for a library's network stem=small|pooled and "
        "activation=relu|gelu|….",
        rich_help_panel=_CONTRACT,
    ),
]
TeacherWeights = Annotated[
    str | None,
    typer.Option(
        "--teacher-weights",
        help="Weights of a checkpoint that holds several: ema (the default where it has some), raw, a key or a prefix.",
        rich_help_panel=_CONTRACT,
    ),
]
TeacherOutput = Annotated[
    str | None,
    typer.Option(
        "--output",
        help="Index or key of the logits where the teacher gives several outputs, e.g. 0 or heads.colour.",
        rich_help_panel=_CONTRACT,
    ),
]
InputSize = Annotated[str | None, typer.Option("--input-size", help="CxHxW, e.g. 3x32x32.", rich_help_panel=_CONTRACT)]
Mean = Annotated[
    str | None, typer.Option(help="Per-channel pixel mean in [0,1], e.g. 0.5,0.5,0.5.", rich_help_panel=_CONTRACT)
]
Std = Annotated[str | None, typer.Option(help="Per-channel pixel standard deviation.", rich_help_panel=_CONTRACT)]
NumClasses = Annotated[
    int | None, typer.Option(help="Length of the logits; 2 makes two classes of one logit.", rich_help_panel=_CONTRACT)
]


class TaskName(StrEnum):
    """Task of a network."""

    CLASSIFICATION = "classification"
    MULTILABEL = "multilabel"
    SEGMENTATION = "segmentation"


Task = Annotated[
    TaskName | None,
    typer.Option(
        "--task",
        help="One class for each image, several labels for each (a sigmoid each), or one class for each pixel.",
        rich_help_panel=_CONTRACT,
    ),
]
TrustTeacher = Annotated[
    bool, typer.Option("--trust-teacher", help="Let the teacher file run code (TorchScript, .pt2, pickled modules).")
]
Factory = Annotated[
    list[str] | None,
    typer.Option(
        "--factory",
        help="package.module:factory that the run may import for its student or teacher (repeatable).",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="ImageFolder or .npz with labels: adds accuracy. It evaluates; it never trains or selects."),
]
SetGate = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Gate of the recipe, e.g. verify.min_int8_agreement=0.95 (repeatable).", rich_help_panel=_GATES
    ),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Lower bound of the student's agreement with the teacher.", rich_help_panel=_GATES),
]
MinAccuracy = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Lower bound of the accuracy on the images of --data.", rich_help_panel=_GATES),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        help="File of `dfadc baseline`: each network is compared with itself in it, in pairs.", rich_help_panel=_GATES
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Fail if the drop against --baseline exceeds this and is significant (one-sided exact McNemar, p < .05).",
        rich_help_panel=_GATES,
    ),
]
Require = Annotated[
    list[str] | None,
    typer.Option(help="Artifact file that must have run, else exit 4 (repeatable).", rich_help_panel=_GATES),
]
Junit = Annotated[
    Path | None, typer.Option(help="Also write the gates' outcomes as JUnit XML.", rich_help_panel=_OUTPUT)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.", rich_help_panel=_OUTPUT)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every source and check.", rich_help_panel=_OUTPUT)
]


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
    fields = {"min_agreement": min_agreement, "min_accuracy": min_accuracy, "max_baseline_drop": max_drop}
    return [f"verify.{name}={value}" for name, value in fields.items() if value is not None]


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
    from dfadc.contract import ContractFields  # noqa: PLC0415 -- keeps `--help` light

    return ContractFields(
        input_size=None if input_size is None else parse_input_size(input_size),
        mean=None if mean is None else _parse_floats("--mean", mean),
        std=None if std is None else _parse_floats("--std", std),
        num_classes=num_classes,
        task=None if task is None else task.value,
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
