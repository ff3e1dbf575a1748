"""One run of a distillation: planned, started or resumed, and trained to its end."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from dfadc.distillation.checkpoint import load_checkpoint
from dfadc.distillation.compute.allocator import kept_memory
from dfadc.distillation.loop import distill
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_parameters
from dfadc.provenance import environment
from dfadc.recipe.load import change_recipe, recipe_to_toml
from dfadc.recipe.resolve import warm_up_notes
from dfadc.run_folder import SCHEMA, RunFolder
from dfadc.storage import atomic_write_text, sha256_file, write_json
from dfadc.training.budget import FEW_STEPS, Budget
from dfadc.training.callbacks import Callbacks
from dfadc.training.cost import Estimate, estimate
from dfadc.training.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dfadc.distillation.distillation import Distillation
    from dfadc.recipe.schema import StudentSettings
    from dfadc.student.build import Student
    from dfadc.training.callbacks import Reading
    from dfadc.training.plan import NetworkFlops


class Training:
    """A distillation with the facts that plan and record tell. It is planned, started and run within its context.

    Args:
        run: not yet started.
        student: that is trained.
        flops: of the networks.
        notes: for the plan.
    """

    def __init__(self, run: Distillation, *, student: Student, flops: NetworkFlops, notes: tuple[str, ...]) -> None:
        self.run = run
        self.student = student
        self.flops = flops
        self.notes = notes
        self.recipe = run.recipe
        self.teacher = run.teacher
        self.policy = run.policy
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(kept_memory(self.policy.device))
            stack.enter_context(self.run)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the teacher as it was, and the memory."""
        self._open.close()

    def plan(self, minutes: float | None = None) -> Plan:
        """Measures the cost of a step and turns a time budget into steps.

        Raises:
            DfadcError: the budget is too small for the recipe's warm-up.
        """
        budget = Budget(self.recipe.steps, minutes)
        cost = estimate(self.run, budget)
        steps = self.run.state.num_steps = budget.num_steps(cost.seconds_per_step)
        self.recipe = self.run.recipe = change_recipe(self.recipe, {"steps": steps})
        notes = (*self.notes, *warm_up_notes(self.recipe))
        if minutes is not None and steps < FEW_STEPS:
            few = f"{minutes:g} minutes are {steps} steps here, and a student needs hundreds"
            ways = ["more minutes", "a smaller student"]
            if self.student.stem == "small":
                ways.append("student.stem=default, which costs less")
            notes = (*notes, f"{few}: take {' or '.join(ways)}")
        return self._plan(cost, notes)

    def start(self, folder: RunFolder, plan: Plan) -> None:
        """Writes record and recipe into the run's folder."""
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
                "requested_weights": teacher.requested_weights,
                "requested_output": teacher.requested_output,
                "sha256": teacher.sha256,
                "kind": str(teacher.kind),
                "architecture": teacher.architecture,
                "num_parameters": teacher.num_parameters,
                "flops": self.flops.teacher,
            },
            "student": {
                "architecture": student.architecture,
                "stem": student.stem,
                "weights": _start_weights(plan.recipe.student),
                "num_parameters": student.num_parameters,
                "flops": self.flops.student,
            },
            "contract": teacher.contract.to_dict(),
            "contract_sources": dict(teacher.contract_sources),
        }
        write_json(folder.record_file, record)
        atomic_write_text(folder.recipe, recipe_to_toml(plan.recipe))
        write_json(folder.record_file, {**record, "status": "running"})

    def resume(self, folder: RunFolder) -> Plan:
        """Goes back to the run's last checkpoint, from which it computes as it did before; the plan is what is left.

        Raises:
            DfadcError: there is no checkpoint that can be read, or it is of another recipe.
        """
        checkpoint, state = load_checkpoint(folder.checkpoints), self.run.state
        try:
            state.load_state_dict(checkpoint)
        except (KeyError, RuntimeError, TypeError, ValueError) as exc:
            raise DfadcError(
                f"the checkpoint in {folder.checkpoints} does not fit the run's recipe: {str(exc).splitlines()[0]}",
                f"{folder.recipe} must be the one that the run began with",
            ) from exc
        folder.clear_leftovers()
        folder.trim_metrics(state.step)
        record = folder.record()
        cost = Estimate(**record["estimate"])
        if cost.compiled:
            self.run.compile()
        note = f"going on from step {state.step} of {self.recipe.steps}"
        return self._plan(cost, (*record["notes"], *self._changes_since(record), note))

    def train(self, folder: RunFolder, on_reading: Callable[[Reading], None]) -> None:
        """Trains to the end, writing metrics and checkpoints.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
            TrainingDiverged: the numbers could not be kept finite.
            StorageFailed: a checkpoint could not be written.
        """
        callbacks = Callbacks(self.run, folder, on_reading)
        with callbacks.stopping_on_signals():
            distill(self.run, self.run.state.num_steps, callbacks.on_step)
        callbacks.save()

    def _changes_since(self, record: Mapping[str, Any]) -> Iterator[str]:
        """A note on what differs from the run's beginning, and rounds differently."""
        here = {
            "device": str(self.policy.device),
            "precision": self.policy.precision,
            "threads": torch.get_num_threads(),
        }
        began = {**{name: record.get(name) for name in here}, "precision": record["precision"].split(" ")[0]}
        if changed := [f"{name} {here[name]} instead of {was}" for name, was in began.items() if was != here[name]]:
            yield f"{', '.join(changed)}: the rest of the run is not bit for bit what it would have been"

    def _plan(self, cost: Estimate, notes: tuple[str, ...]) -> Plan:
        parameters = {
            "teacher": self.teacher.num_parameters,
            "student": self.student.num_parameters,
            "generator": count_parameters(self.run.state.generator.module),
        }
        precision = f"{self.policy.precision} ({self.policy.reason})"
        flops = self.flops.per_step(self.recipe)
        return Plan(self.recipe, str(self.policy.device), precision, cost, notes, parameters, flops)


def _start_weights(rules: StudentSettings) -> dict[str, str] | None:
    """The file that the student starts from, and its SHA-256; None where there is none."""
    return {"path": rules.weights, "sha256": sha256_file(Path(rules.weights))} if rules.weights else None
