"""Asks every student that `make_students.py` kept the samples of each source, and writes the answers.

    python examples/believability/ask_students.py examples/fashion_mnist/teacher.safetensors \
        --out believability/fashion_mnist

The samples of the *generator* and its *snapshots* are those of the student's own run; the *prior* generator is trained
as `dfadc distill` trains it, once for all; an *adversary* is trained against each student, damaged
ones included (`--adversary-steps 0` leaves it out: it takes most of the time). All of them as long for every student,
whatever the budget of its run. No labelled image is looked at. What is answered is not asked again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from dfadc import load_recipe, load_teacher
from dfadc.networks.network_file import load_network
from dfadc.sampling.generators import PROCEDURAL_SHARE, draw, draw_prior, train_adversary, train_prior
from dfadc.sampling.lengths import ADVERSARY_STEPS, PRIOR_STEPS
from dfadc.training.build import prepare
from dfadc.verification.samples import SampleSet
from dfadc.verification.stored_images import StoredImages, dequantise, quantise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from dfadc.distillation.distillation import Distillation
    from dfadc.teacher.load import Teacher

#: No verification generator takes more than a share of its run's updates; this run is long enough for every one.
SETTINGS = ("steps=100000", "compute.compile=off")


class Lengths(NamedTuple):
    """Updates of each verification generator, and share of the prior's samples that are procedural images.

    Args:
        prior_steps: of the prior generator.
        refine_steps: of the pixels of its samples; None: as many as a run makes.
        procedural_share: of its samples.
        adversary_steps: of the adversary; 0: there is none.
    """

    prior_steps: int = PRIOR_STEPS
    refine_steps: int | None = None
    procedural_share: float = PROCEDURAL_SHARE
    adversary_steps: int = ADVERSARY_STEPS


class Examination:
    """Asks students of one teacher.

    Args:
        teacher: of all of them.
        out: the folder of `make_students.py`.
        lengths: of the verification generators' training.
        count: samples of all sources, shared among them as a run shares them.
    """

    def __init__(self, teacher: Teacher, out: Path, lengths: Lengths, *, count: int) -> None:
        self.teacher = teacher
        self.out = out
        self.lengths = lengths
        verify = load_recipe("auto", SETTINGS).verify
        self.counts = {
            source: verify.count_of(source, count) for source in ("generator", "snapshots", "prior", "adversary")
        }
        self._prior: StoredImages | None = None

    def ask(self, name: str) -> str:
        """Writes what a student answers, and sums it up in a line."""
        weights = self.out / "students" / f"{name}.safetensors"
        record = json.loads(weights.with_suffix(".json").read_text())
        own = SampleSet.load(weights.with_name(record["samples"]))
        images = {
            source: own.images[own.source == own.sources.index(source)][: self.counts[source]]
            for source in ("generator", "snapshots")
        }
        images["prior"] = self._draw_prior(weights)
        images["adversary"] = self._draw_adversary(weights)
        images = {source: drawn for source, drawn in images.items() if len(drawn)}
        stored = np.concatenate(list(images.values()))
        logits = [self._answer(network, stored) for network in (self.teacher.module, load_network(weights)[0])]
        source = np.repeat(np.arange(len(images), dtype=np.int8), [len(drawn) for drawn in images.values()])
        np.savez(
            self.out / f"{name}.npz",
            source=source,
            sources=np.array(list(images)),
            teacher_logits=logits[0],
            student_logits=logits[1],
            accuracy=np.array(record["accuracy"]),
            teacher_accuracy=np.array(record["teacher_accuracy"]),
        )
        agreed = logits[0].argmax(axis=1) == logits[1].argmax(axis=1)
        shown = "  ".join(f"{s} {agreed[source == i].mean():.1%}" for i, s in enumerate(images))
        return f"{name:28} accuracy {record['accuracy']:.1%}  {shown}"

    def _draw_prior(self, weights: Path) -> StoredImages:
        """The prior generator's images: the same for all students, for it never looks at one."""
        if self._prior is None:
            self._prior = self._with_run(weights, self._draw_prior_of)
        return self._prior

    def _draw_adversary(self, weights: Path) -> StoredImages:
        if not self.lengths.adversary_steps:
            return self._draw_prior(weights)[:0]
        return self._with_run(weights, self._draw_adversary_of)

    def _draw_prior_of(self, run: Distillation) -> Iterator[Tensor]:
        prior = train_prior(run, self.lengths.prior_steps)
        share, steps = self.lengths.procedural_share, self.lengths.refine_steps
        return draw_prior(run, prior, self.counts["prior"], steps=steps, procedural_share=share)

    def _draw_adversary_of(self, run: Distillation) -> Iterator[Tensor]:
        return draw(train_adversary(run, self.lengths.adversary_steps, restarts=1), self.counts["adversary"])

    def _with_run(self, weights: Path, draw_images: Callable[[Distillation], Iterator[Tensor]]) -> StoredImages:
        settings = (*SETTINGS, f"student.weights={json.dumps(str(weights))}")
        architecture = load_network(weights)[1].architecture
        with prepare(self.teacher, architecture, recipe=load_recipe("auto", settings), device="cpu") as training:
            return np.concatenate([quantise(b.numpy(), self.teacher.contract) for b in draw_images(training.run)])

    @torch.no_grad()
    def _answer(self, network: nn.Module, stored: StoredImages) -> NDArray[np.float32]:
        images = torch.from_numpy(dequantise(stored, self.teacher.contract))
        return torch.cat([network.eval()(batch) for batch in images.split(128)]).numpy()


def main() -> None:
    """Asks the students that have not answered yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the --out of make_students.py")
    parser.add_argument("--samples", type=int, default=2048, help="of all sources, half of them the prior's")
    parser.add_argument("--prior-steps", type=int, help="updates of the prior generator; default: a run's")
    parser.add_argument("--refine-steps", type=int, help="updates of its samples' pixels; default: a run's")
    parser.add_argument("--procedural-share", type=float, help="of its samples; default: a run's")
    parser.add_argument("--adversary-steps", type=int, help="updates of the adversary; default: a run's; 0: none")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in Lengths._fields}
    lengths = Lengths(**{name: value for name, value in given.items() if value is not None})
    examination = Examination(load_teacher(arguments.teacher), arguments.out, lengths, count=arguments.samples)
    for record in sorted((arguments.out / "students").glob("*.json")):
        if not (arguments.out / f"{record.stem}.npz").exists():
            print(examination.ask(record.stem), flush=True)


if __name__ == "__main__":
    main()
