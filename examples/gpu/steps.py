"""Stages: a step of recipe `auto`, on the Fashion-MNIST teacher and on a teacher of 224 px."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from clock import one_step, record_profile, seconds_of
from torchvision.models import resnet18, resnet50

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmark"))
from speed import as_teacher

from dfadc import ImageContract, load_recipe, load_teacher
from dfadc.distillation.step_plan import TRAINED_ON
from dfadc.errors import DfadcError
from dfadc.training.build import prepare

if TYPE_CHECKING:
    from record import Job, Record

    from dfadc.teacher.load import Teacher

FASHION_MNIST = Path(__file__).resolve().parents[1] / "fashion_mnist"
#: Steps that are timed.
_STEPS = 5


def step_of_auto(job: Job, record: Record) -> None:
    """A step of recipe `auto` on the Fashion-MNIST teacher: its time, the plan's estimate of it, and its kernels."""
    teacher = load_teacher(FASHION_MNIST / "teacher.safetensors")
    for precision in ("fp32",) if job.tiny else ("bf16", "fp32"):
        settings = [f"compute.precision={precision}", "compute.compile=off", *(["batch_size=8"] if job.tiny else [])]
        _time(f"auto {precision}", teacher, "compact_resnet_20", settings, job, record, profiled=True)


def step_at_224(job: Job, record: Record) -> None:
    """Steps of recipe `auto` at each batch size and precision: random ResNet-50 of 224 px to `mobilenetv2`."""
    teacher = random_teacher(job)
    for batch_size in (2,) if job.tiny else (64, 128, 256):
        for precision in ("fp32",) if job.tiny else ("bf16", "fp32"):
            settings = [f"compute.precision={precision}", "compute.compile=off", f"batch_size={batch_size}"]
            name = f"{precision}, batch {batch_size}"
            try:
                _time(name, teacher, "mobilenetv2", settings, job, record, profiled=batch_size == 128)
            except (torch.OutOfMemoryError, DfadcError) as exc:
                record.note(f"{name}: {str(exc).splitlines()[0]}")
            torch.cuda.empty_cache()


def random_teacher(job: Job) -> Teacher:
    """A torchvision ResNet-50 whose batch norms have seen noise; a ResNet-18 of 32 px, where all is tiny."""
    side = 32 if job.tiny else 224
    contract = ImageContract((3, side, side), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.manual_seed(0)
    network = resnet18() if job.tiny else resnet50()
    network.to(job.device).train()
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(16, *contract.input_size, device=job.device))
    return as_teacher(network.to("cpu"), "torchvision:resnet18" if job.tiny else "torchvision:resnet50", contract)


def _time(
    name: str, teacher: Teacher, student: str, settings: list[str], job: Job, record: Record, *, profiled: bool
) -> None:
    if job.is_cuda:
        torch.cuda.reset_peak_memory_stats(job.device)
    with prepare(teacher, student, recipe=load_recipe("auto", settings), device=str(job.device)) as training:
        plan, run = training.plan(), training.run
        step, steps = one_step(run), 1 if job.tiny else _STEPS
        seconds_of(step, job.device, 1 if job.tiny else 2)
        seconds = seconds_of(step, job.device, steps)
        images = run.recipe.batch_size * run.plan.mean(TRAINED_ON)
        peak = torch.cuda.max_memory_allocated(job.device) if job.is_cuda else 0
        record.row(
            f"Steps of auto, {teacher.architecture} to {student}",
            setting=name,
            **{
                "step, ms": 1e3 * seconds,
                "estimate of the plan, ms": 1e3 * plan.estimate.seconds_per_step,
                "images/s": images / seconds,
                "peak memory, GB": peak / 1e9,
                "peak of the plan, GB": plan.estimate.peak_bytes / 1e9,
            },
        )
        if profiled:
            record_profile(record, name, step, job.device, count=1)
