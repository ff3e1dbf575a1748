"""One run of the game, from a loaded teacher to a finished student: prepared, planned, started, resumed, played."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from dfadc.distillation.checkpoint import load_checkpoint
from dfadc.distillation.compute.allocator import kept_memory
from dfadc.distillation.compute.policy import choose_device, choose_policy, fit_policy
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.loop import distill
from dfadc.distillation.objectives import Game
from dfadc.distillation.state import Players
from dfadc.errors import DfadcError
from dfadc.networks.adaptation import place
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.recipe.load import change_recipe, recipe_to_toml
from dfadc.recipe.resolve import StudentFacts, resolve_recipe, warm_up_notes
from dfadc.run_folder import SCHEMA, RunFolder, environment
from dfadc.storage import atomic_write_text, sha256_file, write_json
from dfadc.student.build import Student, build_student, with_logits_like
from dfadc.student.inherit import corresponding_layers, inherit
from dfadc.training.arithmetic import flops_per_step
from dfadc.training.callbacks import Watch
from dfadc.training.cost import Estimate, estimate, steps_for_minutes
from dfadc.training.sample_size import check_gates_can_pass, size_note
from dfadc.training.teacher_check import diagnose_teacher
from dfadc.training.tensorboard import require_tensorboard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from dfadc.recipe.schema import Recipe, StudentSettings
    from dfadc.teacher.load import Teacher
    from dfadc.training.callbacks import Reading


#: Minutes that buy fewer steps of the game than this are remarked upon: no student was any good after so few.
FEW_STEPS = 100


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost, said before its first step.

    Args:
        recipe: as resolved for this teacher and budget.
        device: where it runs.
        precision: of matrix work, with the reason.
        estimate: measured seconds a step, memory, and whether it is compiled.
        notes: what was adapted or is worth knowing.
        parameters: of teacher, student and generator.
        flops_per_step: arithmetic of an average step, 2 for each multiply-add; None where it could not be counted.
    """

    recipe: Recipe
    device: str
    precision: str
    estimate: Estimate
    notes: tuple[str, ...]
    parameters: dict[str, int]
    flops_per_step: float | None

    @property
    def images(self) -> int:
        """Images that the players will be updated on in all."""
        student, generator = self.recipe.student, self.recipe.generator
        student_steps = self.recipe.steps - math.ceil(student.start * self.recipe.steps)
        return self.recipe.batch_size * (
            student_steps * self.recipe.student_updates + self.recipe.steps * generator.steps
        )

    @property
    def seconds(self) -> float:
        """Estimated seconds of the whole game."""
        return self.recipe.steps * self.estimate.seconds_per_step


class Training:
    """A game made ready for one teacher and one student.

    Args:
        teacher: loaded and frozen.
        student: freshly built, or with weights to start from.
        recipe: as asked for.
        device: where to play.
        is_resolved: the recipe is that of a run that began, and is taken as it is.

    Raises:
        DfadcError: the recipe does not fit, or the teacher cannot teach.
    """

    def __init__(
        self, teacher: Teacher, student: Student, *, recipe: Recipe, device: torch.device, is_resolved: bool
    ) -> None:
        diagnosis = diagnose_teacher(teacher.module, teacher.batch_norms, teacher.contract)
        self.batch_norms = diagnosis.batch_norms
        notes: tuple[str, ...] = ()
        if not is_resolved:
            num_hints = len(corresponding_layers(student.module, teacher.module))
            facts = StudentFacts(student.architecture, student.is_inherited, num_hints)
            recipe, notes = resolve_recipe(
                recipe, teacher.contract, num_batch_norms=len(self.batch_norms), student=facts
            )
        check_gates_can_pass(recipe.verify, teacher.contract)
        if (fewer := size_note(recipe.verify, teacher.contract)) is not None:
            notes = (*notes, fewer)
        student = with_logits_like(student, teacher.contract, diagnosis.logit_size)
        self.teacher = teacher
        self.student = student
        self.logit_size = diagnosis.logit_size
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        generator = build_generator(recipe.generator, teacher.contract)
        # Counted before the game hangs its hooks on the teacher.
        self.teacher_flops = count_flops(teacher.module, teacher.contract.input_size)
        self.student_flops = count_flops(student.module, teacher.contract.input_size)
        self.generator_flops = count_flops(generator, (recipe.generator.latent_dim,))
        self.notes = (*teacher.warnings, *student.notes, *self._size_notes(), *diagnosis.notes, *notes)
        largest = max(math.inf if each is None else each for each in self._flops)
        self.policy, changed = fit_policy(choose_policy(recipe.compute, device, largest), student.module)
        self.notes = (*self.notes, *changed)
        self.game = self._build_game(generator)
        self.notes = (*self.notes, *self.game.fp32_layers.notes)
        self._open = ExitStack()
        self._open.callback(self.game.close)

    def plan(self, minutes: float | None = None) -> Plan:
        """Measures what a step costs, turns a time budget into steps, and says what will be done.

        Raises:
            DfadcError: the budget is too small for the recipe's warm-up.
        """
        cost = estimate(self.game, self.recipe.compute.compile, minutes)
        if minutes is not None:
            self.recipe = change_recipe(self.recipe, {"steps": steps_for_minutes(minutes, cost.seconds_per_step)})
            self.game.recipe = self.recipe
        notes = (*self.notes, *warm_up_notes(self.recipe))
        if minutes is not None and self.recipe.steps < FEW_STEPS:
            few = f"{minutes:g} minutes are {self.recipe.steps} steps here, and a student needs hundreds"
            ways = ["more minutes", "a smaller student"]
            if self.student.stem == "small":
                ways.append("student.stem=default, which costs less")
            notes = (*notes, f"{few}: take {' or '.join(ways)}")
        return self._plan(str(self.policy.device), self._precision, cost, notes)

    def start(self, folder: RunFolder, plan: Plan) -> None:
        """Writes what the run is into its folder."""
        teacher, student = self.teacher, self.student
        record = {
            "schema": SCHEMA,
            "status": "starting",  # nothing is lost with a run that ends here
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **environment(),
            "device": plan.device,
            "precision": plan.precision,
            "threads": torch.get_num_threads(),
            "seed": plan.recipe.seed,
            "estimate": asdict(plan.estimate),
            "notes": list(plan.notes),
            "teacher": {
                "path": str(teacher.path.resolve()),
                "requested_architecture": teacher.requested_architecture,
                "sha256": teacher.sha256,
                "kind": str(teacher.kind),
                "architecture": teacher.architecture,
                "num_parameters": teacher.num_parameters,
                "flops": self.teacher_flops,
            },
            "student": {
                "architecture": student.architecture,
                "stem": student.stem,
                "weights": _start_weights(plan.recipe.student),
                "num_parameters": student.num_parameters,
                "flops": self.student_flops,
            },
            "contract": teacher.contract.to_dict(),
            "contract_sources": dict(teacher.contract_sources),
        }
        write_json(folder.record_file, record)
        atomic_write_text(folder.recipe, recipe_to_toml(plan.recipe))
        write_json(folder.record_file, {**record, "status": "running"})

    def resume(self, folder: RunFolder) -> Plan:
        """Goes back to the run's last checkpoint, to compute as the run did before, and says what is left.

        Raises:
            DfadcError: there is no checkpoint that can be read, or it is of another recipe.
        """
        state = load_checkpoint(folder.checkpoints)
        try:
            self.game.players.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as exc:
            raise DfadcError(
                f"the checkpoint in {folder.checkpoints} does not fit the run's recipe: {str(exc).splitlines()[0]}",
                f"{folder.recipe} must be the one that the run began with",
            ) from exc
        folder.clear_leftovers()
        folder.trim_metrics(self.game.players.step)
        record = folder.record()
        cost = Estimate(**record["estimate"])
        if cost.compiled:
            self.game.compile()
        note = f"going on from step {self.game.players.step} of {self.recipe.steps}"
        notes = (*record["notes"], *self._changes_since(record), note)
        return self._plan(str(self.policy.device), self._precision, cost, notes)

    @property
    def _precision(self) -> str:
        return f"{self.policy.precision} ({self.policy.reason})"

    def _changes_since(self, record: Mapping[str, Any]) -> Iterator[str]:
        """What is not as it was where the run began, and rounds differently."""
        here = {
            "device": str(self.policy.device),
            "precision": self.policy.precision,
            "threads": torch.get_num_threads(),
        }
        began = {**{name: record.get(name) for name in here}, "precision": record["precision"].split(" ")[0]}
        if changed := [f"{name} {here[name]} instead of {was}" for name, was in began.items() if was != here[name]]:
            yield f"{', '.join(changed)}: the rest of the run is not bit for bit what it would have been"

    def play(self, folder: RunFolder, on_reading: Callable[[Reading], None]) -> None:
        """Plays to the end, writing metrics and checkpoints.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
            TrainingDiverged: the game could not be kept finite.
            StorageFailed: a checkpoint could not be written.
        """
        watch = Watch(self.game, folder, on_reading)
        with watch.stopping_on_signals():
            distill(self.game, self.recipe.steps, watch.on_step)
        watch.save()

    def __enter__(self) -> Self:
        self._open.enter_context(kept_memory(self.policy.device))
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the teacher as it was found, and the memory."""
        self._open.close()

    def _plan(self, device: str, precision: str, cost: Estimate, notes: tuple[str, ...]) -> Plan:
        parameters = {
            "teacher": self.teacher.num_parameters,
            "student": self.student.num_parameters,
            "generator": count_parameters(self.game.players.generator.module),
        }
        teacher, student, generator = self._flops
        flops = None
        if teacher is not None and student is not None and generator is not None:
            flops = flops_per_step(self.recipe, teacher=teacher, student=student, generator=generator)
        return Plan(self.recipe, device, precision, cost, notes, parameters, flops)

    @property
    def _flops(self) -> tuple[int | None, int | None, int | None]:
        return self.teacher_flops, self.student_flops, self.generator_flops

    def _size_notes(self) -> Iterator[str]:
        """What a student does not save."""
        teacher, student = self.teacher, self.student
        if student.num_parameters >= teacher.num_parameters:
            yield (
                f"the student {student.architecture} ({student.num_parameters:,} parameters) is not smaller than "
                f"the teacher ({teacher.num_parameters:,})"
            )
        if self.student_flops is None or self.teacher_flops is None:
            yield "FLOPs are unknown: teacher or student cannot be counted"
        elif self.student_flops >= self.teacher_flops:
            yield (
                f"the student {student.architecture} ({self.student_flops / 1e6:,.1f} MFLOPs an image) computes no "
                f"less than the teacher ({self.teacher_flops / 1e6:,.1f})"
            )

    def _build_game(self, generator: nn.Module) -> Game:
        recipe, contract, policy = self.recipe, self.teacher.contract, self.policy
        teacher = place(self.teacher.module, policy.device, policy.memory_format)
        players = Players(
            self.student.module,
            generator,
            recipe=recipe,
            contract=contract,
            policy=policy,
            logit_size=self.logit_size,
        )
        return Game(teacher, self.batch_norms, players=players, recipe=recipe, contract=contract, policy=policy)


def prepare(teacher: Teacher, student: str, *, recipe: Recipe, device: str, has_checkpoint: bool = False) -> Training:
    """Builds the student that a recipe and a teacher's contract call for, and the game.

    Args:
        teacher: loaded and frozen.
        student: its architecture.
        recipe: as asked for.
        device: where to play.
        has_checkpoint: the student's weights come from one, so that the file it started from is not needed any more.

    Raises:
        DfadcError: unknown student, a recipe that does not fit, a device that is not there.
        RequirementMissing: a package that the recipe needs is not there.
    """
    require_tensorboard(recipe.log)
    rules = recipe.student
    if rules.weights and has_checkpoint:
        rules = rules.model_copy(update={"weights": "", "inherit": "off"})
    elif rules.weights:
        recipe = change_recipe(recipe, {"student.weights": str(Path(rules.weights).resolve())})
    torch.manual_seed(recipe.seed)
    built = _build_student(student, teacher, rules)
    return Training(teacher, built, recipe=recipe, device=choose_device(device), is_resolved=has_checkpoint)


def _start_weights(rules: StudentSettings) -> dict[str, str] | None:
    """The file that the student starts from, and its SHA-256; None where there is none."""
    return {"path": rules.weights, "sha256": sha256_file(Path(rules.weights))} if rules.weights else None


def _build_student(name: str, teacher: Teacher, rules: StudentSettings) -> Student:
    """The student, with weights to start from where there are any.

    A smaller copy of the teacher has the teacher's stem: images that are small for its kind were not for the teacher.
    """
    weights = Path(rules.weights) if rules.weights else None
    built = build_student(name, teacher.contract, stem=rules.stem, weights=weights)
    if weights is not None or rules.inherit == "off":
        return built
    if rules.stem == "auto" and built.stem == "small":
        copy = inherit(build_student(name, teacher.contract, stem="default"), teacher, "auto")
        if copy.is_inherited:
            note = "default stem, as the teacher has; --set student.stem=small keeps maps larger, from random weights"
            return replace(copy, notes=(*copy.notes, note))
    return inherit(built, teacher, rules.inherit)
