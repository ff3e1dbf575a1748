"""From a teacher file to a verified run folder, by the commands a person types."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import ROOT, command_process, finish_command, run_command
from conftest import QUICK_RECIPE, QUICK_STEPS, QUICK_STUDENT, TrainedTeacher
from torchvision.models import resnet18

from dfadc.contract import ImageContract
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import load_network
from dfadc.pipeline.distill import run_distillation
from dfadc.recipe.load import change_recipe, load_recipe
from dfadc.run_folder import RunFolder, open_run
from dfadc.storage import sha256_file
from dfadc.teacher.load import load_teacher
from dfadc.verification.samples import SampleSet

if TYPE_CHECKING:
    from command_line import Outcome

#: DESIGN's run folder, as far as it is made so far.
FILES_OF_A_RUN = {
    ".lock",
    "recipe.toml",
    "run.json",
    "metrics.jsonl",
    "student.safetensors",
    "generator.safetensors",
    "calibration.npz",
    "samples.npz",
    "artifacts/student.onnx",
    "manifest.json",
    "report.json",
    "report.md",
    "report.html",
}
FASHION_MNIST = ROOT / "examples" / "fashion_mnist"
#: One step on next to nothing: what takes time is building, measuring and exporting MobileNetV2.
ONE_STEP = (
    "--steps 1 --set batch_size=2 --set student.steps=1 --set student.stem=default --set verify.num_samples=24 "
    "--set calibration.num_images=8 --set compute.precision=fp32 --export onnx --out run"
)


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """The finished run, to do with as one likes."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def artifact_of(report: dict[str, Any], name: str = "student.onnx") -> dict[str, Any]:
    found: dict[str, Any] = report["artifacts"][name]
    return found


def test_a_run_leaves_every_file_and_no_scrap(command_run: tuple[RunFolder, Outcome]) -> None:
    folder = command_run[0].path
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found >= FILES_OF_A_RUN
    assert [name for name in found if Path(name).name.startswith(".")] == [".lock"]


def test_the_record_says_what_the_run_was(
    command_run: tuple[RunFolder, Outcome], digits_teacher: Path, digits_contract: ImageContract
) -> None:
    record = command_run[0].record()
    assert record["status"] == "finished"
    assert record["teacher"]["sha256"] == sha256_file(digits_teacher)
    assert record["teacher"]["architecture"] == "compact_resnet_16"
    assert record["student"]["architecture"] == QUICK_STUDENT
    assert record["student"]["num_parameters"] < record["teacher"]["num_parameters"]
    assert command_run[0].contract() == digits_contract
    assert record["device"] == "cpu"
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["seconds"] > 0


def test_the_saved_recipe_is_the_one_that_ran(command_run: tuple[RunFolder, Outcome]) -> None:
    asked = load_recipe("auto", [f"{path}={value}" for path, value in QUICK_RECIPE.items()])
    assert load_recipe(command_run[0].recipe) == asked


def test_metrics_have_a_line_a_log_interval(command_run: tuple[RunFolder, Outcome]) -> None:
    lines = list(command_run[0].read_metrics())
    assert [line["step"] for line in lines] == list(range(1, QUICK_STEPS + 1))
    assert set(lines[-1]["terms"]) == {"discrepancy", "batch_norm", "one_hot", "balance"}
    for name in ("class_entropy", "agreement"):
        assert all(0 <= line[name] <= 1 for line in lines)


def test_the_student_is_a_network_file_and_may_teach_in_turn(
    finished_run: RunFolder, digits_contract: ImageContract
) -> None:
    module, metadata = load_network(finished_run.student)
    assert metadata.architecture == QUICK_STUDENT
    assert metadata.contract == digits_contract
    assert not module.training
    assert load_teacher(finished_run.student).contract == digits_contract


def test_the_samples_hold_what_teacher_and_student_answer(finished_run: RunFolder, digits_teacher: Path) -> None:
    samples = SampleSet.load(finished_run.samples)
    assert samples.counts() == {"generator": 96, "snapshots": 32, "prior": 32, "adversary": 32}  # it is the gate's
    images = torch.from_numpy(samples.normalised())
    for network, frozen in (
        (load_teacher(digits_teacher).module, samples.teacher_logits),
        (load_network(finished_run.student)[0], samples.student_logits),
    ):
        with torch.no_grad():
            torch.testing.assert_close(network(images), torch.from_numpy(frozen), rtol=1e-4, atol=1e-4)


def test_calibration_images_are_not_the_samples(finished_run: RunFolder) -> None:
    samples = {image.tobytes() for image in SampleSet.load(finished_run.samples).images}
    with np.load(finished_run.calibration) as calibration:
        images = calibration["images"]
    assert images.dtype == np.uint8
    assert images.shape[1:] == (1, 8, 8)
    assert len(images) > 100
    assert samples.isdisjoint(image.tobytes() for image in images)


def test_json_is_all_there_is_on_stdout(command_run: tuple[RunFolder, Outcome]) -> None:
    run, outcome = command_run
    assert outcome.code == 0
    assert json.loads(outcome.out) == json.loads(run.report_json.read_text())
    for said in (
        "teacher: compact_resnet_16",
        "plan: recipe auto",
        f"step {QUICK_STEPS}/",
        "exported",
        "run folder:",
    ):
        assert said in outcome.err


def test_the_report_has_the_promised_fields(command_run: tuple[RunFolder, Outcome]) -> None:
    report = json.loads(command_run[1].out)
    assert report["schema"] == "dfadc.verification/1"
    assert list(report["artifacts"]) == ["student.onnx"]
    artifact = artifact_of(report)
    assert artifact["verdict"] == "PASS"
    assert set(artifact["comparisons"]) == {"A", "B", "C"}
    for comparison in artifact["comparisons"].values():
        assert set(comparison) == {"generator", "snapshots", "prior", "adversary", "all"}
    on_the_gate = artifact["comparisons"]["B"]["generator"]
    assert artifact["agreement"] == on_the_gate["agreement"]
    assert artifact["agreement_low"] < artifact["agreement"] < artifact["agreement_high"]
    assert artifact["comparisons"]["A"]["all"]["agreement"] == 1.0


def test_the_agreement_is_that_of_the_files(finished_run: RunFolder) -> None:
    """Counted here once more, from the samples and the ONNX file alone."""
    samples = SampleSet.load(finished_run.samples)
    session = onnxruntime.InferenceSession(finished_run.artifacts / "student.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: samples.normalised()})
    drawn = samples.source == samples.sources.index("generator")
    same = logits.argmax(1) == samples.teacher_logits.argmax(1)
    report = json.loads(finished_run.report_json.read_text())
    assert artifact_of(report)["agreement"] == pytest.approx(same[drawn].mean())


def test_labelled_data_add_accuracy(
    command_run: tuple[RunFolder, Outcome], trained_digits_teacher: TrainedTeacher, digits_data: Path
) -> None:
    run, outcome = command_run
    accuracy = json.loads(outcome.out)["accuracy"]
    assert accuracy["teacher"] == pytest.approx(trained_digits_teacher.accuracy)
    student, metadata = load_network(run.student)
    mean, std = metadata.contract.mean, metadata.contract.std
    assert mean is not None
    assert std is not None
    with np.load(digits_data) as data, torch.no_grad():
        images = (torch.from_numpy(data["images"]).float() / 255 - mean[0]) / std[0]
        expected = (student(images).argmax(1).numpy() == data["labels"]).mean()
    assert accuracy["student"] == pytest.approx(expected)
    assert artifact_of(json.loads(outcome.out))["accuracy"] == pytest.approx(expected)


def test_without_labelled_data_there_is_no_accuracy(finished_run: RunFolder) -> None:
    report = json.loads(finished_run.report_json.read_text())
    assert report["accuracy"] is None
    assert artifact_of(report)["accuracy"] is None


def test_verify_exits_3_where_a_gate_fails(run_copy: RunFolder) -> None:
    outcome = run_command("verify", run_copy.path, "--min-agreement", "1.0")
    assert outcome.code == 3
    assert "verdict: FAIL" in outcome.out
    assert "lower bound at least 100.00%" in outcome.out
    assert run_command("verify", run_copy.path).code == 0


def test_verify_exits_4_where_something_required_is_missing(run_copy: RunFolder) -> None:
    outcome = run_command("verify", run_copy.path, "--require", "student.int8.onnx", "--json")
    report = json.loads(outcome.out)
    assert outcome.code == report["exit_code"] == 4
    assert report["verdict"] == "NOT RUN"
    assert report["reasons"] == ["required but NOT RUN: student.int8.onnx"]
    assert run_command("verify", run_copy.path, "--require", "student.onnx").code == 0


def test_a_failed_gate_outranks_what_is_missing(run_copy: RunFolder) -> None:
    arguments = ("verify", run_copy.path, "--require", "student.int8.onnx", "--min-agreement", "1.0")
    assert run_command(*arguments).code == 3


def test_verify_fails_an_artifact_that_is_not_the_exported_one(run_copy: RunFolder) -> None:
    artifact = run_copy.artifacts / "student.onnx"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"\x00")
    outcome = run_command("verify", run_copy.path)
    assert outcome.code == 3
    assert f"{artifact} is not the file that was exported" in outcome.out
    artifact.unlink()
    assert run_command("verify", run_copy.path).code == 3


def test_verify_refuses_a_teacher_that_changed(run_copy: RunFolder, digits_data: Path, finished_run: RunFolder) -> None:
    """Its accuracy would stand beside a student that it did not teach."""
    run_copy.update_record({"teacher": {**run_copy.record()["teacher"], "path": str(finished_run.student)}})
    outcome = run_command("verify", run_copy.path, "--data", digits_data)
    assert outcome.code == 2
    assert "the teacher changed since the run" in outcome.errors[0]


def test_one_artifact_is_verified_without_torch_and_without_its_run(finished_run: RunFolder) -> None:
    arguments = ("verify", finished_run.artifacts / "student.onnx", "--samples", finished_run.samples)
    blocked = "sys.modules['torch'] = None"
    with command_process(
        *arguments, "--min-agreement", "0.1", "--json", preamble=blocked, imports_done=False
    ) as process:
        outcome = finish_command(process)
    assert outcome.code == 0, outcome.err
    alone, beside = artifact_of(json.loads(outcome.out)), artifact_of(json.loads(finished_run.report_json.read_text()))
    assert alone["verdict"] == "PASS"
    assert alone["comparisons"] == beside["comparisons"]


def test_an_artifact_that_takes_pixels_and_answers_probabilities_agrees_too(run_copy: RunFolder) -> None:
    outcome = run_command("export", run_copy.path, "-e", "onnx", "--embed-normalisation", "--embed-softmax")
    assert outcome.code == 0, outcome.err
    assert "student.onnx" in outcome.out
    outcome = run_command("verify", run_copy.path, "--json")
    assert outcome.code == 0, outcome.out
    assert artifact_of(json.loads(outcome.out))["comparisons"]["A"]["all"]["agreement"] == 1.0


def test_report_shows_the_last_verification_again(run_copy: RunFolder) -> None:
    markdown = run_copy.report_md.read_text()
    run_copy.report_md.unlink()
    outcome = run_command("report", run_copy.path)
    assert outcome.code == 0
    assert "student.onnx" in outcome.out
    assert "verdict: PASS" in outcome.out
    assert run_copy.report_md.read_text() == markdown
    assert json.loads(run_command("report", run_copy.path, "--json").out) == json.loads(
        run_copy.report_json.read_text()
    )


def test_the_papers_recipe_runs_to_the_end_with_a_student_of_ones_own(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step teaches nothing: the gate fails, and the run is kept."""
    (tmp_path / "networks_of_mine.py").write_text(
        "from torch import nn\n"
        "def tiny(in_channels, num_classes):\n"
        "    convolution = nn.Conv2d(in_channels, 4, 3)\n"
        "    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run_command(
        *("distill", digits_teacher, "--student", "networks_of_mine:tiny", "--recipe", "dfad", "--quiet"),
        *shlex.split(ONE_STEP),
    )
    assert outcome.code == 3
    assert [line.partition(":")[0] for line in outcome.err.splitlines()] == ["note"], "a short run's prior generator"
    assert "verdict: FAIL" in outcome.out
    run = open_run(tmp_path / "run")
    assert run.record()["status"] == "finished"
    recipe = load_recipe(run.recipe)
    assert recipe.name == "dfad"
    assert recipe.generator.architecture == "paper"
    assert [*next(run.read_metrics())["terms"]] == ["discrepancy"]
    assert (run.artifacts / "student.onnx").exists()


def run_literally(command: str) -> Outcome:
    """A command as it stands in the README, for one step."""
    program, *arguments = shlex.split(f"{command} {ONE_STEP}")
    assert program == "dfadc"
    return run_command(*arguments)


def assert_student_is_there(outcome: Outcome, student: str, input_size: tuple[int, int, int]) -> None:
    assert outcome.code in {0, 3}, outcome.err
    run = open_run("run")
    assert run.record()["student"]["architecture"] == student
    assert run.contract().input_size == input_size
    session = onnxruntime.InferenceSession(run.artifacts / "student.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, *input_size), np.float32)})
    assert logits.shape == (3, 10)


@pytest.mark.example
def test_the_example_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_literally(f"dfadc distill {FASHION_MNIST}/teacher.safetensors --student mobilenetv2")
    assert_student_is_there(outcome, "torchvision:mobilenet_v2", (1, 28, 28))
    assert "is not smaller than the teacher" in outcome.err


def test_a_plain_state_dict_of_torchvision_needs_its_input_size_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet18(num_classes=10).state_dict(), "teacher.pt")
    outcome = run_literally("dfadc distill teacher.pt --student compact_resnet_8 --input-size 3x32x32")
    assert_student_is_there(outcome, "compact_resnet_8", (3, 32, 32))
    assert "torchvision:resnet18" in outcome.err


@pytest.mark.parametrize(
    "student",
    [
        "lenet5_half",
        pytest.param("mobilenetv2", marks=pytest.mark.slow),  # a documented command exports one already
    ],
)
def test_a_plain_state_dict_of_ours_needs_its_input_size_alone(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    contract = ImageContract(input_size=(1, 28, 28), num_classes=10)
    torch.save(build_architecture("lenet5", contract).module.state_dict(), "teacher.pt")
    outcome = run_literally(f"dfadc distill teacher.pt --student {student} --input-size 1x28x28")
    assert_student_is_there(outcome, build_architecture(student, contract).name, (1, 28, 28))
    assert "lenet5" in outcome.err
    assert "no batch-norm statistics" in outcome.err


def test_a_teacher_that_is_code_is_trusted_by_each_command_anew(
    digits_teacher: Path, digits_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript; teachers of that kind remain
        torch.jit.trace(load_teacher(digits_teacher).module, torch.zeros(2, 1, 8, 8)).save("teacher.ts")
    contract = ("--input-size", "1x8x8", "--mean", "0.305", "--std", "0.376")
    arguments = ("distill", "teacher.ts", "--student", QUICK_STUDENT, *contract, *shlex.split(ONE_STEP))
    assert run_command(*arguments).code == 2
    assert not Path("run").exists()
    outcome = run_command(*arguments, "--data", digits_data, "--json", "--trust-teacher")
    assert outcome.code == 3, outcome.err
    assert json.loads(outcome.out)["accuracy"]["teacher"] > 0.9
    verify = ("verify", "run", "--data", digits_data)
    refused = run_command(*verify)
    assert refused.code == 2
    assert "teacher.ts is TorchScript, which is code" in refused.errors[0]
    assert run_command(*verify, "--trust-teacher").code == 3


def test_force_replaces_a_run_and_nothing_else(run_copy: RunFolder, digits_teacher: Path, tmp_path: Path) -> None:
    (run_copy.path / "of_the_old_run").touch()
    (tmp_path / "beside").touch()
    recipe = load_recipe("auto", ["steps=1", "batch_size=2", "verify.num_samples=24"])
    run = run_distillation(digits_teacher, QUICK_STUDENT, out=run_copy.path, recipe=recipe, force=True)
    assert not (run.path / "of_the_old_run").exists()
    assert not run.report_json.exists()
    assert load_recipe(run.recipe).steps == 1
    assert (tmp_path / "beside").exists()


def test_another_seed_gives_another_student(finished_run: RunFolder, digits_teacher: Path, tmp_path: Path) -> None:
    """Else the equal bytes elsewhere would say nothing."""
    recipe = change_recipe(load_recipe(finished_run.recipe), {"steps": 1})
    first, other = (
        run_distillation(
            digits_teacher, QUICK_STUDENT, out=tmp_path / name, recipe=change_recipe(recipe, {"seed": seed})
        )
        for name, seed in (("first", 0), ("other", 1))
    )
    assert first.student.read_bytes() != other.student.read_bytes()
