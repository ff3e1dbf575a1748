"""Asks students of a teacher without batch norm the gate's samples, and compares with real images.

    PYTHONPATH=examples/modern python examples/modern/ask_the_gate.py vgg.pt vgg vgg_half_width

makes students of every origin (of the teacher's weights, fitted in closed form, trained on procedural images, on those
and a generator's, or on real ones; with noise in their weights, or pruned) and prints how often each agrees with the
teacher on 2,000 test images, on the samples that a run asks, and on those of a prior generator of 300 updates.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import networks
import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from dfadc import load_teacher
from dfadc.cli.script import run_as_script
from dfadc.contract import ContractFields
from dfadc.distillation.images import augmentation
from dfadc.distillation.images.procedural import draw_procedural
from dfadc.distillation.losses.discrepancy import kl, scaled_l1
from dfadc.networks.names import build_architecture
from dfadc.recipe.load import load_recipe
from dfadc.sampling.generators import draw, draw_prior, train_prior
from dfadc.student.inherit import SmallerCopy, copy_weights_, find_copy
from dfadc.training.build import prepare

# The examples are scripts, not a package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "fashion_mnist"))
from train_teacher import CONTRACT, Split, load_fashion_mnist, normalise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dfadc.teacher.load import Teacher

NUM_TEST, NUM_SAMPLES, NUM_TRAINING = 2000, 1024, 3000
#: Updates of 64 images after which a student in training is asked.
_ASKED_AT = {"procedural": (30, 150, 600), "procedural and generated": (50, 500), "real": (20, 60, 200, 500)}
_NOISE, _PRUNED = (0.05, 0.15, 0.3, 0.5), (0.3, 0.6)
_BATCH_SIZE, _RATE, _SHIFT = 64, 2e-3, 2


def main(
    teacher_file: Annotated[Path, typer.Argument(help="Of Fashion-MNIST.")],
    architecture: Annotated[str, typer.Argument(help="A network of networks.py, or any that dfadc knows.")],
    student: Annotated[str, typer.Argument(help="Likewise; the teacher made smaller.")],
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the four idx files; else downloads.")] = None,
) -> None:
    """Prints a row for each student, and for both kinds of samples the mean gap and the rank correlation."""
    fields = ContractFields(input_size=CONTRACT.input_size, num_classes=10, mean=CONTRACT.mean, std=CONTRACT.std)
    teacher = load_teacher(teacher_file, architecture=_named(architecture), fields=fields)
    train, test = (load_fashion_mnist(data, split=split) for split in ("train", "test"))
    samples, generated = draw_samples(teacher, student)
    images = {"real": normalise(test.images[:NUM_TEST], CONTRACT), **samples}
    rows = []
    for kind, network in make_students(teacher, student, train, generated):
        rows.append([agreement(network, teacher.module, each) for each in images.values()])
        print(f"{kind:26}", *(f"{name} {rate:.1%}" for name, rate in zip(images, rows[-1], strict=True)), flush=True)
    real, *others = np.array(rows).T
    for name, found in zip(samples, others, strict=True):
        gap, rank = np.abs(found - real).mean(), np.corrcoef(_ranks(real), _ranks(found))[0, 1]
        best, worst = found[real > 0.85].min(initial=1), found[real < 0.6].max(initial=0)
        print(
            f"{name}: {len(rows)} students, mean gap {100 * gap:.1f} points, rank correlation {rank:.3f}; those above "
            f"85% on real images agree on {best:.1%} or more, those below 60% on {worst:.1%} or less"
        )


def draw_samples(teacher: Teacher, student: str) -> tuple[dict[str, Tensor], Tensor]:
    """The samples of a run and those of a prior generator, and more of that to train on."""
    recipe = load_recipe("auto", ["steps=1800", "compute.precision=fp32"])
    with prepare(teacher, _named(student), recipe=recipe, device="cpu") as training:
        prior = train_prior(training.run, 300)
        asked = torch.cat([*draw_prior(training.run, None, NUM_SAMPLES)])
        drawn = torch.cat([*draw(prior, NUM_SAMPLES + NUM_TRAINING)])
    return {"samples": asked, "prior generator": drawn[:NUM_SAMPLES]}, drawn[NUM_SAMPLES:]


def make_students(teacher: Teacher, name: str, train: Split, generated: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """Students with their origins; each is valid until the next."""
    torch.manual_seed(0)
    student = build_architecture(_named(name), teacher.contract).module
    found = find_copy(student, teacher.module, normalise(train.images[:2], CONTRACT))
    assert isinstance(found, SmallerCopy), found
    copy_weights_(student, teacher.module, found)
    yield "inherited", student
    with prepare(teacher, _named(name), recipe=load_recipe("auto", ["steps=1"]), device="cpu") as training:
        student = training.run.state.student.average
    yield "closed form", student
    procedural = draw_procedural(NUM_TRAINING, teacher.contract, torch.Generator().manual_seed(7))
    sources: dict[str, tuple[Tensor, Tensor | None]] = {
        "procedural": (procedural, None),
        "procedural and generated": (torch.cat([procedural, generated]), None),
        "real": (normalise(train.images[:20_000], CONTRACT), train.labels[:20_000]),
    }
    best = student
    for kind, (images, labels) in sources.items():
        trained = copy.deepcopy(student)
        for updates in fit(trained, teacher, images, labels, _ASKED_AT[kind]):
            yield f"{kind}, {updates} updates", trained
        best = trained if kind == "procedural" else best
    for share in _NOISE:
        yield f"noise {share}", _damaged(best, partial(_noise, share=share))
    for share in _PRUNED:
        yield f"pruned {share:.0%}", _damaged(best, partial(_small_ones, share=share))


def fit(
    student: nn.Module, teacher: Teacher, images: Tensor, labels: Tensor | None, asked_at: tuple[int, ...]
) -> Iterator[int]:
    """Trains on the teacher's logits or on labels by Adam, and gives the updates after which it is asked."""
    rng = torch.Generator().manual_seed(0)
    student.requires_grad_()
    optimizer = torch.optim.Adam(student.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, asked_at[-1])
    for update in range(1, asked_at[-1] + 1):
        chosen = torch.randint(len(images), (_BATCH_SIZE,), generator=rng)
        batch = augmentation.shift(images[chosen], _SHIFT, rng)
        logits = student.train()(batch)
        if labels is None:
            with torch.no_grad():
                wanted = teacher.logits(batch)
            loss = scaled_l1(logits, wanted) + kl(logits, wanted, temperature=1.0)
        else:
            loss = functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if update in asked_at:
            yield update


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Share of images (N, C, H, W) to which both give the same class."""
    student.eval()
    same = [student(batch).argmax(1) == teacher(batch).argmax(1) for batch in images.split(500)]
    return float(torch.cat(same).float().mean())


def _named(name: str) -> str:
    return f"networks:{name}" if hasattr(networks, name) else name


@torch.no_grad()
def _damaged(student: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    damaged = copy.deepcopy(student)
    for tensor in damaged.parameters():
        if tensor.ndim > 1:
            tensor.add_(change(tensor))
    return damaged


def _noise(tensor: Tensor, share: float) -> Tensor:
    """Normal noise of that share of the weights' standard deviation."""
    return share * tensor.std() * torch.randn_like(tensor)


def _small_ones(tensor: Tensor, share: float) -> Tensor:
    """The negative of that share of the weights that are nearest to 0, and 0 elsewhere."""
    limit = tensor.abs().flatten().kthvalue(int(share * tensor.numel())).values
    return -tensor * (tensor.abs() <= limit)


def _ranks(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    return values.argsort().argsort()


if __name__ == "__main__":
    run_as_script(main)
