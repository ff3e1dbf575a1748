"""The papers' experiments as data: what is trained and distilled, with which settings, and what was published.

    python examples/paper/experiments.py            the tables of the README, published figures beside ours
    python examples/paper/experiments.py cifar10    an experiment's commands: teacher, test images, student, verdict

Nothing else in this folder knows a data set or a pair of networks: a new experiment is a line here.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dfadc.cli.script import run_as_script
from dfadc.contract import ImageContract
from dfadc.errors import DfadcError

FOLDER = Path(__file__).resolve().parent
#: Of every run whose figures stand in the tables: experiment, recipe, seed, teacher, student, commit, device.
RESULTS = FOLDER / "results.toml"


@dataclass(frozen=True)
class TeacherTraining:
    """Training of a teacher: SGD with momentum 0.9, a rate that falls by 10 at shares of the run.

    Args:
        epochs: over the training images.
        batch_size: images of an update.
        learning_rate: at the start.
        milestones: shares of the run at which it falls.
        weight_decay: L2 penalty.
        shift: pixels that an image may move.
        flip: whether images are mirrored at random.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    milestones: tuple[float, ...] = ()
    weight_decay: float = 5e-4
    shift: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Dataset:
    """Data set and its teacher.

    Args:
        contract: size, classes, mean and standard deviation, task.
        training: of a teacher.
        torchvision: class in ``torchvision.datasets``; empty: torchvision has none, a folder is read.
        first_label: the number that masks give to class 0; lower ones are no class.
    """

    contract: ImageContract
    training: TeacherTraining
    torchvision: str = ""
    first_label: int = 0


@dataclass(frozen=True)
class Experiment:
    """A pair of networks on a data set.

    Args:
        name: of the experiment.
        dataset: in :data:`DATASETS`; its recipe has the same name.
        teacher: architecture.
        student: architecture.
        published: accuracy or mean IoU in percent, by who reached it; "teacher" and "real data" (the student trained on
            the training images) among them.
        source: of the published figures.
    """

    name: str
    dataset: str
    teacher: str
    student: str
    published: Mapping[str, str]
    source: str

    @property
    def recipe(self) -> Path:
        """The recipe with the paper's settings."""
        return FOLDER / f"{self.dataset}.toml"

    @property
    def is_dense(self) -> bool:
        """True if mean IoU is measured instead of accuracy."""
        return DATASETS[self.dataset].contract.task == "segmentation"


_HALF = (0.5, 0.5, 0.5)
_CIFAR_TRAINING = TeacherTraining(200, 128, 0.1, milestones=(0.4, 0.8), shift=4, flip=True)
_DENSE_TRAINING = TeacherTraining(300, 16, 0.1, milestones=(1 / 3, 2 / 3), shift=8, flip=True)
#: Sizes, mean and deviation of MNIST and Caltech101 and the teachers' epochs are the paper's; CIFAR's mean and
#: deviation are those in common use, the dense data sets' are 0.5 as for Caltech101.
DATASETS = {
    "mnist": Dataset(
        ImageContract((1, 32, 32), 10, mean=(0.1307,), std=(0.3081,)),
        TeacherTraining(10, 256, 0.01, weight_decay=1e-4),
        torchvision="MNIST",
    ),
    "cifar10": Dataset(
        ImageContract((3, 32, 32), 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
        _CIFAR_TRAINING,
        torchvision="CIFAR10",
    ),
    "cifar100": Dataset(
        ImageContract((3, 32, 32), 100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
        _CIFAR_TRAINING,
        torchvision="CIFAR100",
    ),
    "caltech101": Dataset(
        ImageContract((3, 128, 128), 101, mean=_HALF, std=_HALF),
        TeacherTraining(150, 128, 0.1, milestones=(1 / 3, 2 / 3), shift=16, flip=True),
        torchvision="Caltech101",
    ),
    "camvid": Dataset(ImageContract((3, 128, 128), 11, mean=_HALF, std=_HALF, task="segmentation"), _DENSE_TRAINING),
    "nyuv2": Dataset(
        ImageContract((3, 128, 128), 13, mean=_HALF, std=_HALF, task="segmentation"),
        TeacherTraining(300, 16, 0.05, milestones=(1 / 3, 2 / 3), shift=8, flip=True),
        first_label=1,
    ),
}

_DFAD = "Fang et al. 2019, arXiv 1912.11006"
_FIELD = "Fang et al. 2021, arXiv 2105.08584; FastDFKD: arXiv 2112.06253"


def _paper(name: str, teacher: str, student: str, figures: tuple[str, str, str, str, str]) -> Experiment:
    whose = ("teacher", "real data", "noise", "DAFL", "DFAD")
    return Experiment(name, name, teacher, student, dict(zip(whose, figures, strict=True)), _DFAD)


def _field(dataset: str, teacher: str, student: str, figures: tuple[str, ...]) -> Experiment:
    whose = ("teacher", "real data", *FIELD_METHODS)
    name = f"{dataset}-{teacher}-{student}"
    return Experiment(name, dataset, teacher, student, dict(zip(whose, figures, strict=True)), _FIELD)


#: Methods of the field's common table; the paper's is not among them.
FIELD_METHODS = ("DAFL", "ZSKT", "DeepInversion", "DFQ", "FastDFKD", "CMI")
#: The paper's own table.
PAPER = (
    _paper("mnist", "lenet5", "lenet5_half", ("98.9", "98.8", "74.7", "98.1", "98.3 ± 0.2")),
    _paper("cifar10", "resnet34_8x", "resnet18_8x", ("95.5", "93.9", "10.1", "88.5", "93.3")),
    _paper("cifar100", "resnet34_8x", "resnet18_8x", ("77.5", "73.3", "1.5", "61.4", "67.7 ± 0.3")),
    _paper(
        "caltech101",
        "torchvision:resnet34",
        "torchvision:resnet18",
        ("76.6", "77.5", "1.0", "failed", "73.5 ± 0.8"),
    ),
    _paper("camvid", "torchvision:deeplabv3_resnet50", "deeplabv3_mobilenetv2", ("59.4", "53.5", "1.8", "1.0", "53.5")),
    _paper("nyuv2", "torchvision:deeplabv3_resnet50", "deeplabv3_mobilenetv2", ("51.7", "38.0", "2.1", "10.5", "36.4")),
)
#: The pairs that the field compares its methods on.
FIELD = (
    _field(
        "cifar10", "vgg11_bn", "resnet18_8x", ("92.25", "95.20", "81.10", "89.46", "90.36", "90.84", "90.53", "91.13")
    ),
    _field("cifar10", "wrn_40_2", "wrn_16_1", ("94.87", "91.12", "65.71", "83.74", "83.04", "86.14", "89.29", "90.01")),
    _field("cifar10", "wrn_40_2", "wrn_40_1", ("94.87", "93.94", "81.33", "86.07", "86.85", "91.69", "92.51", "92.78")),
    _field("cifar10", "wrn_40_2", "wrn_16_2", ("94.87", "93.95", "81.55", "89.66", "89.72", "92.01", "92.45", "92.52")),
    _field(
        "cifar100", "vgg11_bn", "resnet18_8x", ("71.32", "77.10", "57.29", "34.72", "54.13", "68.32", "67.44", "70.56")
    ),
    _field(
        "cifar100", "wrn_40_2", "wrn_16_1", ("75.83", "65.31", "22.50", "30.15", "53.77", "54.77", "54.02", "57.91")
    ),
    _field(
        "cifar100", "wrn_40_2", "wrn_40_1", ("75.83", "72.19", "34.66", "29.73", "61.33", "62.92", "63.91", "68.88")
    ),
    _field(
        "cifar100", "wrn_40_2", "wrn_16_2", ("75.83", "73.56", "40.00", "28.44", "61.34", "59.01", "65.12", "68.75")
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in (*PAPER, *FIELD)}


def find_experiment(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        DfadcError: there is none.
    """
    if name not in EXPERIMENTS:
        raise DfadcError(f"unknown experiment {name!r}", f"known: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def commands(experiment: Experiment, seed: int = 0) -> tuple[str, ...]:
    """One command each for teacher, test images, student and evaluation, from the repository's root."""
    folder = f"runs/paper/{experiment.name}"
    teacher, run, test = f"{folder}/teacher.safetensors", f"{folder}/seed-{seed}", f"{folder}/test.npz"
    recipe = experiment.recipe.relative_to(FOLDER.parents[1])
    return (
        f"python examples/paper/train_paper_teacher.py {experiment.name} --out {teacher}",
        f"python examples/paper/write_evaluation.py {experiment.name} --out {test}",
        f"dfadc distill {teacher} --student {experiment.student} --recipe {recipe} --seed {seed} --out {run}",
        f"dfadc verify {run} --data {test}",
    )


def tables(results: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: published figures in percent beside ours, of which a cell is empty where there is no run."""
    ours = ("our teacher", "our student", "seeds", "commit", "device")
    whose = ("teacher", "real data", "noise", "DAFL", "DFAD")
    yield _row("experiment", "teacher → student", "recipe", *whose, *ours)
    yield _row(*["---"] * (3 + len(whose) + len(ours)))
    for experiment in PAPER:
        measured = _ours(experiment.name, experiment.dataset, results)
        recipe = f"`{experiment.recipe.name}`"
        yield _row(
            _title(experiment), _pair(experiment), recipe, *(experiment.published[each] for each in whose), *measured
        )
    yield ""
    of_the_field = ("teacher", "real data", *FIELD_METHODS)
    yield _row("experiment", "teacher → student", "recipe", *of_the_field, *ours)
    yield _row(*["---"] * (3 + len(of_the_field) + len(ours)))
    for experiment in FIELD:
        measured = _ours(experiment.name, experiment.dataset, results)
        recipe = f"`{experiment.recipe.name}`"
        published = (experiment.published[each] for each in of_the_field)
        yield _row(_title(experiment), _pair(experiment), recipe, *published, *measured)


def _title(experiment: Experiment) -> str:
    return f"{experiment.dataset}{', mean IoU' if experiment.is_dense else ''}"


def _pair(experiment: Experiment) -> str:
    return f"{experiment.teacher.removeprefix('torchvision:')} → {experiment.student.removeprefix('torchvision:')}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ours(name: str, recipe: str, results: list[dict[str, Any]]) -> tuple[str, str, str, str, str]:
    """Teacher, student (mean ± standard deviation), number of seeds, commits, devices; empty without runs."""
    found = [result for result in results if (result["experiment"], result["recipe"]) == (name, recipe)]
    if not found:
        return ("",) * 5
    students = [result["student"] for result in found]
    spread = f" ± {statistics.stdev(students):.2f}" if len(students) > 1 else ""
    commits, devices = ({str(result[key]) for result in found} for key in ("commit", "device"))
    return (
        f"{statistics.mean(result['teacher'] for result in found):.2f}",
        f"{statistics.mean(students):.2f}{spread}",
        str(len(found)),
        ", ".join(sorted(commits)),
        ", ".join(sorted(devices)),
    )


def read_results() -> list[dict[str, Any]]:
    """The runs that were made."""
    results: list[dict[str, Any]] = tomllib.loads(RESULTS.read_text(encoding="utf-8")).get("result", [])
    return results


def main(
    experiment: Annotated[str | None, typer.Argument(help="Print its commands; without it, the tables.")] = None,
) -> None:
    """Prints the commands of an experiment, or the tables of published figures beside ours."""
    print(*(commands(find_experiment(experiment)) if experiment else tables(read_results())), sep="\n")


if __name__ == "__main__":
    run_as_script(main)
