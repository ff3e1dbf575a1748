"""Preparation of a run: teacher, student and recipe become a :class:`dfadc.training.run.Training`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dfadc.distillation.compute.policy import choose_device, choose_policy, fit_policy, images_at_once
from dfadc.distillation.distillation import Distillation
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.state import LEAST_STOCK, TrainingState
from dfadc.networks.flops import count_flops
from dfadc.networks.norm_layers import find_norm_layers
from dfadc.recipe.load import change_recipe
from dfadc.recipe.resolve import StudentFacts, resolve_recipe
from dfadc.student.build import build_student, with_logits_like
from dfadc.student.inherit import corresponding_layers, inherit
from dfadc.teacher.load import Placement
from dfadc.training.closed_form import fit_note, fit_student_, layers_to_fit
from dfadc.training.plan import NetworkFlops, size_notes
from dfadc.training.run import Training
from dfadc.training.sample_size import check_gates_can_pass, size_note
from dfadc.training.stock import class_notes, draw_stock, num_images
from dfadc.training.teacher_check import probe_teacher
from dfadc.training.tensorboard import require_tensorboard

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.recipe.schema import Recipe, StudentSettings
    from dfadc.student.build import Student
    from dfadc.teacher.load import Teacher


def prepare(
    teacher: Teacher,
    student: str,
    *,
    recipe: Recipe,
    device: str,
    has_checkpoint: bool = False,
    is_for_plan: bool = False,
) -> Training:
    """Builds the student that a recipe and a teacher's contract call for, and the training.

    Args:
        teacher: loaded and frozen.
        student: its architecture.
        recipe: as asked for; of a run that goes on, as it was resolved.
        device: of the training.
        has_checkpoint: the run goes on from one; the file that the student started from is not needed any more.
        is_for_plan: it is planned and never trained, so the student's layers need not be fitted first.

    Raises:
        DfadcError: unknown student, a recipe that does not fit, a teacher that cannot teach, a missing device.
        RequirementMissing: a package that the recipe needs is not there.
    """
    require_tensorboard(recipe.log)
    teacher = teacher.placed(Placement())  # a run before this one may have moved its network
    rules = recipe.student
    if rules.weights and has_checkpoint:
        rules = rules.model_copy(update={"weights": "", "inherit": "off"})
    elif rules.weights:
        recipe = change_recipe(recipe, {"student.weights": str(Path(rules.weights).resolve())})
    torch.manual_seed(recipe.seed)
    built = _build_student(student, teacher, rules)
    hints = corresponding_layers(built.module, teacher.module, built.copy)
    probe = probe_teacher(teacher)
    resolved: tuple[str, ...] = ()
    if not has_checkpoint:
        facts = StudentFacts(built.architecture, built.is_inherited, _has_batch_norm(built.module), len(hints))
        num_batch_norms = len(probe.batch_norms)
        recipe, resolved = resolve_recipe(recipe, teacher.contract, num_batch_norms=num_batch_norms, student=facts)
    check_gates_can_pass(recipe.verify, teacher.contract)
    fewer = size_note(recipe.verify, teacher.contract)
    built = with_logits_like(built, teacher.contract, probe.logit_size)
    torch.manual_seed(recipe.seed)
    generator = build_generator(recipe.generator, teacher.contract)
    flops = _count_flops(teacher, built, generator, recipe.generator.latent_dim)
    notes = (*teacher.warnings, *built.notes, *size_notes(teacher, built, flops), *probe.notes, *resolved)
    largest = max(math.inf if each is None else each for each in (flops.teacher, flops.student, flops.generator))
    policy, changed = fit_policy(choose_policy(recipe.compute, choose_device(device), largest), built.module)
    teacher = teacher.placed(policy.placement(images_at_once(recipe, teacher.contract)))
    stock, fitted = _start(built, teacher, recipe, flops, is_for_plan=is_for_plan, has_checkpoint=has_checkpoint)
    notes = (*notes, *fitted)
    state = TrainingState(
        built.module,
        generator,
        recipe=recipe,
        contract=teacher.contract,
        policy=policy,
        logit_size=probe.logit_size,
        stock=None if built.is_inherited else stock,  # in a good start's longer run new images are worth more
    )
    hints = corresponding_layers(built.module, teacher.module, built.copy)  # where both are now
    run = Distillation(teacher, probe.batch_norms, state, recipe=recipe, policy=policy, hints=hints)
    notes = (*notes, *((fewer,) if fewer else ()), *changed, *run.fp32_layers.notes)
    return Training(run, student=built, flops=flops, notes=notes)


def _start(
    student: Student,
    teacher: Teacher,
    recipe: Recipe,
    flops: NetworkFlops,
    *,
    is_for_plan: bool,
    has_checkpoint: bool,
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The stock of procedural images, if there is need of one, and notes on it and on a student that is fitted."""
    layers = layers_to_fit(student, teacher) if student.is_inherited and not has_checkpoint else []
    number = num_images(flops, len(layers))
    notes = (fit_note(len(layers), number),) if layers else ()
    is_shown = not student.is_inherited and recipe.replay.procedural_share > 0 and number >= LEAST_STOCK
    if is_for_plan or not (layers or is_shown):
        return None, notes
    stock = draw_stock(number, teacher, recipe.seed)
    if layers:
        fit_student_(student, teacher, layers, stock)
    return stock, (*notes, *class_notes(stock, teacher))


def _count_flops(teacher: Teacher, student: Student, generator: torch.nn.Module, latent_dim: int) -> NetworkFlops:
    """Counted before any hooks are on the networks."""
    size = teacher.contract.input_size
    return NetworkFlops(
        count_flops(teacher.module, size), count_flops(student.module, size), count_flops(generator, (latent_dim,))
    )


def _has_batch_norm(network: torch.nn.Module) -> bool:
    return any(layer.has_statistics for layer in find_norm_layers(network))


def _build_student(name: str, teacher: Teacher, rules: StudentSettings) -> Student:
    """The student, with weights to start from where there are any.

    A smaller copy of the teacher has the teacher's stem: images that are small for its kind were not for the teacher.
    """
    weights = Path(rules.weights) if rules.weights else None
    built = build_student(name, teacher.contract, stem=rules.stem, weights=weights)
    if weights is not None:
        return inherit(built, teacher, "off")
    if rules.inherit != "off" and rules.stem == "auto" and built.stem == "small":
        copy = inherit(build_student(name, teacher.contract, stem="default"), teacher, "auto")
        if copy.is_inherited:
            note = "default stem, as the teacher has; --set student.stem=small keeps maps larger, from random weights"
            return replace(copy, notes=(*copy.notes, note))
    return inherit(built, teacher, rules.inherit)
