"""The run folder: how it is claimed, described, read back and trimmed."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import dfadc
from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, StorageFailed
from dfadc.provenance import RECORDED_PACKAGES, environment
from dfadc.run_folder import SCHEMA, RunFolder, open_run
from dfadc.run_lock import check_claimable, claim_folder
from dfadc.storage import write_json

CONTRACT = ImageContract((1, 8, 8), 10, mean=(0.3,), std=(0.4,))


def make_run(path: Path, **changes: Any) -> RunFolder:
    folder = RunFolder(path)
    record = {"schema": SCHEMA, "status": "running", "contract": CONTRACT.to_dict(), **changes}
    write_json(folder.record_file, record)
    return folder


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


# --------------------------------------------------------------------------------------------------------- claims


def test_a_new_folder_is_made_with_all_that_lead_to_it(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path / "a" / "b", force=False)
    assert folder.path == tmp_path / "a" / "b"
    assert folder.checkpoints.is_dir()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert claim_folder(tmp_path, force=False).checkpoints.is_dir()


def test_the_working_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself stays: a shell stands in it, or a volume is mounted there."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    claim_folder(Path(), force=False)
    make_run(Path())
    claim_folder(Path(), force=True)
    assert tmp_path.stat().st_ino == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_a_claim_that_came_to_nothing_can_be_made_again(tmp_path: Path) -> None:
    """A run that was stopped while it was measured has a folder, and no record yet."""
    claim_folder(tmp_path / "run", force=False)
    assert claim_folder(tmp_path / "run", force=False).checkpoints.is_dir()


def test_a_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(DfadcError, match="already holds a run") as caught:
        claim_folder(tmp_path / "run", force=False)
    assert "--force" in caught.value.hint
    assert "--resume" in caught.value.hint
    assert contents(tmp_path) == before


@pytest.mark.parametrize("schema", [SCHEMA, "dfadc.run_folder/99"])
def test_force_replaces_a_run_of_any_version(schema: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", schema=schema)
    (folder.path / "artifacts").mkdir()
    (folder.path / "artifacts" / "student.onnx").write_text("old")
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / "file.txt"
    outside.write_text("not the run's")
    (folder.path / "link").symlink_to(outside)
    (folder.path / "linked_folder").symlink_to(outside.parent)
    claim_folder(folder.path, force=True)
    assert contents(folder.path) == {}
    assert folder.checkpoints.is_dir()
    assert outside.read_text() == "not the run's"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "precious"},
        {"run.json": "{}"},
        {"run.json": '{"schema": "othertool.run/1"}'},
        {"run.json": "not json"},
        {"run.json": "[1]"},
        {"checkpoints/last.pt": "precious"},
    ],
    ids=str,
)
def test_a_folder_that_holds_no_run_is_never_touched(files: dict[str, str], force: bool, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DfadcError, match="is not empty and holds no run"):
        claim_folder(tmp_path, force=force)
    assert contents(tmp_path) == files


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(DfadcError, match="is a file"):
        claim_folder(tmp_path / "run", force=True)
    assert (tmp_path / "run").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageFailed, match=r"cannot (create|read)"):
        claim_folder(tmp_path / "file" / "run", force=False)


def test_asking_whether_a_folder_can_be_claimed_changes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    before = contents(tmp_path)
    check_claimable(tmp_path / "new", force=False)
    check_claimable(tmp_path / "run", force=True)
    with pytest.raises(DfadcError, match="already holds a run"):
        check_claimable(tmp_path / "run", force=False)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------------- record


def test_a_run_is_opened_and_read(tmp_path: Path) -> None:
    make_run(tmp_path, seed=3)
    assert open_run(tmp_path).record()["seed"] == 3
    assert open_run(str(tmp_path)).contract() == CONTRACT


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "is not a run folder: it has no run.json"),
        ("{", "cannot read"),
        ("[]", "has schema None"),
        ("{}", "has schema None"),
        (
            '{"schema": "dfadc.run_folder/99"}',
            r"has schema 'dfadc.run_folder/99', this dfadc reads 'dfadc.run_folder/1'",
        ),
    ],
)
def test_what_is_no_run_is_refused(text: str | None, problem: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(DfadcError, match=problem):
        open_run(tmp_path)


def test_a_folder_that_is_not_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="is not a run folder"):
        open_run(tmp_path / "nowhere")


def test_an_update_keeps_the_rest_of_the_record(tmp_path: Path) -> None:
    folder = make_run(tmp_path, seed=3)
    folder.update_record({"status": "finished", "seconds": 1.5})
    assert folder.record() == {**folder.record(), "seed": 3, "status": "finished", "seconds": 1.5}


@pytest.mark.parametrize(("status", "has_student"), [("running", True), ("finished", False), (None, False)])
def test_an_unfinished_run_is_refused_where_a_student_is_needed(
    status: str | None, has_student: bool, tmp_path: Path
) -> None:
    folder = make_run(tmp_path, status=status)
    if has_student:
        folder.student.write_bytes(b"x")
    with pytest.raises(DfadcError, match="is not finished") as caught:
        folder.require_finished()
    assert "--resume" in caught.value.hint


def test_a_finished_run_has_a_student(tmp_path: Path) -> None:
    folder = make_run(tmp_path, status="finished")
    folder.student.write_bytes(b"x")
    folder.require_finished()


def test_the_files_lie_where_the_readme_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = {
        "recipe.toml": folder.recipe,
        "run.json": folder.record_file,
        "metrics.jsonl": folder.metrics,
        "checkpoints": folder.checkpoints,
        "student.safetensors": folder.student,
        "generator.safetensors": folder.generator,
        "calibration.npz": folder.calibration,
        "samples.npz": folder.samples,
        "artifacts": folder.artifacts,
        "report.json": folder.report_json,
        "report.md": folder.report_md,
        "report.html": folder.report_html,
        "bench.json": folder.bench,
    }
    assert {name: tmp_path / name for name in names} == names


# -------------------------------------------------------------------------------------------------------- metrics


def write_metrics(folder: RunFolder, *steps: int, tail: str = "") -> None:
    for step in steps:
        folder.append_metrics({"step": step, "student_loss": step / 2})
    with folder.metrics.open("a") as stream:
        stream.write(tail)


def test_metrics_are_one_line_of_json_each(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_metrics(folder, 20, 40)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == list(folder.read_metrics())
    assert [line["step"] for line in folder.read_metrics()] == [20, 40]


def test_no_metrics_are_none(tmp_path: Path) -> None:
    assert list(RunFolder(tmp_path).read_metrics()) == []


@pytest.mark.parametrize("tail", ["", '{"step": 60, "stud', "{", '{"step": 60'])
def test_a_line_that_a_crash_cut_off_is_left_out(tail: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_metrics(folder, 20, 40, tail=tail)
    assert [line["step"] for line in folder.read_metrics()] == [20, 40]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (20, [20]), (30, [20]), (40, [20, 40]), (100, [20, 40])])
def test_trimming_drops_what_will_be_computed_again(step: int, kept: list[int], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_metrics(folder, 20, 40, tail='{"step": 60, "stud')
    folder.trim_metrics(step)
    # The line cut off is gone too: the next one must not be glued to it.
    write_metrics(folder, 1000)
    assert [line["step"] for line in folder.read_metrics()] == [*kept, 1000]
    assert folder.metrics.read_text().count("\n") == len(kept) + 1


def test_metrics_are_json_where_a_loss_is_not_finite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    nan, terms = float("nan"), {"balance": float("-inf"), "l2": 1.5}
    folder.append_metrics({"step": 1, "student_loss": nan, "terms": terms, "note": "NaN"})
    # As this project wrote it before, too.
    with folder.metrics.open("a") as stream:
        stream.write('{"step": 2, "student_loss": NaN}\n')
    folder.trim_metrics(2)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in folder.metrics.read_text().splitlines()]
    assert lines == [
        {"step": 1, "student_loss": None, "terms": {"balance": None, "l2": 1.5}, "note": "NaN"},
        {"step": 2, "student_loss": None},
    ]


def test_metrics_that_cannot_be_written_are_a_storage_failure(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()
    with pytest.raises(StorageFailed, match=r"metrics\.jsonl") as caught:
        folder.append_metrics({"step": 1})
    assert "--resume" in caught.value.hint


# ---------------------------------------------------------------------------------------------------- environment


def test_the_environment_says_what_is_needed_to_repeat_a_run() -> None:
    recorded = environment()
    assert set(recorded["versions"]) == {"dfadc", *RECORDED_PACKAGES}
    assert recorded["versions"]["dfadc"] == dfadc.__version__
    assert recorded["versions"]["torch"] == metadata.version("torch")
    assert recorded["python"] == platform.python_version()
    commit = recorded["git_commit"]
    assert commit is None or (len(commit) == 40 and set(commit) <= set("0123456789abcdef"))
    json.dumps(recorded, allow_nan=False)


@pytest.mark.parametrize("program", ["/somewhere/bin/dfadc", "dfadc", "/somewhere/dfadc/__main__.py"])
def test_the_command_is_as_a_person_would_type_it(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "distill", "my teacher.pt"])
    assert environment()["command"] == "dfadc distill 'my teacher.pt'"


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfadc.provenance.RECORDED_PACKAGES", ("torch", "no-such-package"))
    assert environment()["versions"]["no-such-package"] is None
