"""Bad input gets one clear error and exit code 2; nothing is created and nothing is lost."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from command_line import files_of, run_command
from conftest import QUICK_STUDENT
from torch import nn

from dfadc.contract import ImageContract
from dfadc.networks.names import build_architecture

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.run_folder import RunFolder

#: Networks whose outputs no student can learn from; written where the command runs.
ODD_NETWORKS = """
from torch import nn

class Network(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Pair(Network):
    def forward(self, images):
        return super().forward(images), 1 - super().forward(images)

class NotANumber(Network):
    def forward(self, images):
        return super().forward(images) * float("nan")

class CtrlC(Network):
    def forward(self, images):
        if self.training:
            raise KeyboardInterrupt
        return super().forward(images)
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain state dict of one of our networks."""
    path = tmp_path_factory.mktemp("weights") / "compact.pt"
    contract = ImageContract(input_size=(1, 8, 8), num_classes=10)
    torch.save(build_architecture("compact_resnet_8", contract).module.state_dict(), path)
    return path


def assert_refused(arguments: tuple[object, ...], *says: object, code: int = 2, hint: str = "") -> None:
    """The command ends with one error that says all of this, and leaves everything as it was."""
    before = files_of(Path())
    outcome = run_command(*arguments)
    assert outcome.code == code, outcome.err
    assert len(outcome.errors) == 1, outcome.err
    for part in says:
        assert str(part) in outcome.errors[0]
    assert len(outcome.hints) <= 1
    assert hint in "".join(outcome.hints)
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert files_of(Path()) == before
    assert not Path("runs").exists()


def distil(teacher: object, *flags: object) -> tuple[object, ...]:
    """A run of one step."""
    return ("distill", teacher, "--student", QUICK_STUDENT, "--steps", 1, *flags)


# Teacher files


def test_a_missing_file() -> None:
    assert_refused(distil("nowhere.pt"), "nowhere.pt", hint="check the path")
    assert_refused(("inspect", "nowhere.pt"), "nowhere.pt")


def test_a_folder() -> None:
    Path("teacher.pt").mkdir()
    assert_refused(distil("teacher.pt"), "teacher.pt is a folder", hint="name the file in it")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_an_unreadable_file(small_weights: Path) -> None:
    shutil.copy(small_weights, "teacher.pt")
    Path("teacher.pt").chmod(0)
    assert_refused(distil("teacher.pt"), "teacher.pt", "Permission denied")


def test_a_truncated_archive(small_weights: Path) -> None:
    data = small_weights.read_bytes()
    Path("teacher.pt").write_bytes(data[: len(data) // 2])
    assert_refused(distil("teacher.pt"), "teacher.pt", "damaged or cut", hint="copy or download it again")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b'{"weights": []}', "JSON"),
        (b"just some words", "a text file"),
        (pickle.dumps({"weights": 1}), "a plain Python pickle"),
        (bytes(range(200, 256)), "of no known kind"),
        (b"PK\x03\x04 but no archive", "damaged"),
    ],
    ids=["empty", "html", "lfs", "json", "text", "pickle", "bytes", "zip"],
)
def test_the_wrong_kind_behind_a_suffix(data: bytes, says: str) -> None:
    Path("teacher.pt").write_bytes(data)
    assert_refused(distil("teacher.pt"), "teacher.pt", says)


def test_a_cut_off_onnx_file_behind_a_suffix(finished_run: RunFolder) -> None:
    Path("teacher.pt").write_bytes((finished_run.artifacts / "student.onnx").read_bytes()[:1000])
    assert_refused(distil("teacher.pt"), "cannot read teacher.pt", hint="export it again")


class TouchesAFile:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return open, ("it_ran", "w")  # type: ignore[return-value]


def test_a_pickle_with_foreign_globals_is_named_and_not_run() -> None:
    torch.save({"weights": TouchesAFile()}, "teacher.pt")
    assert_refused(distil("teacher.pt"), "teacher.pt", "io.open", "not run", hint="--trust-teacher")
    outcome = run_command("inspect", "teacher.pt")
    assert outcome.code == 2
    assert "io.open" in outcome.errors[0]
    assert not Path("it_ran").exists()


def test_weights_of_another_architecture(small_weights: Path) -> None:
    """Whether or not the last layer is called the same."""
    for name, size in (("lenet5", "1x28x28"), ("compact_resnet_16", "1x8x8"), ("torchvision:resnet18", "1x8x8")):
        flags = ("--teacher-arch", name, "--input-size", size)
        assert_refused(distil(small_weights, *flags), small_weights, f"do not fit {name}", hint="--teacher-arch")


def test_weights_that_fit_nothing() -> None:
    torch.save({"layer.weight": torch.zeros(3, 3)}, "teacher.pt")
    assert_refused(distil("teacher.pt"), "teacher.pt", "fit no", hint="--teacher-arch")


def test_an_input_size_that_nobody_knows(small_weights: Path) -> None:
    assert_refused(distil(small_weights), "input size of the teacher is unknown", "command line", hint="--input-size")


def test_channels_that_do_not_fit(digits_teacher: Path, small_weights: Path) -> None:
    flags = ("--input-size", "3x8x8")
    assert_refused(distil(small_weights, *flags), "3x8x8", "3 channels", "takes 1", hint="--input-size 1x8x8")
    # The mean of the file is for one channel; which of the two is named does not matter.
    assert_refused(distil(digits_teacher, *flags), "3")


@pytest.mark.parametrize(
    ("network", "says"),
    [("Pair", "several outputs that may be logits: 0 (2, 10), 1 (2, 10)"), ("NotANumber", "not finite")],
)
def test_outputs_that_are_no_logits(network: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("odd_networks.py").write_text(ODD_NETWORKS)
    monkeypatch.syspath_prepend(Path.cwd())
    layer = nn.Linear(64, 10)
    torch.save({"layer.weight": layer.weight.detach(), "layer.bias": layer.bias.detach()}, "teacher.pt")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    flags = ("--teacher-arch", f"odd_networks:{network}", "--input-size", "1x8x8", "--num-classes", 10)
    assert_refused(distil("teacher.pt", *flags), says)


def test_weights_that_are_not_numbers(small_weights: Path) -> None:
    weights = torch.load(small_weights)
    torch.save({name: tensor * float("nan") for name, tensor in weights.items()}, "teacher.pt")
    assert_refused(distil("teacher.pt", "--input-size", "1x8x8"), "not finite", hint="weights")


def test_one_class() -> None:
    torch.save({"layer.weight": torch.zeros(1, 64), "layer.bias": torch.zeros(1)}, "teacher.pt")
    flags = ("--teacher-arch", "torch.nn:Identity", "--input-size", "1x8x8", "--num-classes", 1)
    assert_refused(distil("teacher.pt", *flags), "num_classes", "1")


def test_classes_that_the_weights_contradict(digits_teacher: Path) -> None:
    assert_refused(distil(digits_teacher, "--num-classes", 7), "7 classes", "10", hint="--num-classes")


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("torchvision:resnet81", "resnet81", "resnet18"),
        ("lenet", "lenet", "lenet5"),
        ("no_such_module:factory", "no_such_module", ""),
        ("torch.nn:no_such_factory", "no_such_factory", ""),
    ],
)
def test_an_unknown_teacher_architecture(small_weights: Path, name: str, says: str, hint: str) -> None:
    assert_refused(distil(small_weights, "--teacher-arch", name), says, hint=hint)


# Flags


def test_no_teacher() -> None:
    assert_refused(("distill",), "no teacher", hint="dfadc distill teacher.pt")


@pytest.mark.parametrize(
    ("student", "hint"),
    [("mobilnetv2", "mobilenetv2"), ("compact_resnet", "compact_resnet_"), ("torchvision:resnet81", "resnet18")],
)
def test_an_unknown_student(digits_teacher: Path, student: str, hint: str) -> None:
    assert_refused(("distill", digits_teacher, "--student", student), repr(student), hint=hint)


def test_a_student_that_cannot_take_the_images(digits_teacher: Path) -> None:
    assert_refused(("distill", digits_teacher, "--student", "lenet5_half"), "8x8", hint="choose a network")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--set", "student.stepz=3"), "'student.stepz' (did you mean 'student.steps'?)"),
        (("--set", "studnt.steps=3"), "'studnt"),
        (("--set", "steps.student=3"), "steps"),
        (("--set", "batch_size"), "'batch_size' is not path=value"),
        (("--set", "batch_size=1"), "batch_size = 1"),
        (("--set", "batch_size=many"), 'batch_size = "many"'),
        (("--set", "student.ema_decay=1.5"), "student.ema_decay = 1.5"),
        (("--set", "student.optimizer.learning_rate=nan"), "student.optimizer.learning_rate"),
        (("--steps", -1), "steps = -1"),
        (("--precision", "fp8"), 'compute.precision = "fp8"'),
        (("--recipe", "quick"), "unknown recipe 'quick'"),
        (("--recipe", "nowhere.toml"), "nowhere.toml"),
        (("--minutes", 1), "--steps 1 and --minutes 1 contradict"),
        (("--input-size", "32"), "--input-size '32' is not CxHxW"),
        (("--input-size", "3x-1x8"), "--input-size '3x-1x8' is not CxHxW"),
        (("--input-size", "1x0x8"), "--input-size '1x0x8' is not CxHxW"),
        (("--mean", "grey"), "--mean 'grey'"),
        (("--mean", "0.5"), "only one of mean and std"),
        (("--mean", "0.5,0.5", "--std", "0.5,0.5"), "mean has 2 values for 1 channel"),
        (("--mean", "0.5", "--std", "0"), "std must be above 0"),
        (("--mean", "77.8", "--std", "95.9"), "mean 77.8 and std 95.9 are of pixels in 0..255"),
        (("--device", "tpu"), "'tpu'"),
        (("--precision", "fp16", "--device", "cpu"), "fp16 training needs CUDA"),
        (("--export", "tflite"), "unknown export 'tflite'"),
        (("--export", "onnx:fp4"), "'fp4'"),
        (("--set", "student.weights=nowhere.pt"), "nowhere.pt"),
        (("--resume", "nowhere"), "nowhere is not a run folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_flag_that_cannot_be(digits_teacher: Path, flags: tuple[object, ...], says: str) -> None:
    steps = () if flags[0] == "--resume" else ("--steps", 1)
    student = () if flags[0] == "--resume" else ("--student", QUICK_STUDENT)
    assert_refused(("distill", digits_teacher, *student, *steps, *flags), says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_here(digits_teacher: Path) -> None:
    assert_refused(distil(digits_teacher, "--device", "cuda"), "'cuda'", hint="--device")


def test_a_recipe_file_with_an_unknown_key(digits_teacher: Path) -> None:
    Path("mine.toml").write_text("[generator.optimizer]\nlearning_rte = 0.1\n")
    says = "'generator.optimizer.learning_rte' (did you mean 'generator.optimizer.learning_rate'?)"
    assert_refused(distil(digits_teacher, "--recipe", "mine.toml"), "mine.toml", says)
    Path("mine.toml").write_text("steps = = 3")
    assert_refused(distil(digits_teacher, "--recipe", "mine.toml"), "mine.toml")


def test_start_weights_of_another_network(digits_teacher: Path) -> None:
    flags = ("--set", f"student.weights={digits_teacher}")
    assert_refused(distil(digits_teacher, *flags), digits_teacher, QUICK_STUDENT, hint="student.weights")


# Where things are


def test_an_output_folder_that_holds_a_run(digits_teacher: Path, finished_run: RunFolder) -> None:
    before = files_of(finished_run.path)
    arguments = distil(digits_teacher, "--out", finished_run.path)
    assert_refused(arguments, f"{finished_run.path} already holds a run", hint="--force")
    assert run_command(*arguments).hints[0].startswith(f"hint: --resume {finished_run.path} goes on")
    assert files_of(finished_run.path) == before


def test_an_output_folder_that_holds_something_else(digits_teacher: Path) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter_1").touch()
    assert_refused(distil(digits_teacher, "--out", "thesis"), "thesis is not empty", hint="--out")
    assert_refused(distil(digits_teacher, "--out", "thesis", "--force"), "thesis is not empty", hint="--out")
    assert_refused(distil(digits_teacher, "--out", "thesis/chapter_1"), "chapter_1 is a file", hint="--out")


def test_a_teacher_in_the_folder_that_would_be_replaced(finished_run: RunFolder) -> None:
    shutil.copytree(finished_run.path, "run")
    arguments = distil("run/student.safetensors", "--out", "run", "--force")
    assert_refused(arguments, "run/student.safetensors lies in the output folder", hint="--out")


def test_an_output_that_cannot_be_written(digits_teacher: Path) -> None:
    Path("a_file").touch()
    assert_refused(distil(digits_teacher, "--out", "a_file/run"), "a_file/run", code=7, hint="--out")


def test_ctrl_c_while_a_step_is_measured_leaves_nothing(
    digits_teacher: Path, finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that is to be replaced: it goes once the new one begins."""
    Path("odd_networks.py").write_text(ODD_NETWORKS)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    shutil.copytree(finished_run.path, "old")
    before = files_of(Path())
    for out in ("new", "old"):
        outcome = run_command("distill", digits_teacher, "--student", "odd_networks:CtrlC", "--out", out, "--force")
        assert outcome.code == 130
        assert "Traceback" not in outcome.err
    assert files_of(Path()) == before
    assert not Path("new").exists()


# Labelled data: refused before a long run, not after it


def write_data(**arrays: np.typing.NDArray[Any]) -> str:
    np.savez("data.npz", **arrays)  # type: ignore[arg-type]
    return "data.npz"


LABELS = np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((4, 1, 9, 9), np.uint8), "labels": LABELS}, "images are 9×9, the teacher takes 8×8"),
        ({"images": np.zeros((4, 3, 8, 8), np.uint8), "labels": LABELS}, "3 channel(s), the teacher takes 1"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": LABELS}, "looks like N×H×W×C"),
        ({"images": np.full((4, 1, 8, 8), 255.0), "labels": LABELS}, "run from 255 to 255, expected [0, 1]"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8), "labels": LABELS + 7}, "labels run from 7 to 10"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8), "labels": LABELS[:3]}, "(3,) for 4 images"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, "has no `labels`"),
    ],
    ids=["size", "channels", "layout", "range", "labels", "count", "missing"],
)
def test_labelled_data_that_do_not_fit(digits_teacher: Path, arrays: dict[str, Any], says: str) -> None:
    data = write_data(**arrays)
    assert_refused(distil(digits_teacher, "--data", data), "--data data.npz", says)


def test_labelled_data_that_are_not_there(digits_teacher: Path) -> None:
    assert_refused(distil(digits_teacher, "--data", "nowhere.npz"), "--data nowhere.npz", "does not exist")
    Path("words.npz").write_text("words")
    assert_refused(distil(digits_teacher, "--data", "words.npz"), "neither a folder nor an .npz file")


def test_labelled_data_where_mean_and_std_are_unknown(small_weights: Path) -> None:
    data = write_data(images=np.zeros((4, 1, 8, 8), np.uint8), labels=LABELS)
    assert_refused(distil(small_weights, "--input-size", "1x8x8", "--data", data), "mean and std", hint="--mean")


# The other commands


@pytest.mark.parametrize("command", ["verify", "export", "report"])
def test_what_is_no_run(command: str) -> None:
    Path("empty").mkdir()
    assert_refused((command, "empty"), "empty is not a run folder")
    assert_refused((command, "nowhere"), "nowhere")


def test_a_record_that_is_damaged_or_of_another_version(finished_run: RunFolder) -> None:
    Path("run").mkdir()
    shutil.copy(finished_run.record_file, "run")
    record = Path("run/run.json")
    original = record.read_text()
    record.write_text(original[:50])
    assert_refused(("verify", "run"), "cannot read run/run.json")
    record.write_text(original.replace("dfadc.run_folder/1", "dfadc.run_folder/99"))
    assert_refused(("verify", "run"), "'dfadc.run_folder/99'")


def test_samples_go_with_an_artifact(finished_run: RunFolder) -> None:
    artifact = finished_run.artifacts / "student.onnx"
    assert_refused(("verify", artifact), "is no run folder", hint="--samples")
    assert_refused(("verify", finished_run.path, "--samples", finished_run.samples), "--samples", hint="leave")
    assert_refused(("verify", "nowhere.onnx", "--samples", finished_run.samples), "nowhere.onnx")
    assert_refused(("verify", artifact, "--samples", "nowhere.npz"), "nowhere.npz")
    Path("broken.npz").write_bytes(finished_run.samples.read_bytes()[:1000])
    assert_refused(("verify", artifact, "--samples", "broken.npz"), "broken.npz")
    Path("broken.onnx").write_bytes(artifact.read_bytes()[:1000])
    assert_refused(("verify", "broken.onnx", "--samples", finished_run.samples), "broken.onnx")


def test_a_report_that_is_missing_or_damaged(finished_run: RunFolder) -> None:
    Path("run").mkdir()
    shutil.copy(finished_run.record_file, "run")
    for text in (None, "", "[]", '{"schema": "dfadc.verification/99"}'):
        if text is not None:
            Path("run/report.json").write_text(text)
        assert_refused(("report", "run"), "run/report.json", hint="dfadc verify run")


def test_an_unknown_recipe_to_show() -> None:
    assert_refused(("recipe", "show", "quick"), "unknown recipe 'quick'", hint="auto")


def test_a_size_that_students_cannot_be_listed_for() -> None:
    assert_refused(("students", "--input-size", "big"), "'big'", hint="3x32x32")


@pytest.mark.parametrize("arguments", [["distil"], ["distill", "--stepz", "3"], ["distill", "--min-agreement", "2"]])
def test_what_the_parser_refuses(arguments: list[str]) -> None:
    outcome = run_command(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "--help" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_error_is_never_a_page(digits_teacher: Path) -> None:
    """One line, however long the foreign message behind it was."""
    buffer = io.BytesIO()
    torch.save({"weights": TouchesAFile()}, buffer)
    Path("teacher.pt").write_bytes(buffer.getvalue())
    for arguments in (distil("teacher.pt"), distil(digits_teacher, "--device", "tpu"), distil("nowhere.pt")):
        lines = [line for line in run_command(*arguments).err.splitlines() if not line.startswith(("error:", "hint:"))]
        assert [line for line in lines if not line.startswith(("teacher:", "  ", "note:"))] == []
