"""Schema of a recipe: every setting of a run, declared once with bound, unit and description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Decibels = Annotated[float, Field(ge=0, le=200)]
Limit = Share | Literal["off"]


class Settings(BaseModel):
    """Frozen and strict: unknown keys are refused, values are never silently converted."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class OptimizerSettings(Settings):
    """The student's optimizer."""

    kind: Literal["sgd", "nesterov", "adam"] = Field(
        "sgd", description="SGD with momentum 0.9, plain or Nesterov; Adam"
    )
    learning_rate: float = Field(0.1, gt=0, le=100, description="rate at the start of the schedule")
    weight_decay: float = Field(0.0, ge=0, le=1, description="L2 penalty on every parameter")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 switches clipping off")


class AdamSettings(Settings):
    """The generator's optimizer: Adam without weight decay."""

    learning_rate: float = Field(1e-3, gt=0, le=100, description="rate at the start of the schedule")
    momentum: float = Field(0.9, ge=0, lt=1, description="Adam's first beta")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 switches clipping off")


class ScheduleSettings(Settings):
    """Learning rate over the run; positions are shares of the run, so they scale with ``steps``."""

    kind: Literal["constant", "cosine", "step"] = Field("constant", description="cosine falls to 0 at the end")
    warmup: Share = Field(0.0, description="share of the run over which the rate rises linearly from 0")
    milestones: tuple[Share, ...] = Field((), description="shares of the run at which a step schedule decays")
    decay: float = Field(0.1, gt=0, le=1, description="factor at each milestone of a step schedule")


class StudentSettings(Settings):
    """The student, its loss and its updates."""

    stem: Literal["auto", "small", "default"] = Field(
        "auto", description="small: less downsampling; auto: as the teacher's in a copy of it, else by size"
    )
    weights: str = Field("", description="safetensors or state-dict file to start from; empty: random initialisation")
    inherit: Literal["auto", "on", "off"] = Field(
        "off", description="without a file: start from the teacher's weights where the student is it made smaller"
    )
    steps: int = Field(5, ge=1, le=1000, description="student updates on new images in each step")
    start: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the run before generated images: it sees procedural ones until then, or none",
    )
    l1: Weight = Field(1.0, description="weight of mean |student logits - teacher logits|")
    scaled_l1: Weight = Field(0.0, description="weight of the same in units of the teacher's logit scale")
    kl: Weight = Field(0.0, description="weight of KL(teacher ‖ student)")
    temperature: float = Field(1.0, gt=0, le=100, description="temperature T of the KL term, scaled by T²")
    hints: Weight = Field(
        0.0, description="weight of the distance to the teacher's layers where the student is the teacher made narrower"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay per student update of the exported average; 0: off")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="its optimizer")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="its learning rate over the run")


class GeneratorSettings(Settings):
    """The generator, its loss and its updates."""

    architecture: Literal["scalable", "paper", "paper_a", "paper_b"] = Field(
        "scalable",
        description="scalable: 1-8 M parameters at any size, images bounded to pixels; paper: A up to 64 px, B above, "
        "images standardised by tanh and batch norm",
    )
    width: float = Field(1.0, gt=0, le=4, description="channels of a scalable generator, as a multiple of its own")
    latent_dim: int = Field(256, ge=1, le=8192, description="length Z of a latent")
    latents: Literal["fresh", "noisy"] = Field(
        "fresh", description="fresh in every update, or noisy embeddings of balanced classes that each step trains"
    )
    on_collapse: Literal["reset", "warn"] = Field("reset", description="response where few classes are drawn")
    steps: int = Field(1, ge=1, le=10_000, description="generator updates in each step")
    discrepancy: Literal["l1", "log_l1", "scaled_l1", "agree_kl"] = Field(
        "l1", description="what the generator maximises; agree_kl: KL where both predict the same class"
    )
    adversarial_start: float = Field(0.0, ge=0, lt=1, description="share of the run before the discrepancy counts")
    student_mode: Literal["eval", "train"] = Field(
        "eval", description="train: the student's batch norm sees and absorbs the generator update's images"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay per generator update of its average; 0: off")
    optimizer: AdamSettings = Field(AdamSettings(), description="its optimizer")
    schedule: Literal["as_student", "constant"] = Field(
        "as_student", description="its learning rate over the run: the student's schedule without warm-up, or constant"
    )


class PriorSettings(Settings):
    """Generator terms read off the teacher; 0 switches a term off."""

    batch_norm: Weight = Field(0.0, description="distance to the teacher's batch-norm statistics")
    batch_norm_momentum: float = Field(0.0, ge=0, lt=1, description="weight of earlier steps in what is matched")
    one_hot: Weight = Field(
        0.0, description="cross-entropy of the teacher to its argmax, or to the classes of noisy latents"
    )
    balance: Weight = Field(0.0, description="negative entropy of the teacher's mean prediction")


class ReplaySettings(Settings):
    """Images that the student is trained on besides fresh ones of the generator."""

    share: Share = Field(0.0, description="share of a student batch drawn from the replay buffer, moved by up to 2 px")
    procedural_share: float = Field(
        0.0, ge=0, lt=1, description="share drawn by rule: shapes on each other and noise, which look like nothing"
    )
    balanced: bool = Field(default=False, description="every class has the same chance of being replayed")
    capacity: int = Field(20_000, ge=1, description="images in the replay buffer; at most 512 MiB")
    repeats: int = Field(
        0, ge=0, le=1000, description="further student updates in each step, on images and logits of the last batches"
    )


class AugmentationSettings(Settings):
    """Changes to the student's images."""

    mixup: Share = Field(0.0, description="share of the student batches that are mixed up")


class ComputeSettings(Settings):
    """Precision, batches and compilation."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: whichever takes less time")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto measures")
    micro_batch: int = Field(
        0, ge=0, le=65536, description="images of an update at once, gradients added up; 0: the whole batch"
    )


class CalibrationSettings(Settings):
    """The generated images that INT8 is calibrated with."""

    num_images: int = Field(1024, ge=8, le=65536, description="calibration images, all sources together")


class GateSettings(Settings):
    """Gates of a verification. "off" switches one off; but for the extra ones the verdict is then NOT GATED."""

    gate_source: Literal["generator", "snapshots", "prior", "adversary"] = Field(
        "prior", description="samples that the gate looks at"
    )
    min_agreement: Limit = Field(0.7, description="lower Wilson bound of student = teacher on the gate's source")
    min_coverage: Limit = Field(0.5, description="normalised entropy of the teacher's classes over the samples")
    min_class_agreement: Limit = Field(
        "off", description="extra: lower Wilson bound of network = teacher in each class of 30 samples or more"
    )
    min_accuracy: Limit = Field("off", description="extra: lower Wilson bound of the accuracy on labelled images")
    boundary_width: int = Field(
        0, ge=0, le=64, description="segmentation: pixels so near a border between classes count neither way"
    )
    max_baseline_drop: Limit = Field(0.01, description="drop against a baseline that fails where p < .05 besides")
    compare_export: bool = Field(
        default=True, description="artifacts are held against their own fp32 student (comparison A, and its drop)"
    )
    min_fp16_agreement: Limit = Field(0.995, description="lower Wilson bound of fp16 artifact = student outside ties")
    min_int8_agreement: Limit = Field(0.97, description="lower Wilson bound of INT8 artifact = student outside ties")
    min_int8_sqnr_db: Decibels | Literal["off"] = Field(
        20.0, description="signal to noise of an INT8 artifact's logits, in dB"
    )


class VerifySettings(GateSettings):
    """The frozen samples and the gates."""

    num_samples: int = Field(
        2048,
        ge=1,
        le=1_000_000,
        description="frozen verification samples of all sources, half of them the gate's; of large images fewer, but "
        "enough for the gates",
    )

    def count_of(self, source: str, total: int) -> int:
        """Samples of one source out of ``total``: half are the gate's, the other three share the rest."""
        return total // 2 if source == self.gate_source else total // 6


class LogSettings(Settings):
    """Intervals of logging and saving."""

    interval: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_minutes: float = Field(2.0, gt=0, description="minutes between checkpoints")
    tensorboard: bool = Field(default=False, description="TensorBoard event files beside metrics.jsonl")


class Recipe(Settings):
    """Every setting of a run.

    One *step* is ``student.steps`` student updates, ``replay.repeats`` more on batches that are not new, and
    ``generator.steps`` generator updates.
    """

    name: str = Field("custom", description="recipe that the run started from")
    description: str = Field("", description="one line for `dfadc recipe list`")
    steps: int = Field(1000, ge=0, description="training steps; 0: the student stays as it starts")
    batch_size: int = Field(64, ge=2, le=65536, description="images of each update")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw")
    student: StudentSettings = Field(StudentSettings(), description="the student's side")
    generator: GeneratorSettings = Field(GeneratorSettings(), description="the generator's side")
    prior: PriorSettings = Field(PriorSettings(), description="generator terms read off the teacher")
    replay: ReplaySettings = Field(ReplaySettings(), description="images of earlier steps")
    augmentation: AugmentationSettings = Field(AugmentationSettings(), description="changes to the student's images")
    compute: ComputeSettings = Field(ComputeSettings(), description="precision and compilation")
    calibration: CalibrationSettings = Field(CalibrationSettings(), description="images for INT8")
    verify: VerifySettings = Field(VerifySettings(), description="samples and gates")
    log: LogSettings = Field(LogSettings(), description="logging and checkpoints")
    #: Dotted paths that the user set, which no overlay changes. No setting: neither saved nor compared.
    _assigned: frozenset[str] = PrivateAttr(frozenset())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def assigned(self) -> frozenset[str]:
        """Dotted paths of settings that the user chose, by ``--set``, a flag, a file or :func:`change_recipe`."""
        return self._assigned

    def with_assigned(self, paths: frozenset[str]) -> Recipe:
        """A copy whose settings at ``paths`` count as chosen by the user."""
        copy = self.model_copy()
        copy._assigned = paths  # noqa: SLF001 -- pydantic keeps frozen models from any other way
        return copy

    def is_assigned(self, path: str) -> bool:
        """True if the user chose the setting at ``path``, by itself or as part of a section."""
        return any(f"{path}.".startswith(f"{assigned}.") for assigned in self._assigned)

    @property
    def student_updates(self) -> int:
        """Student updates in each step."""
        return self.student.steps + self.replay.repeats

    @property
    def first_update(self) -> float:
        """Share of the run before the student's first update: without procedural images it waits for generated ones."""
        return 0.0 if self.replay.procedural_share else self.student.start


def num_micro_batches(batch_size: int, micro_batch: int) -> int:
    """Micro-batches of an update, each of ``micro_batch`` images at most; 0 is no bound."""
    return -(-batch_size // micro_batch) if micro_batch else 1
