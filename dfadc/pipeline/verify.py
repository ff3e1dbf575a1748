"""Stage four: every artifact on the frozen samples.

Imports no torch; only teacher and fp32 student on labelled data, or the student on a baseline's samples, do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.errors import (
    DfadcError,
    OutOfMemory,
    RequirementMissing,
    RuntimeCrashed,
    RuntimeRefused,
    memory_errors,
)
from dfadc.pipeline.gates import compares_export, gate_thresholds, recipe_to_judge_by
from dfadc.pipeline.inference import (
    Answers,
    Questions,
    Rights,
    ask_artifact,
    ask_student,
    ask_teacher,
    read_inputs,
    read_questions,
)
from dfadc.pipeline.provenance import check_lineage, check_samples
from dfadc.pipeline.report import describe_run, write_report
from dfadc.run_lock import holding_writable_run
from dfadc.sampling.lengths import PRIOR_STEPS
from dfadc.training.sample_size import check_accuracy_can_pass
from dfadc.verification.agreement import Accuracy
from dfadc.verification.gate import STUDENT, Failure, remark_checks
from dfadc.verification.judge import (
    ArtifactFile,
    ArtifactResult,
    StudentResult,
    artifact_failed,
    artifact_not_run,
    student_not_run,
    verify_artifact,
    verify_beside_teacher,
    verify_student,
)
from dfadc.verification.pixel_samples import load_samples
from dfadc.verification.pixel_scores import PixelCounts, PixelScores
from dfadc.verification.regression import (
    BaselineComparison,
    baseline_checks,
    compare_with_baseline,
    describe_baseline,
    unseen_drops,
)
from dfadc.verification.report import LabelledAccuracy, Report, build_report
from exporters.describe import artifact_metadata
from exporters.manifest import FILE_NAME, NOT_LISTED, ArtifactRecord, Manifest, changed_artifacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.verification.baseline import Baseline
    from dfadc.verification.gate import Check, Thresholds
    from dfadc.verification.pixel_agreement import MeasuredAccuracy
    from dfadc.verification.pixel_samples import Samples


@dataclass(frozen=True)
class VerifySettings:
    """What a caller may ask of a verification beyond the recipe.

    Args:
        data: ImageFolder or .npz with labels, for accuracy. It evaluates; it selects nothing.
        baseline: file of :func:`dfadc.write_baseline` that nothing may fall behind.
        gates: changes to the recipe's gates, such as ``"verify.min_agreement=0.9"``.
        required: artifact files that must have run, besides those of the recipe.
        trust_teacher: whether code in the teacher file may run, for its accuracy.
        factories: each ``module:factory`` of the student or the teacher, where labelled images or a baseline need
            them; the run folder alone may not import code.
    """

    data: Path | None = None
    baseline: Path | None = None
    gates: Sequence[str] = ()
    required: Sequence[str] = ()
    trust_teacher: bool = False
    factories: Sequence[str] = ()


def check_inputs(
    settings: VerifySettings,
    recipe: Recipe,
    *,
    contract: ImageContract,
    teacher_sha256: str,
) -> None:
    """Reads data and baseline as a verification will, so that a long run does not end with what does not fit.

    Args:
        settings: of the verification.
        recipe: of the run, with its gates.
        contract: of teacher and student.
        teacher_sha256: of the teacher's file.

    Raises:
        DfadcError: and its children, as :func:`verify_run` raises them; or there are too few labelled images for the
            gate on accuracy.
    """
    thresholds = gate_thresholds(recipe)
    _check_judgeable(thresholds, has_data=settings.data is not None)
    data, _ = read_inputs(contract, teacher_sha256, data=settings.data, baseline=settings.baseline)
    if data is not None and thresholds.min_accuracy is not None:
        check_accuracy_can_pass(thresholds.min_accuracy, len(data), contract)


_LESS_MEMORY = "free some; a run with a lower verify.num_samples needs less here"
_NEED_LESS_MEMORY = memory_errors(_LESS_MEMORY)


@_NEED_LESS_MEMORY
@holding_writable_run
def verify_run(
    run: RunFolder, settings: VerifySettings | None = None, *, export_error: DfadcError | None = None
) -> Report:
    """Judges the fp32 student and every artifact of a run; writes the report in all its forms.

    An artifact whose bytes are not those that were exported fails; one that cannot run here is NOT RUN, and so is one
    that the manifest does not list. The others are judged all the same.

    Args:
        run: a finished run.
        settings: what is asked beyond the recipe.
        export_error: what kept an artifact from being exported: the report then states it, with its exit code.

    Returns:
        The report as JSON values; its ``exit_code`` is what the command exits with.

    Raises:
        RequirementMissing: there is no such baseline, or a gate needs labelled images and there are none.
        DfadcError: student, samples and artifacts are not of one student, or data or baseline cannot be used.
    """
    settings = settings or VerifySettings()
    run.require_finished()
    recipe = recipe_to_judge_by(run.recipe, settings.gates)
    manifest = Manifest.read(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    changed = changed_artifacts(manifest, run.path)
    origins = check_lineage(run, manifest, changed=changed)
    samples, teacher_sha256 = load_samples(run.samples), run.record()["teacher"]["sha256"]
    thresholds = gate_thresholds(recipe)
    questions = read_questions(samples, data=settings.data, baseline=settings.baseline, teacher_sha256=teacher_sha256)
    questions = questions.without_borders(thresholds.boundary_width)
    expected = () if questions.baseline is None else questions.baseline.predictions
    judge = _Judge(questions, thresholds, expected)
    unlisted = manifest.unlisted(run.artifacts)
    judge.notes.extend([*origins, *_sample_notes(samples), *_unlisted_notes(unlisted)])
    answers = ask_student(run, questions, factories=settings.factories)
    accuracy = None
    if questions.data is not None and answers.correct is not None:
        teacher = ask_teacher(run, questions.data, trust=settings.trust_teacher, factories=settings.factories)
        accuracy = LabelledAccuracy(_measured(teacher), _measured(answers.correct))
    student = judge.student(answers)
    artifacts = [
        artifact_failed(_artifact_file(known), changed[known.file])
        if known.file in changed
        else judge.artifact(_artifact_file(known), run.path / known.file, is_intact=True)
        for known in manifest.artifacts
    ]
    artifacts += [
        artifact_not_run(ArtifactFile(path.name, "unknown", path.stat().st_size), NOT_LISTED) for path in unlisted
    ]
    report = build_report(
        samples=samples,
        thresholds=judge.thresholds,
        student=student,
        artifacts=artifacts,
        accuracy=accuracy,
        required={*settings.required, *judge.missing()},
        failure=None if export_error is None else _failure(export_error),
        run=describe_run(run, manifest),
        additions=judge.additions(),
    )
    return write_report(run, report, samples)


@_NEED_LESS_MEMORY
def verify_file(
    artifact: Path,
    samples_path: Path,
    settings: VerifySettings | None = None,
    *,
    recipe: str | Path | None = None,
    precision: str = "",
) -> Report:
    """Judges one artifact on a samples file, with no run, no teacher and no torch at hand.

    Args:
        artifact: what is judged; it must run here.
        samples_path: a run's samples.npz.
        settings: what else is asked.
        recipe: whose gates count; by default the recipe.toml beside the samples, which is that of their run, else
            recipe ``auto``, and that is noted.
        precision: whose limits of comparison A count; by default what the artifact says it is, else fp32.

    Raises:
        RequirementMissing: there is no such baseline, it does not know the artifact, or a gate needs labelled images.
        DfadcError: a file is missing or damaged, or the artifact does not take these samples; they are another
            teacher's, or another student's and comparison A has limits.
    """
    settings = settings or VerifySettings()
    if not artifact.is_file():
        raise DfadcError(f"there is no artifact {artifact}", "check the path")
    form = artifact_metadata(artifact)
    samples, teacher_sha256 = load_samples(samples_path), form.get("dfadc.teacher_sha256")
    precision = precision or form.get("dfadc.precision", "fp32")
    beside = samples_path.parent / "recipe.toml"
    source = recipe or (beside if beside.is_file() else "auto")
    thresholds = gate_thresholds(recipe_to_judge_by(source, settings.gates))
    questions = read_questions(samples, data=settings.data, baseline=settings.baseline, teacher_sha256=teacher_sha256)
    questions = questions.without_borders(thresholds.boundary_width)
    _check_known(artifact.name, questions.baseline)
    origin = check_samples(
        samples, samples_path, artifact, form, compares_export=compares_export(thresholds, precision)
    )
    judge = _Judge(questions, thresholds, [artifact.name], of_other_student=origin.is_other)
    judge.notes.extend(origin.notes)
    if recipe is None and source == "auto":
        judge.notes.append(f"gates of recipe auto: no recipe.toml lies beside {samples_path}, and none was named")
    if questions.baseline is not None and teacher_sha256 is None:
        judge.notes.append(f"{artifact.name} does not say who taught it: the baseline's teacher may be another")
    result = judge.artifact(ArtifactFile(artifact.name, precision, artifact.stat().st_size), artifact)
    return build_report(
        samples=samples,
        thresholds=thresholds,
        # Of the student there are the frozen answers only: no accuracy, and none to a baseline's samples.
        student=student_not_run(samples, f"not that of {artifact.name}")
        if origin.is_other
        else verify_student(samples, replace(thresholds, min_accuracy=None)),
        artifacts=[result],
        required={artifact.name, *settings.required},
        additions=judge.additions(),
    )


class _Judge:
    """Asks networks and judges their answers, each beside itself in the baseline where there is one.

    Args:
        questions: what is asked.
        thresholds: the gates' limits.
        expected: networks of the baseline that must run.
        of_other_student: the samples hold the answers of another student than that of the artifacts.
    """

    def __init__(
        self,
        questions: Questions,
        thresholds: Thresholds,
        expected: Iterable[str],
        *,
        of_other_student: bool = False,
    ) -> None:
        _check_judgeable(thresholds, has_data=questions.data is not None)
        self.questions = questions
        self.thresholds = thresholds
        self.expected = tuple(expected)
        self._verify = verify_beside_teacher if of_other_student else verify_artifact
        self.notes = [] if questions.data is None else list(questions.data.notes)
        self._compared: dict[str, BaselineComparison | None] = {}

    def student(self, answers: Answers) -> StudentResult:
        """Judges the fp32 student."""
        accuracy = None if answers.correct is None else _measured(answers.correct)
        extras = self._held_against_baseline(STUDENT, answers)
        return verify_student(self.questions.samples, self.thresholds, accuracy=accuracy, extras=extras)

    def artifact(self, file: ArtifactFile, path: Path, *, is_intact: bool = False) -> ArtifactResult:
        """Runs and judges an artifact; one that cannot run here is NOT RUN, one that crashes its runtime fails.

        Args:
            file: as it is shown.
            path: of it.
            is_intact: its bytes are those that were exported, so that any other error is its failure to run.
        """
        try:
            with memory_errors(_LESS_MEMORY):
                answers = ask_artifact(path, self.questions)
        except OutOfMemory:
            raise
        except (RequirementMissing, RuntimeRefused) as exc:
            return artifact_not_run(file, exc.message)
        except DfadcError as exc:
            if not (is_intact or isinstance(exc, RuntimeCrashed)):
                raise
            return artifact_failed(file, exc.message)
        return self._verify(
            file,
            answers.given,
            samples=self.questions.samples,
            thresholds=self.thresholds,
            accuracy=None if answers.correct is None else _measured(answers.correct),
            extras=(*remark_checks(answers.remark), *self._held_against_baseline(file.name, answers)),
        )

    def missing(self) -> list[str]:
        """Networks of the baseline that were to run and did not."""
        return [name for name in self.expected if name not in self._compared]

    def additions(self) -> dict[str, Any]:
        """The report's ``baseline`` and ``notes``."""
        known = self.questions.baseline
        if known is None:
            return {"baseline": None, "notes": self.notes}
        described = describe_baseline(known, self._compared, max_drop=self.thresholds.max_baseline_drop)
        missing = [f"the baseline knows {name}, which did not run" for name in self.missing()]
        with_labels = self.questions.data is not None
        unseen = unseen_drops(known, self.thresholds.max_baseline_drop, with_labels=with_labels)
        return {
            "baseline": {**described, "missing": self.missing()},
            "notes": [*self.notes, *missing, *unseen, *self._unpaired_labels()],
        }

    def _unpaired_labels(self) -> list[str]:
        """Why accuracy was not held against the baseline, where one side has labels."""
        known, data = self.questions.baseline, self.questions.data
        if known is None or (known.labelled is None) == (data is None):
            return []
        if data is None:
            return ["the baseline has labelled results: pass --data to hold the accuracy against them"]
        return ["the baseline was made without --data: the accuracy is held against nothing"]

    def _held_against_baseline(self, name: str, answers: Answers) -> tuple[Check, ...]:
        known = self.questions.baseline
        if known is None or answers.on_baseline is None:
            return ()
        assert not isinstance(answers.correct, PixelCounts), "no dense baselines"  # noqa: S101
        found = compare_with_baseline(known, name, classes=answers.on_baseline, correct=answers.correct)
        self._compared[name] = found
        return baseline_checks(found, self.thresholds.max_baseline_drop)


def _sample_notes(samples: Samples) -> list[str]:
    """A remark where the run was too short for a whole prior generator."""
    made = samples.provenance.get("prior_steps")
    if not isinstance(made, int) or made >= PRIOR_STEPS:
        return []
    who = f"the prior generator had {made} updates, in a longer run it has {PRIOR_STEPS}"
    return [f"{who}: students of runs of other lengths are judged on other samples, so their agreements do not compare"]


def _unlisted_notes(unlisted: Sequence[Path]) -> list[str]:
    """A remark on artifacts that nobody knows."""
    if not unlisted:
        return []
    names = ", ".join(path.name for path in unlisted)
    who = f"{len(unlisted)} files are" if len(unlisted) > 1 else "1 file is"
    return [f"{who} in no manifest: {names}; export again what is to be verified"]


def _check_judgeable(thresholds: Thresholds, *, has_data: bool) -> None:
    """A gate that was asked for must not be left out because there is nothing to judge by."""
    if thresholds.min_accuracy is not None and not has_data:
        raise RequirementMissing(
            f"the gate on accuracy (at least {thresholds.min_accuracy:g}) needs labelled images",
            "pass --data, or switch it off: --set verify.min_accuracy=off",
        )


def _failure(error: DfadcError) -> Failure:
    return Failure(error.message, error.hint, error.exit_code)


def _measured(correct: Rights) -> MeasuredAccuracy:
    return PixelScores.of(correct) if isinstance(correct, PixelCounts) else Accuracy.of(correct)


def _check_known(name: str, baseline: Baseline | None) -> None:
    """One artifact that was to be held against a baseline must be, whatever it is called now."""
    if baseline is not None and name not in baseline.predictions:
        raise RequirementMissing(
            f"the baseline of {baseline.run} does not know {name}",
            f"it knows {', '.join(baseline.predictions)}; networks are matched by name",
        )


def _artifact_file(record: ArtifactRecord) -> ArtifactFile:
    return ArtifactFile(Path(record.file).name, record.requested_precision, record.size_bytes)
