"""Fixtures of what verification judges: a run with an fp16 artifact, its baseline, a worse run; and their reports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import ROOT, Outcome, run_command
from conftest import QUICK_RECIPE, QUICK_STUDENT, made_once
from torch import nn

import dfadc
from dfadc.networks.network_file import load_network
from dfadc.run_folder import RunFolder
from dfadc.storage import sha256_file
from dfadc.verification.samples import STUDENT_SHA256, SampleSet

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def judged_run(finished_run: RunFolder, session_folder: Path) -> RunFolder:
    """The finished run with an fp16 artifact besides."""

    def make(folder: Path) -> None:
        copy = copy_of(finished_run, folder / "run")
        assert run_command("export", copy.path, "-e", "onnx:fp16", "--quiet").code == 0
        # So few samples cannot show the 99.5 % that fp16 is held to.
        text = copy.recipe.read_text()
        copy.recipe.write_text(text.replace("min_fp16_agreement = 0.995", "min_fp16_agreement = 0.9"))
        assert copy.recipe.read_text() != text

    return RunFolder(made_once(session_folder / "judged", make) / "run")


@pytest.fixture(scope="session")
def frozen_baseline(judged_run: RunFolder, digits_data: Path, session_folder: Path) -> tuple[Path, Outcome]:
    """Its baseline, and what the command printed."""

    def make(folder: Path) -> None:
        command = ("baseline", judged_run.path, "-o", folder / "baseline.npz", "--data", digits_data, "--json")
        (folder / "printed.json").write_text(json.dumps(run_command(*command)))

    folder = made_once(session_folder / "frozen", make)
    return folder / "baseline.npz", Outcome(*json.loads((folder / "printed.json").read_text()))


@pytest.fixture
def baseline(frozen_baseline: tuple[Path, Outcome]) -> Path:
    """The file alone."""
    return frozen_baseline[0]


@pytest.fixture(scope="session")
def worse_run(digits_teacher: Path, finished_run: RunFolder, session_folder: Path) -> RunFolder:
    """A run whose student confuses six of the ten classes, on any machine: so much is significant on few samples."""

    def make(folder: Path) -> None:
        module, _ = load_network(finished_run.student)
        head = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
        confused = [1, 2, 3, 4, 5, 0, 6, 7, 8, 9]
        weights = folder / "confused.pt"
        head.load_state_dict({name: values[confused] for name, values in head.state_dict().items()})
        torch.save(module.state_dict(), weights)
        changes = {"steps": 1, "student.weights": weights, "student.optimizer.learning_rate": 1e-6}
        recipe = dfadc.load_recipe("auto", [f"{path}={value}" for path, value in {**QUICK_RECIPE, **changes}.items()])
        run = dfadc.run_distillation(digits_teacher, QUICK_STUDENT, out=folder / "run", recipe=recipe)
        dfadc.export_student(run, ["onnx"])

    return RunFolder(made_once(session_folder / "worse", make) / "run")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy_of(folder: RunFolder, path: Path) -> RunFolder:
    shutil.copytree(folder.path, path)
    return RunFolder(path)


def record_student(run: RunFolder) -> None:
    """Has the samples record the student that lies in a run now, which answers as the one before."""
    samples = SampleSet.load(run.samples)
    now = {STUDENT_SHA256: sha256_file(run.student)}
    replace(samples, provenance={**samples.provenance, **now}).save(run.samples)


def verified(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The report that `dfadc verify --json` prints; it fits the schema whatever its verdict."""
    outcome = run_command("verify", *arguments, "--json")
    assert outcome.code == code, outcome.err + outcome.out
    report: dict[str, Any] = json.loads(outcome.out)
    schema = json.loads((ROOT / "dfadc" / "reporting" / "report.schema.json").read_text())
    import jsonschema  # here, for tests of a GPU run where neither it nor scipy is installed

    jsonschema.Draft202012Validator(schema).validate(report)
    assert report["exit_code"] == code
    return report


def classes_of(artifact: Path, samples: SampleSet) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(artifact)
    (logits,) = session.run(None, {session.get_inputs()[0].name: samples.normalised()})
    classes: np.ndarray[Any, Any] = np.asarray(logits).argmax(1)
    return classes


def fair_coin(lost: int, gained: int) -> float:
    from scipy import stats

    return float(stats.binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0


def checks_of(entry: dict[str, Any], comparison: str) -> dict[str, str]:
    return {check["gate"]: check["verdict"] for check in entry["checks"] if check["comparison"] == comparison}
