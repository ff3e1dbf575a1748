"""Makes students of very different quality of one teacher, and keeps them.

    python examples/believability/make_students.py examples/fashion_mnist/teacher.safetensors \
        --student compact_resnet_20 --data test_10000.npz --out believability/fashion_mnist

distils with several recipes and seeds, keeps the averaged student at several steps of each run, and damages some of
them on purpose. `students/` of the folder then holds, for each, its weights, its run's own samples, and its accuracy on
the labelled images. What is there is not made again, so the command goes on where it was stopped. `ask_students.py`
asks them the samples of every source, `relate.py` reads the answers.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dfadc import load_recipe, load_teacher
from dfadc.distillation.loop import distill
from dfadc.evaluation.labelled_images import load_evaluation_data
from dfadc.networks.network_file import NetworkMetadata, load_network, save_network
from dfadc.sampling.freeze import freeze_samples
from dfadc.storage import write_json
from dfadc.training.build import prepare
from dfadc.training.callbacks import draw_snapshot_samples, snapshot_size, snapshot_steps

if TYPE_CHECKING:
    from dfadc.distillation.loop import StepLosses
    from dfadc.evaluation.labelled_images import EvaluationData
    from dfadc.teacher.load import Teacher
    from dfadc.training.run import Training


class Run(NamedTuple):
    """A game to play.

    Args:
        recipe: its name.
        overrides: settings besides.
        marks: steps after which the averaged student is kept; the last one ends the run.
        seed: of the run.
    """

    recipe: str
    overrides: tuple[str, ...]
    marks: tuple[int, ...]
    seed: int = 0


RUNS = {
    "auto-seed1": Run("auto", (), (25, 50, 100, 200, 400), seed=1),
    "auto-seed0": Run("auto", (), (25, 50, 100, 200, 400, 800)),
    "auto-short-seed2": Run("auto", (), (100,), seed=2),
    "random-start": Run("auto", ("student.inherit=off", "replay.procedural_share=0"), (50, 100, 200, 400)),
    "dfad": Run("dfad", ("batch_size=64",), (100, 300)),
    "auto-no-replay": Run("auto", ("replay.share=0", "augmentation.shift=0", "augmentation.mixup=0"), (200,)),
    "auto-no-priors": Run("auto", ("prior.batch_norm=0", "prior.one_hot=0", "prior.balance=0"), (200,)),
}
#: Runs whose last student is damaged, and how: noise in standard deviations of a tensor, share of weights set to zero,
#: bits.
DAMAGED = ("auto-seed1", "auto-seed0")
DAMAGE = (
    ("noise", 0.1),
    ("noise", 0.2),
    ("noise", 0.3),
    ("noise", 0.45),
    ("prune", 0.4),
    ("prune", 0.6),
    ("bits", 3.0),
)


def damage(student: nn.Module, kind: str, amount: float, *, seed: int = 0) -> nn.Module:
    """A copy whose weights of two and more dimensions are noisy, pruned by magnitude, or rounded to a few bits."""
    damaged = copy.deepcopy(student)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (parameter for parameter in damaged.parameters() if parameter.dim() >= 2):
            if kind == "noise":
                weight.add_(torch.randn(weight.shape, generator=dice) * weight.std(), alpha=amount)
            elif kind == "prune":
                weight.masked_fill_(weight.abs() <= weight.abs().flatten().quantile(amount), 0.0)
            else:
                step = weight.abs().max() / (2 ** (amount - 1) - 1)
                weight.copy_((weight / step).round() * step)
    return damaged


@torch.no_grad()
def accuracy(network: nn.Module, data: EvaluationData) -> float:
    """Share of labelled images answered with their label."""
    answers = [network.eval()(torch.from_numpy(batch)).argmax(dim=1).numpy() for batch in data.batches(256)]
    return float((np.concatenate(answers) == data.labels).mean())


class Workshop:
    """Makes students of one teacher into one folder.

    Args:
        teacher: of all of them.
        student: architecture of all of them.
        data: labelled images, for evaluation alone.
        folder: where they go.
        seed: added to that of every run.
    """

    def __init__(self, *, teacher: Teacher, student: str, data: EvaluationData, folder: Path, seed: int) -> None:
        self.teacher = teacher
        self.student = student
        self.data = data
        self.folder = folder
        self.seed = seed
        self.teacher_accuracy = accuracy(teacher.module, data)

    def distil(self, name: str, *, scale: float) -> str:
        """Plays a run of ``RUNS``, every mark times ``scale``, unless its students are there; names the last one."""
        run = RUNS[name]
        marks = {step: f"{name}-{step}" for step in (max(1, round(mark * scale)) for mark in run.marks)}
        if not all(self._is_made(student) for student in marks.values()):
            settings = (*run.overrides, f"seed={run.seed + self.seed}", f"steps={max(marks)}", "compute.compile=off")
            recipe = load_recipe(run.recipe, settings)
            with prepare(self.teacher, self.student, recipe=recipe, device="cpu") as training:
                self._play(training, marks)
        return marks[max(marks)]

    def damage(self, name: str, kind: str, amount: float) -> None:
        """Keeps a damaged copy of a student, unless it is there; its run's samples stay what they were."""
        target = f"{name}-{kind}{amount:g}"
        if not self._is_made(target):
            student, metadata = load_network(self.folder / f"{name}.safetensors")
            damaged = damage(student, kind, amount, seed=self.seed)
            self._keep(target, damaged, metadata=metadata, samples=self._record(name)["samples"])

    def _is_made(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()

    def _play(self, training: Training, marks: dict[int, str]) -> None:
        run, recipe, built = training.run, training.recipe, training.student
        metadata = NetworkMetadata(built.architecture, built.stem, self.teacher.contract)

        def on_step(losses: StepLosses) -> None:
            if losses.step in snapshot_steps(recipe.steps) or losses.step == min(marks):
                draw_snapshot_samples(run, snapshot_size(recipe, self.teacher.contract))
            if losses.step in marks:
                name = marks[losses.step]
                freeze_samples(run).save(self.folder / f"{name}.samples.npz")
                self._keep(name, run.state.student.average, metadata=metadata, samples=f"{name}.samples.npz")

        distill(run, recipe.steps, on_step)

    def _record(self, name: str) -> dict[str, Any]:
        """Record of a student."""
        record: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return record

    def _keep(self, name: str, network: nn.Module, *, metadata: NetworkMetadata, samples: str) -> None:
        real = accuracy(network, self.data)
        save_network(
            self.folder / f"{name}.safetensors",
            network,
            architecture=metadata.architecture,
            stem=metadata.stem,
            contract=metadata.contract,
        )
        record = {"accuracy": real, "teacher_accuracy": self.teacher_accuracy, "samples": samples}
        write_json(self.folder / f"{name}.json", record)
        print(f"{name:28} accuracy {real:.1%}", flush=True)


def main() -> None:
    """Makes what is missing in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--student", required=True, help="architecture")
    parser.add_argument("--data", type=Path, required=True, help="labelled images: .npz or ImageFolder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every budget")
    parser.add_argument(
        "--seed", type=int, default=0, help="added to the seed of every run: other students of its kind"
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="play these runs only")
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher)
    folder = arguments.out / "students"
    folder.mkdir(parents=True, exist_ok=True)
    data = load_evaluation_data(arguments.data, teacher.contract)
    workshop = Workshop(teacher=teacher, student=arguments.student, data=data, folder=folder, seed=arguments.seed)
    for name in arguments.only:
        student = workshop.distil(name, scale=arguments.scale)
        for kind, amount in DAMAGE if name in DAMAGED else ():
            workshop.damage(student, kind, amount)


if __name__ == "__main__":
    main()
