"""Run folders of somebody else: they are data, and nothing in them chooses code to import."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import run_command
from judged_runs import record_student

from dfadc.errors import DfadcError
from dfadc.networks.network_file import ARCHITECTURE_KEY, read_safetensors, read_safetensors_metadata, serialise
from dfadc.pipeline.distill import load_run_teacher, resume_distillation
from dfadc.pipeline.export import export_student
from dfadc.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Networks of a user's own; that they were imported shows.
NETWORKS = """
from pathlib import Path
from dfadc.networks.zoo import find_network

Path("imported").touch()

def student(contract):
    return find_network("compact_resnet_4")(contract)

def teacher(contract):
    return find_network("compact_resnet_16")(contract)
"""
STUDENT, TEACHER = "networks_of_somebody:student", "networks_of_somebody:teacher"
TINY = (
    *("--steps", 1, "--batch-size", 4, "--set", "verify.num_samples=16", "--set", "calibration.num_images=8"),
    *("--set", "verify.min_agreement=0.0", "--set", "verify.min_coverage=0.0", "--export", "onnx"),
)


@contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """Works in a folder with the networks, which nobody has imported."""
    (folder / "networks_of_somebody.py").write_text(NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        forget_networks()
        yield
    forget_networks()


def forget_networks() -> None:
    sys.modules.pop("networks_of_somebody", None)
    Path("imported").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def made_run(digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose student and teacher are built by factories. The command that names them needs nothing else."""
    folder = tmp_path_factory.mktemp("made")
    metadata = read_safetensors_metadata(digits_teacher)
    metadata = {name: value for name, value in metadata.items() if name != ARCHITECTURE_KEY}
    (folder / "teacher.safetensors").write_bytes(serialise(read_safetensors(digits_teacher), {}))
    contract = json.loads(metadata["dfadc.contract"])
    flags = ("--input-size", "1x8x8", "--mean", contract["mean"][0], "--std", contract["std"][0])
    with workplace(folder):
        arguments = ("distill", "teacher.safetensors", "--teacher-arch", TEACHER, "--student", STUDENT, *flags)
        outcome = run_command(*arguments, *TINY, "--out", "run")
    assert outcome.code in (0, 3), outcome.err
    assert (folder / "run" / "artifacts" / "student.onnx").exists()
    return RunFolder(folder / "run")


@pytest.fixture
def foreign(made_run: RunFolder, tmp_path: Path) -> Iterator[RunFolder]:
    """A copy of it, where its networks lie in the working folder."""
    shutil.copytree(made_run.path, tmp_path / "run")
    with workplace(tmp_path):
        yield RunFolder(Path("run"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("export", "run", "-e", "onnx"), STUDENT),
        (("verify", "run", "--data"), STUDENT),
        (("baseline", "run", "-o", "baseline.npz", "--data"), STUDENT),
        (("distill", "--resume", "run"), STUDENT),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_run_folder_imports_nothing_that_is_not_named(
    arguments: tuple[str, ...], name: str, foreign: RunFolder, digits_data: Path
) -> None:
    if "--resume" in arguments:
        foreign.update_record({"status": "interrupted"})
        shutil.rmtree(foreign.checkpoints, ignore_errors=True)
    command = (*arguments, digits_data) if arguments[-1] == "--data" else arguments
    for trust in ((), ("--trust-teacher",)) if arguments[0] == "verify" else ((),):
        outcome = run_command(*command, *trust)
        assert outcome.code == 2
        assert name in outcome.errors[0]
        assert outcome.hints == [f"hint: if you trust that code, name it yourself: --factory {name}"]
        assert not Path("imported").exists()
    named = run_command(*command, "--factory", STUDENT, "--factory", TEACHER)
    # A resume ends for want of a checkpoint.
    assert named.code in ((0, 3) if "--resume" not in arguments else (2,)), named.err
    assert Path("imported").exists(), "the test would not notice an import"


def test_the_teachers_factory_is_named_too(foreign: RunFolder, digits_data: Path) -> None:
    outcome = run_command("verify", "run", "--data", digits_data, "--factory", STUDENT)
    assert outcome.code == 2
    assert outcome.hints == [f"hint: if you trust that code, name it yourself: --factory {TEACHER}"]
    forget_networks()
    bench = ("bench", "run", "--seconds", 0.01, "--batch", 1, "--json")
    outcome = run_command(*bench)
    teacher = json.loads(outcome.out)["networks"]["teacher"]
    assert f"--factory {TEACHER}" in teacher["not_run"]
    assert not Path("imported").exists()
    networks = json.loads(run_command(*bench, "--factory", TEACHER).out)["networks"]
    assert networks["teacher"]["not_run"] is None


def test_the_other_commands_import_nothing(foreign: RunFolder) -> None:
    for command in (("verify", "run"), ("report", "run"), ("baseline", "run", "-o", "baseline.npz")):
        outcome = run_command(*command)
        assert outcome.code in (0, 3), outcome.err
    assert not Path("imported").exists()


def test_python_names_factories_too(foreign: RunFolder) -> None:
    with pytest.raises(DfadcError, match="would import code"):
        export_student(foreign, ["onnx"])
    with pytest.raises(DfadcError, match="would import code"):
        load_run_teacher(foreign)
    foreign.update_record({"status": "interrupted"})
    with pytest.raises(DfadcError, match="would import code"):
        resume_distillation(foreign, factories=[TEACHER])
    assert not Path("imported").exists()


def test_a_factory_that_nobody_named_is_not_swapped_in(foreign: RunFolder) -> None:
    """Naming one factory allows that one, not what the folder says."""
    metadata = {**read_safetensors_metadata(foreign.student), ARCHITECTURE_KEY: "os:system"}
    foreign.student.write_bytes(serialise(read_safetensors(foreign.student), metadata))
    record_student(foreign)
    outcome = run_command("export", "run", "-e", "onnx", "--factory", STUDENT)
    assert outcome.code == 2
    assert "'os:system'" in outcome.errors[0]


def test_a_new_run_is_told_its_factories_by_name(digits_teacher: Path, tmp_path: Path) -> None:
    outcome = run_command("distill", digits_teacher, "--factory", STUDENT, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert "goes with --resume" in outcome.errors[0]
    assert list(tmp_path.iterdir()) == []
