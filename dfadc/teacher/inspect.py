"""Description of a teacher file, made without running any code of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.networks.names import resolve_architecture
from dfadc.networks.norm_layers import NormLayer, find_norm_layers
from dfadc.networks.user_code import UserCodeFailed
from dfadc.preprocessing import Preprocessing
from dfadc.storage import sha256_file
from dfadc.teacher.candidates import learned_of
from dfadc.teacher.file_kind import CODE_KINDS, FileKind, sniff_kind
from dfadc.teacher.plan import TeacherPlan, build_planned_module, freeze_, plan_teacher
from dfadc.teacher.prefixes import prefixes_of
from dfadc.teacher.probe import run_dry
from dfadc.teacher.read import read_teacher_file
from dfadc.teacher.unknown_file import describe_unknown, weights_in_folder

_OF_CHECKPOINT = "safe: tensors and layers of torch, torchvision and timm are restored, all else becomes inert records"
_OF_CODE = "is code: loading it can run anything, so it needs --trust-teacher; it was not loaded"
#: Kind -> risk of loading it.
_SAFETY = {
    FileKind.SAFETENSORS: "safe: holds tensors only",
    FileKind.CHECKPOINT: _OF_CHECKPOINT,
    FileKind.LEGACY_CHECKPOINT: _OF_CHECKPOINT,
    **dict.fromkeys(CODE_KINDS, _OF_CODE),
    FileKind.ONNX: "safe: a graph of operators, without code",
    FileKind.KERAS: "safe: Keras's own layers alone are built; a file with code needs --trust-teacher",
}
_UNSAFE = "not loaded: this kind cannot be a teacher, for it has no gradients"
#: Weights that are listed from either end.
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Unknown:
    """Stand-in for a value that is not known, with the reason."""

    reason: str

    def __str__(self) -> str:
        return f"unknown, because {self.reason}"


@dataclass(frozen=True, slots=True)
class TeacherReport:
    """Description of a teacher file, as ``dfadc inspect`` shows it.

    Args:
        path: the file.
        kind: by bytes.
        size_bytes: of the file.
        sha256: of the file's bytes.
        safety: risk of loading it.
        foreign_globals: classes and functions in its pickle that became inert records.
        architecture: canonical name or class.
        stem: of the network.
        num_parameters: of the network, or of the weights where no network could be built.
        flops: floating-point operations for one image, 2 for each multiply-add.
        norm_layers: all normalisation layers.
        contract: field -> value.
        contract_sources: field -> where its value came from.
        outputs: result of a dry run on random images.
        notes: decisions and oddities.
        weights: names and shapes of the weights, where no network was found for them.
        output: the logits among several outputs, where the user or a sidecar names them.
        problem: why the file is no teacher as it is; None where it is one, or a kind that is not opened untrusted.
        hint: remedy for the problem.
    """

    path: Path
    kind: FileKind
    size_bytes: int
    sha256: str
    safety: str
    foreign_globals: tuple[str, ...]
    architecture: str | Unknown
    stem: str | Unknown
    num_parameters: int | Unknown
    flops: int | Unknown
    norm_layers: tuple[NormLayer, ...] | Unknown
    contract: Mapping[str, object]
    contract_sources: Mapping[str, str]
    outputs: str | Unknown
    notes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    output: str | None = None
    problem: str | None = None
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an unknown one reads ``unknown, because …``."""
        names = [member.name for member in dataclass_fields(self) if member.name not in ("output", "hint")]
        return {name: _plain(getattr(self, name)) for name in names}


def inspect_teacher(
    path: Path | str,
    *,
    architecture: str | None = None,
    fields: ContractFields | None = None,
    weights: str | None = None,
    output: str | None = None,
) -> TeacherReport:
    """Reports on a teacher file of any kind without running code of it.

    Args:
        path: the file.
        architecture: this and the others as for ``load_teacher``.
        fields: what is known of the contract.
        weights: weights to take of several.
        output: logits to take of several outputs.

    Raises:
        DfadcError: there is no such file, it cannot be read, or it is a damaged archive; or the code of a factory that
            ``architecture`` names fails.
    """
    path = Path(path)
    kind = sniff_kind(path)
    if kind is FileKind.FOLDER:
        path = weights_in_folder(path)
        kind = sniff_kind(path)
    basis = TeacherReport(
        path=path,
        kind=kind,
        size_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        safety=f"not loaded: {describe_unknown(path)[0]}" if kind is FileKind.UNKNOWN else _SAFETY.get(kind, _UNSAFE),
        foreign_globals=(),
        **_all_unknown("the file was not opened"),
    )
    try:
        contents = read_teacher_file(path, weights=weights, output=output)
    except DfadcError as exc:
        is_known = kind in (*CODE_KINDS, FileKind.ENGINE) or isinstance(exc, RequirementMissing)
        problem = None if is_known else exc.message
        return replace(basis, **_all_unknown(exc.message), problem=problem, hint=exc.hint)
    basis = replace(
        basis,
        output=contents.output,
        notes=contents.notes,
        num_parameters=sum(tensor.numel() for tensor in learned_of(contents.state_dict or {}).values())
        if contents.module is None
        else count_parameters(contents.module),
        foreign_globals=contents.inert,
    )
    try:
        plan = plan_teacher(contents, architecture=architecture, fields=fields or ContractFields())
    except DfadcError as exc:
        reason = _reason(exc, architecture)
        unknown = {key: value for key, value in _all_unknown(reason).items() if key != "num_parameters"}
        listed = _list_weights(contents.tensors)
        return replace(basis, **unknown, weights=listed, problem=exc.message, hint=exc.hint)
    return _inspect_planned(plan, basis, architecture)


def _inspect_planned(plan: TeacherPlan, basis: TeacherReport, architecture: str | None) -> TeacherReport:
    """Completes the description with layers, FLOPs and outputs, as far as the network can be built."""
    report = replace(
        basis,
        architecture=plan.identity.architecture,
        stem=plan.identity.stem,
        contract=_contract_values(plan.fields),
        contract_sources=plan.sources,
        notes=plan.notes,
    )
    try:
        module = freeze_(build_planned_module(plan))
    except DfadcError as exc:
        unknown = Unknown(_reason(exc, architecture))
        # A size that nobody states is a gap; anything else is an error of the file or the flags.
        problem = None if plan.fields.input_size is None else exc.message
        return replace(report, flops=unknown, norm_layers=unknown, outputs=unknown, problem=problem, hint=exc.hint)
    report = replace(report, num_parameters=count_parameters(module), norm_layers=find_norm_layers(module))
    try:
        tried = run_dry(plan, module)
    except DfadcError as exc:
        unknown = Unknown(_reason(exc, architecture))
        return replace(report, flops=unknown, outputs=unknown, hint=exc.hint)
    flops = count_flops(tried.module, plan.known_input_size())
    noun = "labels" if tried.task == "multilabel" else "classes"
    known = replace(plan.fields, num_classes=tried.num_classes, task=tried.task)
    return replace(
        report,
        flops=Unknown("it could not be counted") if flops is None else flops,
        outputs=f"finite logits of {tried.num_classes} {noun} ({tried.task}), with a gradient to the images",
        contract=_contract_values(known),
        contract_sources={**tried.sources, **plan.sources},
        notes=(*report.notes, *tried.warnings),
    )


def _reason(exc: DfadcError, architecture: str | None) -> str:
    """Reason for an unknown value; an error in the code of a factory that the user named is raised."""
    is_factory = architecture is not None and resolve_architecture(architecture).library == "factory"
    if is_factory and isinstance(exc, UserCodeFailed):
        raise exc
    return exc.message


def _list_weights(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Names and shapes of the first and last weights, and how many begin with each prefix."""
    shown = [f"{name} {'x'.join(map(str, tensor.shape)) or 'scalar'}" for name, tensor in tensors.items()]
    if len(shown) > 2 * _SHOWN:
        shown[_SHOWN:-_SHOWN] = [f"… {len(shown) - 2 * _SHOWN} more …"]
    prefixes = ", ".join(f"{name}.* {count}" for name, count in prefixes_of(tensors).items())
    return (*shown, f"prefixes: {prefixes}")


def _all_unknown(reason: str) -> dict[str, Any]:
    unknown = Unknown(reason)
    names = ("architecture", "stem", "num_parameters", "flops", "norm_layers", "outputs")
    return {
        **dict.fromkeys(names, unknown),
        "contract": _contract_values(ContractFields(), reason),
        "contract_sources": {},
    }


def _contract_values(fields: ContractFields, reason: str = "no source says it") -> dict[str, object]:
    return {
        member.name: Unknown(reason) if (value := getattr(fields, member.name)) is None else value
        for member in dataclass_fields(fields)
    }


def _plain(value: object) -> object:
    """A value of the report as JSON has it."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, NormLayer):
        return asdict(value)
    if isinstance(value, Preprocessing):
        return value.to_dict()
    if isinstance(value, Unknown | Path | FileKind):
        return str(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
