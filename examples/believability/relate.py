"""Relation of agreement on generated samples to real accuracy, from the file of `ask_students.py`.

    python examples/believability/relate.py believability/fashion_mnist believability/digits

Each folder holds the answers of one teacher's students. Half of them choose the source and fit its line; every figure
is stated on the other half. Whoever settles how students are asked or related while looking at both halves needs other
students, made later with another ``--seed``:

    python examples/believability/relate.py believability/digits --confirm later/digits

fits the chosen source's line on all students of the first folder and states it on those of the second.

The line is fitted on probit axes, where accuracies on two distributions often lie on a straight one (Miller et al.
2021, arXiv 2107.04649), and goes from agreement to accuracy as a share of the teacher's, both of them corrected for
chance (Cohen 1960): a student that guesses has 0 of either. Here it is a parabola: students that guess and those that
nearly are the teacher lie on no straight one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from scipy.special import softmax
from scipy.stats import norm, spearmanr

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Random ways to halve the students, by which the luck of the one that is stated is judged.
NUM_HALVINGS = 200
#: Of the polynomial on probit axes.
DEGREE = 2
#: Rates within these are told apart: at the lower end a standard error of the agreement of 1,024 guesses on 10 classes.
RESOLVED = (0.01, 0.995)
#: Real accuracy above which a student counts as good.
HIGH = 0.8
COLUMNS = (
    *("teacher", "source", "students", "rank correlation, choosing half", "the same, stating half"),
    *("mean gap, points", "scatter, points", "worst over-estimate, points"),
)
CONFIRMATION = (
    *("teacher", "source", "students, fitted + stated", "rank correlation"),
    *("mean gap, points", "scatter, points", "worst over-estimate, points"),
)
STEADINESS = (
    *("teacher", "source", "teacher's confidence", "rank correlation, all students"),
    *("over random halves", "mean gap over them, points", f"mean gap above {HIGH:.0%} accuracy, points"),
)


class Student(NamedTuple):
    """One student: real accuracy, the teacher's, and (agreement, teacher's mean confidence) on each source.

    Who guesses is right with a probability of ``chance``.
    """

    name: str
    accuracy: float
    teacher_accuracy: float
    chance: float
    agreement: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Relation:
    """Relation of one source's agreement to real accuracy over some students.

    Args:
        source: of the samples.
        rank_correlation: Spearman's, over the students the figures are stated on.
        mean_gap: mean |predicted - real| accuracy on them, in [0, 1].
        scatter: standard deviation of predicted - real.
        worst_overestimate: largest predicted - real, and whose it is.
        line: coefficients of the parabola on probit axes, the highest power first.
    """

    source: str
    rank_correlation: float
    mean_gap: float
    scatter: float
    worst_overestimate: tuple[float, str]
    line: tuple[float, ...]

    def __str__(self) -> str:
        over, whose = self.worst_overestimate
        return (
            f"{self.rank_correlation:.3f} | {100 * self.mean_gap:.1f} | {100 * self.scatter:.1f} "
            f"| {100 * over:+.1f} ({whose})"
        )


def read_students(folder: Path) -> list[Student]:
    """Every student of a folder, in a fixed random order that knows nothing of their quality."""
    students = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            agreed = stored["teacher_logits"].argmax(axis=1) == stored["student_logits"].argmax(axis=1)
            sure = softmax(stored["teacher_logits"], axis=1).max(axis=1)
            parts = {str(name): stored["source"] == index for index, name in enumerate(stored["sources"])}
            parts["all"] = np.ones(len(agreed), np.bool_)
            by_source = {name: (float(agreed[part].mean()), float(sure[part].mean())) for name, part in parts.items()}
            accuracies = float(stored["accuracy"]), float(stored["teacher_accuracy"])
            students.append(Student(path.stem, *accuracies, 1 / stored["teacher_logits"].shape[1], by_source))
    return [students[index] for index in np.random.default_rng(0).permutation(len(students))]


def common_sources(teachers: dict[str, list[Student]]) -> tuple[str, ...]:
    """Sources that every student was asked the samples of, in their order."""
    asked = [student.agreement for students in teachers.values() for student in students]
    return tuple(source for source in asked[0] if all(source in each for each in asked))


def relate(source: str, fitted: list[Student], stated: list[Student]) -> Relation:
    """Fits the line on some students and states the figures on others."""
    chance = stated[0].chance
    asked, real_shares = (_probit(rates, chance) for rates in (_agreements(fitted, source), _shares(fitted)))
    line = tuple(np.polyfit(asked, real_shares, DEGREE).tolist())
    predicted = predict(_agreements(stated, source), line, chance) * stated[0].teacher_accuracy
    real = np.array([student.accuracy for student in stated])
    gaps = predicted - real
    worst = int(gaps.argmax())
    return Relation(
        source,
        rank_correlation=float(spearmanr(_agreements(stated, source), real).statistic),
        mean_gap=float(np.abs(gaps).mean()),
        scatter=float(gaps.std()),
        worst_overestimate=(float(gaps[worst]), stated[worst].name),
        line=line,
    )


def steadiness(source: str, students: list[Student]) -> str:
    """A row of ``STEADINESS``: how much of a relation is luck of the halves, and what it is worth for good students."""
    dice, half = np.random.default_rng(1), len(students) // 2
    orders = [dice.permutation(len(students)) for _ in range(NUM_HALVINGS)]
    shuffled = [[students[index] for index in order] for order in orders]
    found = [relate(source, each[:half], each[half:]) for each in shuffled]
    correlation, gap = (
        (np.mean(values), *np.quantile(values, (0.05, 0.95)))
        for values in ([f.rank_correlation for f in found], [100 * f.mean_gap for f in found])
    )
    good = [student for student in students if student.accuracy > HIGH]
    of_good = f"{100 * relate(source, students, good).mean_gap:.1f} ({len(good)} students)" if good else "none"
    sure = np.mean([student.agreement[source][1] for student in students])
    return (
        f"{source} | {sure:.2f} | {relate(source, students, students).rank_correlation:.3f} "
        f"| {correlation[0]:.3f} ({correlation[1]:.2f} to {correlation[2]:.2f}) "
        f"| {gap[0]:.1f} ({gap[1]:.1f} to {gap[2]:.1f}) | {of_good}"
    )


def predict(agreement: NDArray[np.float64], line: tuple[float, ...], chance: float) -> NDArray[np.float64]:
    """Accuracy as a share of the teacher's, in [0, 1], by the fitted line."""
    return np.asarray(chance + (1 - chance) * norm.cdf(np.polyval(line, _probit(agreement, chance))))


def _probit(rates: NDArray[np.float64], chance: float) -> NDArray[np.float64]:
    return np.asarray(norm.ppf(np.clip((rates - chance) / (1 - chance), *RESOLVED)))


def _agreements(students: list[Student], source: str) -> NDArray[np.float64]:
    return np.array([student.agreement[source][0] for student in students])


def _shares(students: list[Student]) -> NDArray[np.float64]:
    return np.array([min(1.0, student.accuracy / student.teacher_accuracy) for student in students])


def draw(teachers: dict[str, list[Student]], chosen: str, path: Path) -> None:
    """Real accuracy against agreement: a row a teacher, a column a source, the fitted line on the chosen one."""
    sources = common_sources(teachers)
    figure, axes = plt.subplots(
        len(teachers),
        len(sources),
        figsize=(3 * len(sources), 3 * len(teachers)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, (name, students) in zip(axes, teachers.items(), strict=True):
        half = len(students) // 2
        for axis, source in zip(row, sources, strict=True):
            for part, marker, label in (
                (students[:half], "o", "choosing half"),
                (students[half:], "x", "stating half"),
            ):
                axis.scatter(_agreements(part, source), [s.accuracy for s in part], marker=marker, s=24, label=label)
            grid = np.linspace(0.02, 0.99, 200)
            line = relate(source, students[:half], students[half:]).line
            predicted = predict(grid, line, students[0].chance) * students[0].teacher_accuracy
            axis.plot(grid, predicted, linewidth=1, color="grey")
            axis.set_title(f"{name}: {source}" + (" (chosen)" if source == chosen else ""), fontsize=9)
            axis.set_xlim(0, 1)
            axis.set_ylim(0, 1)
        row[0].set_ylabel("real accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("agreement")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table of every source and the figures of the chosen one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="each the --out of ask_students.py")
    parser.add_argument("--confirm", type=Path, nargs="+", default=[], help="for each folder: one of other students")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    arguments = parser.parse_args()
    if arguments.confirm and len(arguments.confirm) != len(arguments.folders):
        parser.error("--confirm takes one folder for each folder, in the same order")
    mpl.use("Agg")
    teachers = {folder.name: read_students(folder) for folder in arguments.folders}
    halves = {name: (s[: len(s) // 2], s[len(s) // 2 :]) for name, s in teachers.items()}
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    sources = common_sources(teachers)
    chosen_by: dict[str, list[float]] = {source: [] for source in sources}
    for name, (choosing, stating) in halves.items():
        for source in sources:
            inside = relate(source, choosing, choosing)
            found = relate(source, choosing, stating)
            chosen_by[source].append(inside.rank_correlation)
            numbers = f"{len(choosing)} + {len(stating)} | {inside.rank_correlation:.3f}"
            print(f"| {name} | {source} | {numbers} | {found} |")
    chosen = max(sources, key=lambda source: min(chosen_by[source]))
    print(f"\nchosen, by the lowest rank correlation over the teachers' choosing halves: {chosen}")
    print("\n| " + " | ".join(STEADINESS) + " |")
    print("|---" * len(STEADINESS) + "|")
    for name, students in teachers.items():
        for source in sources:
            print(f"| {name} | {steadiness(source, students)} |")
    if arguments.confirm:
        print("\n| " + " | ".join(CONFIRMATION) + " |")
        print("|---" * len(CONFIRMATION) + "|")
    for (name, students), folder in zip(teachers.items(), arguments.confirm, strict=False):
        others = read_students(folder)
        print(f"| {name} | {chosen} | {len(students)} + {len(others)} | {relate(chosen, students, others)} |")
    if arguments.plot is not None:
        draw(teachers, chosen, arguments.plot)


if __name__ == "__main__":
    main()
