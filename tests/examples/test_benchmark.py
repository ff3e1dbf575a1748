"""The benchmark example: a tiny grid runs once, looking changes nothing, and what it says of time and images is so."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from dfadc.errors import DfadcError
from dfadc.evaluation.labelled_images import EvaluationData
from dfadc.networks.network_file import load_network
from dfadc.recipe.load import load_recipe
from dfadc.teacher.load import load_teacher

# The examples are scripts, not a package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "benchmark"))
import cell as cells
import measure
import play
import run
import shares
import summary
import train_teachers
import write_images
from tasks import TASKS
from train_teacher import Split, measure_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS = ["auto", "noise"]
#: Enough for a step of each, and for nothing else.
FEW_IMAGES = 2000


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of a recipe and a bound on digits."""
    path = tmp_path_factory.mktemp("benchmark") / "results.jsonl"
    run.main(out=path, task=["digits"], method=METHODS, seeds=1, images=FEW_IMAGES)
    return path


@pytest.fixture(scope="module")
def judge() -> measure.Judge:
    task = TASKS["digits"]
    teacher, test = load_teacher(task.teacher), task.load("test", None)
    data = EvaluationData(test.images.numpy(), test.labels.numpy(), teacher.contract)
    return measure.Judge(data, teacher.module, torch.device("cpu"))


@pytest.mark.example
def test_a_grid_runs_in_processes_of_its_own(results: Path) -> None:
    lines = summary.read_results(results)
    assert [line["method"] for line in lines] == METHODS
    for line in lines:
        assert line["outcome"] == "done"
        assert line["budget"] == "2,000 images"
        assert 0 < line["accuracy"] < line["teacher_accuracy"]
        assert 0 < line["agreement"] < 1
        assert line["memory_mebibytes"] >= line["memory_before_mebibytes"] > 0
        assert sum(line["shares"].values()) == pytest.approx(1, abs=0.001)
    by_method = {line["method"]: line for line in lines}
    # A step of `auto` updates the student 15 times and the generator once, on 64 images each; 10 of the student's
    # batches are repeated ones, and a quarter of the others is the generator's, as all of its own is.
    assert by_method["auto"]["steps"] == FEW_IMAGES // (16 * 64)
    assert by_method["auto"]["images_generated"] == by_method["auto"]["steps"] * (5 * 16 + 64)
    assert by_method["noise"]["images_generated"] == 0
    assert by_method["noise"]["shares"]["generator"] == 0 < by_method["auto"]["shares"]["generator"]


@pytest.mark.example
def test_what_is_there_is_not_run_again(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results.read_bytes()
    run.main(out=results, task=["digits"], method=METHODS, seeds=1, images=FEW_IMAGES)
    assert results.read_bytes() == before
    assert "2 cells, 2 of them in" in capsys.readouterr().out


@pytest.mark.example
def test_table_and_plot_are_made_from_the_file(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    summary.main(results, plot=plot)
    printed = capsys.readouterr().out
    assert "### digits, 2,000 images (teacher 9" in printed
    rows = [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == "method"
    assert sorted(rows[2:]) == sorted(METHODS)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.example
def test_seeds_become_mean_and_deviation(results: Path) -> None:
    line = summary.read_results(results)[0]
    two = [{**line, "accuracy": 0.5, "seed": 0}, {**line, "accuracy": 0.52, "seed": 1}]
    refused = {**line, "method": "pool", "outcome": "the budget is too small"}
    text = "\n".join(summary.table([*two, refused]))
    assert "| auto | 2 | 51.00 ± 1.41 |" in text
    assert "pool (seed 0): the budget is too small" in text


def test_a_line_cut_short_is_run_again_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    assert summary.read_results(path) == []
    run.append_result(path, {"cell": 1})
    with path.open("a") as stream:
        stream.write('{"cell": 2, "acc')
    run.append_result(path, {"cell": 3})
    run.append_result(path, {"cell": 4})
    assert summary.read_results(path) == [{"cell": 1}, {"cell": 3}, {"cell": 4}]


def test_what_cannot_be_run_is_a_result() -> None:
    line = cells.run_cell(cells.Cell("digits", "pool", 0, measure.Budget(images=1)))
    assert "too small for the warm-up" in line["outcome"]
    assert "accuracy" not in line


@pytest.mark.parametrize(("kind", "choice"), [("task", {"task": ["mnist"]}), ("method", {"method": ["best"]})])
def test_an_unknown_name_is_refused(kind: str, choice: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match=f"unknown {kind}"):
        run.main(out=tmp_path / "results.jsonl", **choice)


@pytest.mark.example
def test_looking_changes_nothing(judge: measure.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is looked at after every step ends with the weights of one that is only looked at when it is over."""

    def play_with(num_looks: int) -> play.Played:
        monkeypatch.setattr(measure, "NUM_LOOKS", num_looks)
        teacher = load_teacher(TASKS["digits"].teacher)
        return play.play_recipe(
            load_recipe("auto", ["batch_size=16", "student.ema_decay=0", "replay.repeats=0"]),
            teacher=teacher,
            student="compact_resnet_8",
            budget=measure.Budget(images=96 * 6),
            judge=judge,
        )

    often, once = play_with(6), play_with(1)
    assert len(often.track.curve) == 5
    assert once.track.curve == []
    for name, tensor in often.track.student.state_dict().items():
        assert torch.equal(tensor, once.track.student.state_dict()[name]), name


def test_looks_take_no_time_off_the_run(judge: measure.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    class Slow(nn.Flatten):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += 1000
            return super().forward(images)

    track = measure.Track(judge, Slow(), steps=30)
    for step in range(1, 31):
        now += 2
        track.on_step(step)
    assert track.seconds == 60
    assert [seconds for seconds, _ in track.curve] == [4.0 * look for look in range(1, measure.NUM_LOOKS)]


def test_a_budget_becomes_whole_steps() -> None:
    assert measure.Budget(seconds=10).steps(seconds_per_step=3, images_per_step=1) == 3
    assert measure.Budget(images=1000).steps(seconds_per_step=3, images_per_step=300) == 3
    assert measure.Budget(seconds=1).steps(seconds_per_step=3, images_per_step=1) == 1


def test_time_goes_to_who_takes_it() -> None:
    """Forward and backward of one network, whichever it is, and in the optimizer-like rest."""
    images = torch.randn(32, 8, 16, 16)
    large, small = nn.Conv2d(8, 64, 7, padding=3), nn.Conv2d(8, 1, 1)

    def work(*, backward: bool) -> Callable[[], None]:
        def compute() -> None:
            loss = large(images).mean() + small(images).mean()
            if backward:
                torch.autograd.backward(loss, inputs=[*large.parameters()])

        return compute

    work(backward=True)()
    for networks in ({"teacher": [large], "student": [small]}, {"teacher": [small], "student": [large]}):
        dear = "teacher" if networks["teacher"] == [large] else "student"
        spent = shares.measure(work(backward=True), networks)
        assert spent.shares()[dear] > 0.5
        assert spent.images == {"teacher": 32, "student": 32}
    forward = shares.measure(work(backward=False), {"teacher": [large]}).seconds["teacher"]
    assert shares.measure(work(backward=True), {"teacher": [large]}).seconds["teacher"] > 1.2 * forward
    in_the_rest = shares.measure(work(backward=True), {"teacher": [small]}).shares()
    assert in_the_rest["rest"] > 0.5


def test_the_committed_teachers_are_what_they_say() -> None:
    for name, least in (("digits", 0.97), ("colour", 0.9)):
        module, metadata = load_network(TASKS[name].teacher)
        test = TASKS[name].load("test", None)
        accuracy = measure_accuracy(module, test, metadata.contract)
        assert accuracy >= least
        assert f"{accuracy:.2%} of {len(test.labels):,} images" in metadata.extra["dfadc.training"]
        assert any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def test_a_teacher_is_trained_by_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.safetensors"
    train_teachers.main("digits", epochs=2, out=out)
    assert float(capsys.readouterr().out.partition("test accuracy ")[2].partition("%")[0]) > 40
    assert load_network(out)[1].contract == load_network(TASKS["digits"].teacher)[1].contract
    with pytest.raises(DfadcError, match="no teacher of a task 'mnist'"):
        train_teachers.main("mnist")


def test_no_test_image_was_trained_on() -> None:
    for name in ("digits", "colour"):
        train, test = (TASKS[name].load(split, None) for split in ("train", "test"))
        assert np.bincount(test.labels.numpy()).min() > 0
        seen = {image.numpy().tobytes() for image in train.images}
        assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_noise_looks_like_real_images_once_normalised() -> None:
    contract = load_teacher(TASKS["digits"].teacher).contract
    noise = cells._draw_noise(contract, torch.Generator().manual_seed(0), 500)  # noqa: SLF001 -- what the row learns from
    assert noise.shape == (500, 1, 8, 8)
    assert functional.mse_loss(noise, torch.zeros_like(noise)) == pytest.approx(1, abs=0.05)


# ----------------------------------------------------------------------------------------------- images as files


def test_the_images_of_a_task_are_written_for_the_command(tmp_path: Path) -> None:
    write_images.main("digits", out=tmp_path / "digits.npz")
    test, written = TASKS["digits"].load("test", None), np.load(tmp_path / "digits.npz")
    assert (written["images"] == test.images.numpy()).all()
    assert (written["labels"] == test.labels.numpy()).all()


def test_the_digits_of_other_writers_have_the_pixels_that_scikit_learns_have(tmp_path: Path) -> None:
    """Scikit-learn's digits are the other part of the same data set: written as UCI does they are the task's again."""
    found = load_digits()
    np.savetxt(tmp_path / "optdigits.tes", np.column_stack([found.data, found.target]), fmt="%d", delimiter=",")
    read = write_images.read_optdigits(tmp_path / "optdigits.tes")
    order = np.random.default_rng(0).permutation(len(found.target))
    test = TASKS["digits"].load("test", None)
    assert (read.images[order[: len(test.labels)]] == test.images).all()
    assert (read.labels[order[: len(test.labels)]] == test.labels).all()


GOOD_ROW = ",".join(["16"] * 64 + ["9"])


@pytest.mark.parametrize(
    "text",
    ["Block 1,Block 2\n", "", "1,2,3\n", GOOD_ROW.replace("16", "17", 1), GOOD_ROW[:-1] + "10", "-" + GOOD_ROW],
)
def test_a_file_that_holds_no_such_digits_is_refused(text: str, tmp_path: Path) -> None:
    assert len(read_text(tmp_path, GOOD_ROW).labels) == 1
    with pytest.raises(DfadcError, match=r"optdigits\.tra") as caught:
        read_text(tmp_path, text)
    assert caught.value.exit_code == 2


def test_digits_of_other_writers_are_for_the_task_of_digits(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="--optdigits"):
        write_images.main("colour", out=tmp_path / "colour.npz", optdigits=tmp_path / "optdigits.tra")
    with pytest.raises(DfadcError, match="cannot be read"):
        write_images.main("digits", out=tmp_path / "digits.npz", optdigits=tmp_path / "optdigits.tra")
    assert not any(tmp_path.iterdir())


def read_text(folder: Path, text: str) -> Split:
    (folder / "optdigits.tra").write_text(text)
    return write_images.read_optdigits(folder / "optdigits.tra")
