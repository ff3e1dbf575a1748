"""Every setting of a run, declared once with bound, unit and description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Decibels = Annotated[float, Field(ge=0, le=200)]
Limit = Share | Literal["off"]


#: Discrepancies that a temperature softens.
TEMPERED = ("kl", "js", "agree_kl")


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

    stem: Literal["auto", "small", "default"] = Field(
        "auto", description="small: less downsampling; auto: as the teacher's in a copy of it, else by size"
    )
    weights: str = Field("", description="safetensors or state-dict file to start from; empty: random initialisation")
    inherit: Literal["auto", "on", "off"] = Field(
        "off", description="without a file: start from the teacher's weights where the student is it made smaller"
    )
    inherited_rate: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate of a student that starts from the teacher's weights"
    )
    steps: int = Field(5, ge=1, le=1000, description="student updates in each step of the game")
    start: float = Field(0.0, ge=0, lt=1, description="share of the run before its first update")
    l1: Weight = Field(1.0, description="weight of mean |student logits - teacher logits|")
    scaled_l1: Weight = Field(0.0, description="weight of the same in units of the teacher's logit scale")
    kl: Weight = Field(0.0, description="weight of KL(teacher ‖ student)")
    temperature: float = Field(1.0, gt=0, le=100, description="temperature T of the KL term, scaled by T²")
    hints: Weight = Field(
        0.0, description="weight of the distance to the teacher's layers where the student is the teacher made narrower"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay per student update of the exported average; 0: off")
    quantise_from: Share = Field(1.0, description="share of the run from which it plays rounded to INT8; 1: never")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="how the student moves")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="its learning rate over the run")


class GeneratorSettings(Settings):
    """The generator's side of the game."""

    architecture: Literal["scalable", "paper", "paper_a", "paper_b", "free_pixels"] = Field(
        "scalable",
        description="scalable: 1-8 M parameters at any size; paper: A up to 64 px, B above; free_pixels: no network",
    )
    width: float = Field(1.0, gt=0, le=4, description="channels of a scalable generator, as a multiple of its own")
    output: Literal["standardised", "pixels"] = Field(
        "standardised", description="tanh + batch norm without affine, or bounded to [0, 1] and normalised"
    )
    latent_dim: int = Field(256, ge=0, le=8192, description="length Z of a latent; 0: that of free_pixels")
    latents: Literal["fresh", "shared", "optimised", "noisy"] = Field(
        "fresh",
        description="fresh in every update, shared by a step, optimised with the generator, or noisy class embeddings",
    )
    latent_rate: float = Field(
        1.0, gt=0, le=1e4, description="rate of latents that move, as a multiple of the generator's"
    )
    reset_every: int = Field(0, ge=0, description="steps after which the generator begins anew; 0: never")
    meta: Literal["off", "fomaml", "reptile"] = Field("off", description="each step begins from meta-learned weights")
    low_resolution: float = Field(
        0.0, ge=0, lt=1, description="share of the run, from its beginning, that is played with smaller images"
    )
    low_resolution_scale: float = Field(0.5, gt=0, lt=1, description="their sides as a share of the input size")
    on_collapse: Literal["reset", "warn"] = Field("reset", description="what is done where few classes are drawn")
    steps: int = Field(1, ge=1, le=10_000, description="generator updates in each step of the game")
    discrepancy: Literal["l1", "log_l1", "scaled_l1", "kl", "js", "agree_kl"] = Field(
        "l1", description="what the generator maximises; agree_kl: KL where both predict the same class"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="temperature T of kl, js and agree_kl, scaled by T²")
    adversarial: Weight = Field(1.0, description="weight of the discrepancy")
    adversarial_start: Share = Field(0.0, description="share of the run before the discrepancy counts")
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
    batch_norm_momentum: float = Field(0.0, ge=0, lt=1, description="weight of earlier steps in what is matched")
    one_hot: Weight = Field(0.0, description="cross-entropy of the teacher to its targets")
    targets: Literal["argmax", "balanced"] = Field("argmax", description="its own classes, or given balanced ones")
    balance: Weight = Field(0.0, description="negative entropy of the teacher's mean prediction")
    balance_momentum: float = Field(0.0, ge=0, lt=1, description="weight of earlier batches in that mean")
    activation: Weight = Field(0.0, description="minus the mean |feature| that the teacher's last layer reads")
    total_variation: Weight = Field(0.0, description="mean absolute difference of neighbouring pixels")
    l2: Weight = Field(0.0, description="mean square of the normalised pixels")


class ReplaySettings(Settings):
    """What the student is shown besides fresh images of the generator: above all those of earlier steps."""

    share: Share = Field(0.0, description="share of a student batch drawn from the replay ring")
    average_share: float = Field(0.0, ge=0, lt=1, description="share drawn by the averaged generator")
    procedural_share: float = Field(
        0.0, ge=0, lt=1, description="share drawn by rule: shapes on each other and noise, which look like nothing"
    )
    balanced: bool = Field(default=False, description="every class has the same chance of being replayed")
    capacity: int = Field(20_000, ge=1, description="images in the replay ring")
    echoes: int = Field(
        0, ge=0, le=1000, description="further student updates in each step, on images and answers of the last ones"
    )
    max_mebibytes: int = Field(512, ge=1, description="bound on the ring's memory; capacity is cut to it")
    reservoir: int = Field(1024, ge=0, description="images kept over the whole run, for calibration")


class AugmentationSettings(Settings):
    """What happens to the student's images."""

    shift: int = Field(0, ge=0, le=64, description="replayed images move by up to this many pixels")
    flip: bool = Field(default=False, description="replayed images are mirrored left-right with probability 1/2")
    mixup: Share = Field(0.0, description="share of the student batches that are mixed up")


class ComputeSettings(Settings):
    """Precision, memory format and compilation."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: whichever takes less time")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto measures")
    channels_last: bool = Field(default=True, description="NHWC memory format")
    micro_batch: int = Field(
        0, ge=0, le=65536, description="images of an update at once, gradients added up; 0: the whole batch"
    )


class CalibrationSettings(Settings):
    """The generated images that INT8 is calibrated with; what the two generators leave comes from the reservoir."""

    num_images: int = Field(1024, ge=8, le=65536, description="calibration images, all sources together")
    generator: Share = Field(0.25, description="share drawn by the final averaged generator")
    prior: Share = Field(
        0.25, validate_default=True, description="share drawn by a generator trained against the teacher alone"
    )

    @field_validator("prior")
    @classmethod
    def _leave_something(cls, prior: float, info: ValidationInfo) -> float:
        generator = info.data.get("generator", 0.0)
        if generator + prior > 1 + 1e-9:
            raise PydanticCustomError(
                "shares", "with calibration.generator = {generator} the shares exceed 1", info.data
            )
        return prior

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source by name; they add up to 1."""
        rest = max(0.0, round(1 - self.generator - self.prior, 9))  # exactly 0 where the others take all
        return {"reservoir": rest, "generator": self.generator, "prior": self.prior}


class GateSettings(Settings):
    """What a verification demands. "off" switches a gate off; but for the extra ones the verdict is then NOT GATED."""

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
    max_student_drop: Limit = Field(0.01, description="drop under the fp32 student that fails where p < .05 besides")
    max_baseline_drop: Limit = Field(0.01, description="drop against a baseline that fails where p < .05 besides")
    min_fp32_agreement: Limit = Field("off", description="lower Wilson bound of fp32 artifact = student outside ties")
    min_fp16_agreement: Limit = Field(0.995, description="lower Wilson bound of fp16 artifact = student outside ties")
    min_int8_agreement: Limit = Field(0.97, description="lower Wilson bound of INT8 artifact = student outside ties")
    max_fp32_disagreements: Annotated[int, Field(ge=0)] | Literal["off"] = Field(
        0, description="answers of an fp32 artifact that differ from its fp32 student's, ties apart"
    )
    max_fp32_logit_error: Annotated[float, Field(ge=0)] | Literal["off"] = Field(
        1e-4, description="largest error of an fp32 artifact's logits as a share of their range"
    )
    min_fp16_sqnr_db: Decibels | Literal["off"] = Field(
        40.0, description="signal to noise of an fp16 artifact's logits, in dB"
    )
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
    snapshots: int = Field(8, ge=0, le=64, description="moments of the run at which samples are set aside")
    prior_steps: int = Field(
        600, ge=0, description="updates of the prior generator; at most a third of the generator's"
    )
    sharpen_steps: int = Field(
        40,
        ge=0,
        description="updates of the pixels of the prior generator's samples, where the teacher has batch norms; "
        "at most a quarter of the images it answers in the game",
    )
    procedural_share: Share = Field(0.25, description="of those samples, where they are sharpened: procedural images")
    adversary_steps: int = Field(150, ge=0, description="updates of each adversary; at most a tenth of the generator's")
    adversary_restarts: int = Field(2, ge=1, le=100, description="adversaries trained; the most harmful one is kept")
    required: tuple[str, ...] = Field((), description="artifact files that must have run")

    @field_validator("snapshots", "prior_steps", "adversary_steps")
    @classmethod
    def _feed_the_gate(cls, amount: int, info: ValidationInfo) -> int:
        source = info.data.get("gate_source")
        if amount == 0 and info.field_name in {source, f"{source}_steps"}:
            raise PydanticCustomError(
                "samples", "verify.gate_source = {gate_source} would have no samples to look at", info.data
            )
        return amount

    def count_of(self, source: str, total: int) -> int:
        """Of ``total`` samples, those of one source: half are the gate's, the other three share the rest."""
        return total // 2 if source == self.gate_source else total // 6


class LogSettings(Settings):
    """How often the run is looked at and saved."""

    interval: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_minutes: float = Field(2.0, gt=0, description="minutes between checkpoints")
    tensorboard: bool = Field(default=False, description="TensorBoard event files beside metrics.jsonl")


class Recipe(Settings):
    """Every setting of a run.

    One *step* of the game is ``student.steps`` student updates, ``replay.echoes`` more on images that are not new, and
    ``generator.steps`` generator updates.
    """

    name: str = Field("custom", description="recipe that the run started from")
    description: str = Field("", description="one line for `dfadc recipe list`")
    adapt: bool = Field(default=False, description="drop terms that this teacher cannot give (said in the run's plan)")
    pinned: tuple[str, ...] = Field((), description="fields set by --set: recipe auto leaves them as they are")
    steps: int = Field(1000, ge=1, description="steps of the game")
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

    @property
    def student_updates(self) -> int:
        """Student updates in each step of the game."""
        return self.student.steps + self.replay.echoes


def num_micro_batches(batch_size: int, micro_batch: int) -> int:
    """Micro-batches of an update, each of ``micro_batch`` images at most; 0 is no bound."""
    return -(-batch_size // micro_batch) if micro_batch else 1
