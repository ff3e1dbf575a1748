"""Freezing a run as what later ones must not fall behind. Imports torch only where there are labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dfadc.api.answering import Questions, ask_artifact, ask_student, predicted, read_inputs
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.verification.agreement import predict
from dfadc.verification.baseline import Baseline, LabelledResults
from dfadc.verification.dense_samples import load_samples
from dfadc.verification.report import STUDENT
from dfadc.verification.samples import SampleSet
from exporters.manifest import FILE_NAME, Manifest, check_unchanged

if TYPE_CHECKING:
    from collections.abc import Collection

    from dfadc.run import RunFolder


class FrozenBaseline(NamedTuple):
    """A baseline that was written, and the artifacts that are not in it with the reason."""

    baseline: Baseline
    left_out: dict[str, str]


def write_baseline(
    run: RunFolder, path: Path, *, data: Path | None = None, force: bool = False, factories: Collection[str] = ()
) -> FrozenBaseline:
    """Runs the fp32 student's artifacts and freezes what they answer, beside the run's samples.

    Args:
        run: a finished run.
        path: of the file to write.
        data: labelled images, whose results are frozen too.
        force: replace a baseline that is there.
        factories: the student's ``module:factory``, where one has to be imported.

    Raises:
        DfadcError: there is a file already, or an artifact or the data cannot be used.
        GateFailed: the run has no samples, or a network answers NaN or infinity.
        StorageFailed: the file cannot be written.
    """
    run.require_finished()
    if path.exists() and not force:
        raise DfadcError(f"there is a file {path} already", "--force replaces it, or choose another -o")
    manifest = check_unchanged(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    samples, teacher_sha256 = load_samples(run.samples), run.record()["teacher"]["sha256"]
    if not isinstance(samples, SampleSet):
        raise DfadcError(
            f"the run {run.path} answers every pixel, and a baseline holds one answer an image: McNemar's test asks "
            "for independent pairs, which the pixels of an image are not",
            "gate on verify.min_agreement and verify.min_accuracy instead",
        )
    labelled, _ = read_inputs(samples.contract, teacher_sha256, data=data, baseline=None)
    questions = Questions(samples, labelled)
    answers, left_out = {STUDENT: ask_student(run, questions, factories=factories)}, {}
    for known in manifest.artifacts:
        name = Path(known.file).name
        try:
            answers[name] = ask_artifact(run.path / known.file, questions)
        except RequirementMissing as exc:
            left_out[name] = exc.message
    correct = {name: given.correct for name, given in answers.items() if isinstance(given.correct, np.ndarray)}
    baseline = Baseline(
        run=run.path.resolve().name,
        teacher_sha256=teacher_sha256,
        samples=samples,
        predictions={name: predicted(given.given) for name, given in answers.items()},
        labelled=None if labelled is None else LabelledResults(labelled.sha256, correct),
    )
    baseline.save(path)
    return FrozenBaseline(baseline, left_out)


def describe_frozen(frozen: FrozenBaseline) -> dict[str, Any]:
    """What was frozen, as plain JSON values: rates of agreement with the teacher and of accuracy by network."""
    baseline, samples = frozen.baseline, frozen.baseline.samples
    teacher, labelled = predict(samples.teacher_logits), baseline.labelled
    return {
        "run": baseline.run,
        "teacher_sha256": baseline.teacher_sha256,
        "samples": {"n": len(samples), "sha256": samples.sha256, "sources": samples.counts()},
        "data": None if labelled is None else {"n": labelled.n, "sha256": labelled.sha256},
        "networks": {
            name: {
                "agreement": float((classes == teacher).mean()),
                "accuracy": None if labelled is None else float(labelled.correct[name].mean()),
            }
            for name, classes in baseline.predictions.items()
        },
        "left_out": frozen.left_out,
    }
