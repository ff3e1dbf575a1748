"""What verify and baseline cannot be asked: one clear error, the right exit code, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from command_line import files_of, run_command
from conftest import QUICK_STUDENT
from PIL import Image

from dfadc.contract import ImageContract
from dfadc.verification.baseline import Baseline

if TYPE_CHECKING:
    from dfadc.run_folder import RunFolder


def refused(*arguments: object, code: int = 2, says: str, hint: str = "") -> None:
    outcome = run_command(*arguments)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert says in outcome.errors[0]
    assert hint in "".join(outcome.hints)


def test_a_baseline_that_is_not_there(judged_run: RunFolder, digits_teacher: Path, workplace: Path) -> None:
    for command in (
        ("verify", judged_run.path),
        ("verify", judged_run.artifacts / "student.onnx", "--samples", judged_run.samples),
        ("distill", digits_teacher, "--student", QUICK_STUDENT),
    ):
        refused(*command, "--baseline", "nowhere.npz", code=4, says="no baseline nowhere.npz", hint="dfadc baseline")
    assert files_of(workplace) == {}


def test_a_baseline_of_something_else(
    judged_run: RunFolder, baseline: Path, digits_teacher: Path, workplace: Path
) -> None:
    known = Baseline.load(baseline)
    replace(known, teacher_sha256="00" * 32).save(Path("teacher.npz"))
    known.samples.save(Path("schema.npz"))
    few = replace(
        known.samples,
        contract=ImageContract((1, 8, 8), 4, mean=(0.305,), std=(0.376,)),
        teacher_logits=np.eye(4, dtype=np.float32)[np.arange(len(known.samples)) % 4],
        student_logits=np.eye(4, dtype=np.float32)[np.arange(len(known.samples)) % 4],
    )
    classes = (np.arange(len(few)) % 4).astype(np.int32)
    Baseline("four", known.teacher_sha256, few, {"student": classes, "student.onnx": classes}).save(Path("classes.npz"))
    artifact = ("verify", judged_run.artifacts / "student.onnx", "--samples", judged_run.samples)
    distil = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--steps", 1)
    for command in (("verify", judged_run.path), artifact, distil):
        refused(*command, "--baseline", "teacher.npz", says="another teacher")
        refused(*command, "--baseline", "schema.npz", says="this version reads 'dfadc.baseline/1'")
        refused(*command, "--baseline", "classes.npz", says="another image contract: num_classes 4, here 10")
    assert not Path("runs").exists()


def test_samples_that_are_not_the_hashed_ones(judged_run: RunFolder, baseline: Path, workplace: Path) -> None:
    for file, command in (
        (judged_run.samples, ("verify", judged_run.artifacts / "student.onnx", "--samples", "changed.npz")),
        (baseline, ("verify", judged_run.path, "--baseline", "changed.npz")),
    ):
        with np.load(file) as archive:
            content = dict(archive)
        content["images"][0, 0, 0, 0] ^= 1
        np.savez("changed.npz", **content)
        refused(*command, says="the file was frozen with")


def test_other_labelled_images_than_the_baselines(
    judged_run: RunFolder, baseline: Path, digits_data: Path, workplace: Path
) -> None:
    with np.load(digits_data) as data:
        np.savez("fewer.npz", images=data["images"][:-1], labels=data["labels"][:-1])
        np.savez("shuffled.npz", images=data["images"][::-1], labels=data["labels"][::-1])
    for other in ("fewer.npz", "shuffled.npz"):
        refused(
            "verify",
            judged_run.path,
            "--baseline",
            baseline,
            "--data",
            other,
            says="other images or labels",
            hint="anew",
        )


@pytest.mark.parametrize("command", ["verify", "baseline"])
@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((4, 3, 8, 8), np.uint8), np.arange(4), "3 channel(s), the teacher takes 1"),
        (np.zeros((4, 1, 9, 9), np.uint8), np.arange(4), "images are 9×9, the teacher takes 8×8"),
        (np.zeros((4, 1, 8, 8), np.uint8), np.arange(4) + 7, "labels run from 7 to 10"),
        (np.zeros((4, 1, 8, 8), np.uint8), -np.arange(4), "labels run from -3 to 0"),
        (np.zeros((0, 1, 8, 8), np.uint8), np.arange(0), "`images` is empty"),
    ],
    ids=["channels", "size", "labels", "negative", "empty"],
)
def test_labelled_images_that_do_not_fit(
    command: str, images: Any, labels: Any, says: str, judged_run: RunFolder, workplace: Path
) -> None:
    np.savez("data.npz", images=images, labels=labels)
    arguments = ("-o", "b.npz") if command == "baseline" else ()
    refused(command, judged_run.path, *arguments, "--data", "data.npz", says=says)
    assert not Path("b.npz").exists()


def test_images_that_cannot_be_read_are_counted_and_named(judged_run: RunFolder, workplace: Path) -> None:
    for label in range(10):
        Path(f"data/{label}").mkdir(parents=True)
        Image.new("L", (8, 8), 20 * label).save(f"data/{label}/whole.png")
    Path("data/3/empty.png").touch()
    Path("data/7/broken.png").write_bytes(b"no image")
    outcome = run_command(
        "verify", judged_run.artifacts / "student.onnx", "--samples", judged_run.samples, "--data", "data"
    )
    assert outcome.code == 0
    (skipped,) = (line for line in outcome.err.splitlines() if line.startswith("note: skipped"))
    assert "2 of 12 images" in skipped
    assert "3/empty.png" in skipped
    assert "7/broken.png" in skipped


@pytest.mark.parametrize(
    ("flags", "says", "hint"),
    [
        (("--min-accuracy", 0.9), "--min-accuracy 0.9 needs labelled images", "--data"),
        (("--max-drop", 0.1), "--max-drop 0.1 needs a baseline", "--baseline"),
        (("--set", "steps=3"), "'steps=3' sets no gate", "verify.min_agreement"),
        (("--set", "verify.num_samples=3"), "'verify.num_samples=3' sets no gate", "verify.min_agreement"),
        (("--set", "verify.min_agreement=2"), "verify.min_agreement", ""),
        (("--recipe", "auto"), "--recipe goes with an artifact", "leave"),
        (("--precision", "int8", "--samples", "s.npz"), "--samples, --precision goes with an artifact", "leave"),
    ],
)
def test_flags_that_cannot_be(flags: tuple[object, ...], says: str, hint: str, judged_run: RunFolder) -> None:
    refused("verify", judged_run.path, *flags, says=says, hint=hint)


def test_flags_that_concern_no_artifact(judged_run: RunFolder, digits_teacher: Path, workplace: Path) -> None:
    artifact = ("verify", judged_run.artifacts / "student.onnx", "--samples", judged_run.samples)
    refused(*artifact, "--trust-teacher", says="--trust-teacher goes with a run")
    refused(*artifact, "--recipe", "nowhere.toml", says="nowhere.toml")
    refused("distill", digits_teacher, "--dry-run", "--junit", "junit.xml", says="--dry-run verifies nothing")
    assert files_of(workplace) == {}


def test_gates_that_no_artifact_could_pass_are_refused_before_the_first_step(
    digits_teacher: Path, workplace: Path
) -> None:
    start = ("distill", digits_teacher, "--student", QUICK_STUDENT, "--steps", 1, "--set", "verify.num_samples=256")
    says = "verify.min_fp16_agreement = 0.995 cannot be reached with verify.num_samples = 256"
    for exports in ((), ("-e", "onnx:fp16"), ("-e", "openvino:fp16"), ("-e", "onnx:fp16", "--dry-run")):
        refused(*start, *exports, says=says, hint="set verify.num_samples to 957 or more")
    assert files_of(workplace) == {}
    assert run_command(*start, "-e", "onnx", "-e", "onnx:int8", "--dry-run").code == 0
