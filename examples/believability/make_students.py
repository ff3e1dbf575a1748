"""Makes students of very different quality of one teacher and asks each the samples of every source.

    python examples/believability/make_students.py examples/fashion_mnist/teacher.safetensors \
        --student compact_resnet_20 --data test_10000.npz --out believability/fashion_mnist

distils with several budgets, recipes and seeds, damages some of the students on purpose, and writes one file a student:
what teacher and student answer to each source's samples, and the real accuracy. A student that is there is not made
again, so the command goes on where it was stopped. `relate.py` reads the folder.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from dfadc import load_recipe, load_teacher, run_distillation
from dfadc.distillation.examiners import train_adversary, train_prior
from dfadc.finish import freeze_samples
from dfadc.models.network_file import load_network, save_network
from dfadc.training import prepare
from dfadc.verification.data import load_evaluation_data
from dfadc.verification.samples import SampleSet, StoredImages, dequantise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dfadc.models.teacher import Teacher
    from dfadc.verification.data import EvaluationData

#: Name -> recipe and overrides of a distilled student.
DISTILLED: dict[str, tuple[str, tuple[str, ...]]] = {
    **{
        f"auto-{steps}-seed{seed}": ("auto", (f"steps={steps}", f"seed={seed}"))
        for steps in (25, 50, 100, 200, 400, 800)
        for seed in (0, 1)
    },
    "auto-no-priors-200": ("auto", ("steps=200", "prior.batch_norm=0", "prior.one_hot=0", "prior.balance=0")),
    "auto-no-replay-200": ("auto", ("steps=200", "replay.share=0", "augmentation.shift=0", "augmentation.mixup=0")),
    "dfad-100": ("dfad", ("steps=100", "batch_size=64")),
    "dfad-300": ("dfad", ("steps=300", "batch_size=64")),
}
#: Students that are damaged, and how: noise in standard deviations of a tensor, share of weights set to zero, bits.
DAMAGED = ("auto-800-seed0", "auto-200-seed0")
DAMAGE = (
    ("noise", 0.1),
    ("noise", 0.2),
    ("noise", 0.3),
    ("noise", 0.45),
    ("prune", 0.4),
    ("prune", 0.6),
    ("bits", 3.0),
)


def damage(student: nn.Module, kind: str, amount: float) -> nn.Module:
    """A copy whose weights of two and more dimensions are noisy, pruned by magnitude, or rounded to a few bits."""
    damaged = copy.deepcopy(student)
    dice = torch.Generator().manual_seed(0)
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


@torch.no_grad()
def _answer(network: nn.Module, stored: StoredImages, samples: SampleSet) -> NDArray[np.float32]:
    images = torch.from_numpy(dequantise(stored, samples.contract))
    return torch.cat([network.eval()(batch) for batch in images.split(128)]).numpy()


class Bench:
    """Makes students of one teacher into one folder and measures each.

    Args:
        teacher: of all of them.
        student: architecture of all of them.
        data: labelled images, for evaluation alone.
        out: the folder.
        examiner_steps: updates of prior generator and adversary, the same for every student.
    """

    def __init__(self, *, teacher: Teacher, student: str, data: EvaluationData, out: Path, examiner_steps: int) -> None:
        self.teacher = teacher
        self.student = student
        self.data = data
        self.out = out
        steps = [f"verify.{name}_steps={examiner_steps}" for name in ("prior", "adversary")]
        # Ten times as many steps: an examiner never takes more than a tenth of its run.
        examiners = [*steps, f"steps={10 * max(1, examiner_steps)}", "verify.adversary_restarts=1"]
        self.recipe = load_recipe("auto", [*examiners, "compute.compile=off"])
        self.teacher_accuracy = accuracy(teacher.module, data)

    def distil(self, name: str, *, scale: float) -> None:
        """One of ``DISTILLED``, on its budget times ``scale``."""
        base, overrides = DISTILLED[name]
        folder = self._run(name)
        if not (folder / "samples.npz").exists():
            recipe = load_recipe(base, [*overrides, "compute.compile=off"])
            recipe = recipe.model_copy(update={"steps": max(1, round(recipe.steps * scale))})
            run_distillation(self.teacher, self.student, recipe=recipe, out=folder, force=True)
        self._measure(name, folder / "student.safetensors", folder / "samples.npz")

    def damage(self, name: str, kind: str, amount: float) -> None:
        """A student of :meth:`distil`, damaged."""
        folder = self._run(name)
        student, metadata = load_network(folder / "student.safetensors")
        weights = folder / f"{kind}{amount:g}.safetensors"
        save_network(
            weights,
            damage(student, kind, amount),
            architecture=metadata.architecture,
            stem=metadata.stem,
            contract=metadata.contract,
        )
        self._measure(f"{name}-{kind}{amount:g}", weights, folder / "samples.npz")

    def _run(self, name: str) -> Path:
        return self.out / "runs" / name

    def _measure(self, name: str, weights: Path, samples: Path) -> None:
        target = self.out / f"{name}.npz"
        if target.exists():
            return
        asked = self._ask(weights, SampleSet.load(samples))
        real = accuracy(load_network(weights)[0], self.data)
        np.savez(
            target,
            source=asked.source,
            sources=np.array(asked.sources),
            teacher_logits=asked.teacher_logits,
            student_logits=asked.student_logits,
            accuracy=np.array(real),
            teacher_accuracy=np.array(self.teacher_accuracy),
        )
        agreed = asked.teacher_logits.argmax(1) == asked.student_logits.argmax(1)
        shown = "  ".join(f"{s} {agreed[asked.source == i].mean():.1%}" for i, s in enumerate(asked.sources))
        print(f"{name:24} accuracy {real:.1%}  {shown}", flush=True)

    def _ask(self, weights: Path, samples: SampleSet) -> SampleSet:
        """The run's own samples, and those of examiners that are trained as long for every student."""
        student = self.recipe.student.model_copy(update={"weights": str(weights)})
        recipe = self.recipe.model_copy(update={"student": student})
        own = samples.images[samples.source <= 1]
        with prepare(self.teacher, self.student, recipe=recipe, device="cpu") as training:
            game = training.game
            asked = freeze_samples(game, prior=train_prior(game), adversary=train_adversary(game))
            answers = [_answer(network, own, samples) for network in (game.teacher, game.players.student.average)]
        assert isinstance(asked, SampleSet)
        late = asked.source > 1
        return SampleSet(
            images=np.concatenate([own, asked.images[late]]),
            source=np.concatenate([samples.source[samples.source <= 1], asked.source[late]]),
            sources=asked.sources,
            teacher_logits=np.concatenate([answers[0], asked.teacher_logits[late]]),
            student_logits=np.concatenate([answers[1], asked.student_logits[late]]),
            contract=asked.contract,
        )


def main() -> None:
    """Makes what is missing in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--student", required=True, help="architecture")
    parser.add_argument("--data", type=Path, required=True, help="labelled images: .npz or ImageFolder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every budget")
    parser.add_argument("--examiner-steps", type=int, default=150, help="updates of prior generator and adversary")
    parser.add_argument("--only", nargs="+", choices=DISTILLED, default=list(DISTILLED), help="distil these only")
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher)
    bench = Bench(
        teacher=teacher,
        student=arguments.student,
        data=load_evaluation_data(arguments.data, teacher.contract),
        out=arguments.out,
        examiner_steps=arguments.examiner_steps,
    )
    for name in arguments.only:
        bench.distil(name, scale=arguments.scale)
        if name in DAMAGED:
            for kind, amount in DAMAGE:
                bench.damage(name, kind, amount)


if __name__ == "__main__":
    main()
