"""The recipe: every setting of a run, declared once with bound, unit and description.

TOML files, ``--set path=value``, Python and the saved run all become one frozen :class:`Recipe`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class Settings(BaseModel):
    """Frozen and strict: unknown keys are refused, values are never silently converted."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class OptimizerSettings(Settings):
    """How a player moves."""

    kind: Literal["sgd", "adam"] = Field("sgd", description="SGD with momentum, or Adam")
    learning_rate: float = Field(0.1, gt=0, le=100, description="rate at the start of the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum, or Adam's first beta")
    second_beta: float = Field(0.999, ge=0, lt=1, description="Adam's second beta; SGD ignores it")
    nesterov: bool = Field(default=False, description="Nesterov momentum (SGD only)")
    weight_decay: float = Field(0.0, ge=0, le=1, description="L2 penalty on every parameter")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 switches clipping off")


class ScheduleSettings(Settings):
    """How a learning rate changes over the run; positions are shares of the run, so they scale with ``steps``."""

    kind: Literal["constant", "cosine", "step"] = Field("constant", description="cosine falls to 0 at the end")
    warmup: Share = Field(0.0, description="share of the run over which the rate rises linearly from 0")
    milestones: tuple[Share, ...] = Field((), description="shares of the run at which a step schedule decays")
    decay: float = Field(0.1, gt=0, le=1, description="factor at each milestone of a step schedule")


class StudentSettings(Settings):
    """The student's side of the game."""

    stem: Literal["auto", "small", "default"] = Field("auto", description="small: less downsampling for small inputs")
    weights: str = Field("", description="safetensors or state-dict file to start from; empty: random initialisation")
    steps: int = Field(5, ge=1, le=1000, description="student updates in each step of the game")
    l1: Weight = Field(1.0, description="weight of mean |student logits - teacher logits|")
    kl: Weight = Field(0.0, description="weight of KL(teacher ‖ student)")
    temperature: float = Field(1.0, gt=0, le=100, description="temperature T of the KL term, scaled by T²")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay per student update of the exported average; 0: off")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="how the student moves")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="its learning rate over the run")


class GeneratorSettings(Settings):
    """The generator's side of the game."""

    architecture: Literal["scalable", "paper", "paper_a", "paper_b"] = Field(
        "scalable", description="scalable: 1-8 M parameters at any size; paper: A up to 64 px, B above"
    )
    output: Literal["standardised", "pixels"] = Field(
        "standardised", description="tanh + batch norm without affine, or bounded to [0, 1] and normalised"
    )
    latent_dim: int = Field(256, ge=1, le=8192, description="length Z of a latent")
    steps: int = Field(1, ge=1, le=1000, description="generator updates in each step of the game")
    discrepancy: Literal["l1", "log_l1", "kl"] = Field("l1", description="what the generator maximises")
    adversarial: Weight = Field(1.0, description="weight of the discrepancy")
    student_mode: Literal["eval", "train"] = Field(
        "eval", description="train: the student's batch norm sees and absorbs the generator step's images"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay per generator update of its average; 0: off")
    optimizer: OptimizerSettings = Field(
        OptimizerSettings(kind="adam", learning_rate=1e-3), description="how the generator moves"
    )
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="its learning rate over the run")


class PriorSettings(Settings):
    """Generator terms read off the teacher; 0 switches a term off."""

    batch_norm: Weight = Field(0.0, description="distance to the teacher's batch-norm statistics")
    one_hot: Weight = Field(0.0, description="cross-entropy of the teacher to its own argmax")
    balance: Weight = Field(0.0, description="negative entropy of the teacher's mean prediction")
    total_variation: Weight = Field(0.0, description="mean absolute difference of neighbouring pixels")


class ReplaySettings(Settings):
    """Images of earlier steps, shown to the student again."""

    share: float = Field(0.0, ge=0, lt=1, description="share of a student batch drawn from the replay ring")
    capacity: int = Field(20_000, ge=1, description="images in the replay ring")
    max_mebibytes: int = Field(512, ge=1, description="bound on the ring's memory; capacity is cut to it")
    reservoir: int = Field(1024, ge=0, description="images kept over the whole run, for calibration")


class AugmentationSettings(Settings):
    """What happens to the student's images."""

    shift: int = Field(0, ge=0, le=64, description="replayed images move by up to this many pixels")
    flip: bool = Field(default=False, description="replayed images are mirrored left-right with probability 1/2")
    mixup: Share = Field(0.0, description="share of the student batches that are mixed up")


class ComputeSettings(Settings):
    """Precision, memory format and compilation."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: what the device computes")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto measures")
    channels_last: bool = Field(default=True, description="NHWC memory format")


class VerifySettings(Settings):
    """The frozen samples and the gates."""

    num_samples: int = Field(2048, ge=1, le=1_000_000, description="frozen verification samples, all sources together")
    snapshots: int = Field(8, ge=0, le=64, description="moments of the run at which samples are set aside")
    max_mebibytes: int = Field(64, ge=1, description="bound on the samples' size; num_samples is cut to it")
    gate_source: Literal["generator", "snapshots"] = Field("generator", description="samples that the gate looks at")
    min_agreement: Share | Literal["off"] = Field(
        0.7, description="lower Wilson bound of student = teacher on the gate's source"
    )
    min_coverage: Share = Field(0.5, description="normalised entropy of the teacher's classes over the samples")
    required: tuple[str, ...] = Field((), description="artifact files that must have run")


class LogSettings(Settings):
    """How often the run is looked at and saved."""

    interval: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_minutes: float = Field(2.0, gt=0, description="minutes between checkpoints")


class Recipe(Settings):
    """Every setting of a run.

    One *step* of the game is ``student.steps`` student updates followed by ``generator.steps`` generator updates.
    """

    name: str = Field("custom", description="recipe that the run started from")
    description: str = Field("", description="one line for `dfadc recipe list`")
    adapt: bool = Field(default=False, description="drop terms that this teacher cannot give (said in the run's plan)")
    steps: int = Field(1000, ge=1, description="steps of the game")
    batch_size: int = Field(64, ge=2, le=65536, description="images of each update")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw")
    student: StudentSettings = Field(StudentSettings(), description="the student's side")
    generator: GeneratorSettings = Field(GeneratorSettings(), description="the generator's side")
    prior: PriorSettings = Field(PriorSettings(), description="generator terms read off the teacher")
    replay: ReplaySettings = Field(ReplaySettings(), description="images of earlier steps")
    augmentation: AugmentationSettings = Field(AugmentationSettings(), description="changes to the student's images")
    compute: ComputeSettings = Field(ComputeSettings(), description="precision and compilation")
    verify: VerifySettings = Field(VerifySettings(), description="samples and gates")
    log: LogSettings = Field(LogSettings(), description="logging and checkpoints")


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, ``auto`` first."""
    folder = resources.files("dfadc.recipes")
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return tuple(sorted(names, key=lambda name: name != "auto"))


def load_recipe(source: str | Path = "auto", overrides: Sequence[str] = ()) -> Recipe:
    """Loads a shipped recipe by name or a TOML file by path, then applies ``path=value`` overrides.

    Args:
        source: a name from :func:`recipe_names`, or a path that ends in ``.toml``.
        overrides: e.g. ``"student.optimizer.learning_rate=0.05"``; the value is read as TOML, else as text.

    Raises:
        DfadcError: unknown recipe, unreadable file, unknown key (with its dotted path) or a value out of bound.
    """
    values = _read_toml(source)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise DfadcError(f"--set {override!r} is not path=value", "e.g. --set student.steps=10")
        _assign(values, path.strip(), _parse_value(text.strip()))
    return _validate(values, str(source))


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A copy of ``recipe`` with values replaced by dotted path, validated as a whole.

    Raises:
        DfadcError: unknown path or a value out of bound.
    """
    values = recipe.model_dump(mode="json")
    for path, value in changes.items():
        _assign(values, path, value)
    return _validate(values, recipe.name)


def recipe_from_dict(values: Mapping[str, Any], origin: str) -> Recipe:
    """Rebuilds a recipe from saved JSON values; ``origin`` names the file in errors."""
    return _validate(dict(values), origin)


def recipe_to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, one ``[section]`` for each nested part; :func:`load_recipe` reads it back."""
    lines: list[str] = []
    _emit(recipe.model_dump(mode="json"), (), lines)
    return "\n".join(lines) + "\n"


def describe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted path, bounds or choices, default, description) of every leaf field."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from describe_fields(kind, f"{prefix}{name}.")
            continue
        schema = model.model_json_schema()["properties"][name]
        yield f"{prefix}{name}", _bounds(schema), json.dumps(schema.get("default")), field.description or ""


def _bounds(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_bounds(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    signs = (("minimum", "≥ "), ("exclusiveMinimum", "> "), ("maximum", "≤ "), ("exclusiveMaximum", "< "))
    limits = [f"{sign}{schema[key]:g}" for key, sign in signs if key in schema]
    return " ".join([str(schema.get("type", "")), *limits])


def _read_toml(source: str | Path) -> dict[str, Any]:
    try:
        if str(source).endswith(".toml"):
            return tomllib.loads(Path(source).read_text(encoding="utf-8"))
        if str(source) in recipe_names():
            return tomllib.loads((resources.files("dfadc.recipes") / f"{source}.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise DfadcError(f"cannot read recipe {source}: {exc}", "a recipe is a TOML file") from exc
    raise DfadcError(f"unknown recipe {str(source)!r}", f"known: {', '.join(recipe_names())}; a file must end in .toml")


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise DfadcError(f"recipe field {'.'.join(sections[: depth + 1])} is a value, not a section (in {path})")
    values[last] = value


def _validate(values: dict[str, Any], origin: str) -> Recipe:
    try:
        # JSON mode: strict types, but lists still fit tuples. TOML's dates are no JSON: they count as text.
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as exc:
        problems = [_explain(error) for error in exc.errors()]
        raise DfadcError(
            f"recipe {origin}: " + "; ".join(problems), "`dfadc recipe show auto` lists every field"
        ) from exc


def _explain(error: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [name for name, *_ in describe_fields()]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        return f"unknown field {path!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
    return f"{path} = {json.dumps(error['input'], default=str)}: {error['msg']}"


def _emit(values: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    leaves = {name: value for name, value in values.items() if not isinstance(value, dict)}
    if path:
        lines.extend(["", f"[{'.'.join(path)}]"])
    for name, value in leaves.items():
        # JSON strings, numbers, booleans and lists are valid TOML, but for one character that only TOML forbids.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    for name, value in values.items():
        if isinstance(value, dict):
            _emit(value, (*path, name), lines)
