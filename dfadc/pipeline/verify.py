"""The stage `verify`: every artifact on the frozen samples.

Imports torch only for teacher and fp32 student on labelled data, and for the student on a baseline's samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError, RequirementMissing, memory_errors
from dfadc.pipeline.gates import gate_thresholds, recipe_to_judge_by
from dfadc.pipeline.inference import VerificationInputs, read_inputs, run_student, run_teacher
from dfadc.pipeline.lineage import check_lineage, check_samples
from dfadc.pipeline.network_judge import LESS_MEMORY, NetworkJudge
from dfadc.pipeline.report import describe_run, write_report
from dfadc.run_lock import holding_writable_run
from dfadc.sampling.lengths import PRIOR_STEPS
from dfadc.training.sample_size import check_accuracy_can_pass
from dfadc.verification.judge import (
    ArtifactFile,
    StudentResult,
    artifact_failed,
    artifact_not_run,
    student_not_run,
    verify_student,
)
from dfadc.verification.pixel_samples import load_samples
from dfadc.verification.report import LabelledAccuracy, Report, build_report
from dfadc.verification.thresholds import ExportLimits
from exporters.describe import artifact_metadata
from exporters.manifest import FILE_NAME, NOT_LISTED, Manifest, changed_artifacts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.verification.pixel_samples import Samples
    from dfadc.verification.thresholds import Thresholds


@dataclass(frozen=True)
class VerifySettings:
    """Options of a verification beyond the recipe.

    Args:
        data: ImageFolder or .npz with labels, for accuracy. It evaluates; it selects nothing.
        baseline: file of :func:`dfadc.write_baseline` that every network is compared with.
        gates: changes to the recipe's gates, such as ``"verify.min_agreement=0.9"``.
        required: artifact files that must have run, besides those of the recipe.
        trust_teacher: code in the teacher file may run, for its accuracy.
        factories: each ``module:factory`` of the student or the teacher, if labelled images or a baseline need them;
            the run folder alone may not import code.
    """

    data: Path | None = None
    baseline: Path | None = None
    gates: Sequence[str] = ()
    required: Sequence[str] = ()
    trust_teacher: bool = False
    factories: Sequence[str] = ()


def check_inputs(settings: VerifySettings, recipe: Recipe, *, contract: ImageContract, teacher_sha256: str) -> None:
    """Reads data and baseline as a verification will, so that a long run does not end with what does not fit.

    Raises:
        DfadcError: and its children, as :func:`verify_run` raises them; or there are too few labelled images for the
            gate on accuracy.
    """
    thresholds = gate_thresholds(recipe)
    _check_judgeable(thresholds, settings)
    data, _ = read_inputs(contract, teacher_sha256, data=settings.data, baseline=settings.baseline)
    if data is not None and thresholds.min_accuracy is not None:
        check_accuracy_can_pass(thresholds.min_accuracy, len(data), contract)


@memory_errors(LESS_MEMORY)
@holding_writable_run
def verify_run(
    run: RunFolder, settings: VerifySettings | None = None, *, export_error: DfadcError | None = None
) -> Report:
    """Judges the fp32 student and every artifact of a run; writes the report in all its forms.

    An artifact whose bytes are not those that were exported fails; one that cannot run here is NOT RUN, and so is one
    that the manifest does not list. The others are judged all the same.

    Args:
        run: a finished run.
        settings: options beyond the recipe.
        export_error: error that kept an artifact from being exported: the report states it, with its exit code.

    Returns:
        The report as JSON values; its ``exit_code`` is that of the command.

    Raises:
        RequirementMissing: there is no such baseline, or a gate needs labelled images and there are none.
        DfadcError: student, samples and artifacts are not of one student, or data or baseline cannot be used.
    """
    settings = settings or VerifySettings()
    run.require_finished()
    recipe = recipe_to_judge_by(run.recipe, settings.gates)
    thresholds = gate_thresholds(recipe)
    manifest = Manifest.read(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    changed = changed_artifacts(manifest, run.path)
    origins = check_lineage(run, manifest, changed=changed)
    samples = load_samples(run.samples)
    inputs = _read_inputs(samples, settings, thresholds, run.record()["teacher"]["sha256"])
    expected = () if inputs.baseline is None else tuple(inputs.baseline.predictions)
    unlisted = manifest.unlisted(run.artifacts)
    notes = [*_data_notes(inputs), *origins, *_sample_notes(samples)]
    if unlisted:
        subject = f"{len(unlisted)} files are" if len(unlisted) > 1 else "1 file is"
        names = ", ".join(path.name for path in unlisted)
        notes.append(f"{subject} in no manifest: {names}; export again what is to be verified")
    judge = NetworkJudge(inputs, thresholds, expected, notes=notes)
    student, accuracy = _judge_student(run, judge, settings)
    artifacts = []
    for record in manifest.artifacts:
        path = run.path / record.file
        file = ArtifactFile(path.name, record.requested_precision, record.size_bytes)
        if record.file in changed:  # it is not run
            artifacts.append(artifact_failed(file, changed[record.file]))
        else:
            artifacts.append(judge.artifact(file, path, is_intact=True))
    sizes = {path.name: path.stat().st_size for path in unlisted}
    artifacts += [artifact_not_run(ArtifactFile(name, "unknown", size), NOT_LISTED) for name, size in sizes.items()]
    report = build_report(
        samples=samples,
        thresholds=thresholds,
        student=student,
        artifacts=artifacts,
        accuracy=accuracy,
        required={*settings.required, *judge.missing()},
        failure=export_error,
        run=describe_run(run, manifest),
        additions=judge.additions(),
    )
    return write_report(run, report, samples)


@memory_errors(LESS_MEMORY)
def verify_file(
    artifact: Path,
    samples_path: Path,
    settings: VerifySettings | None = None,
    *,
    recipe: str | Path | None = None,
    precision: str = "",
) -> Report:
    """Judges one artifact on a samples file: needs no run, no teacher and no torch.

    Args:
        artifact: to be judged; it must run here.
        samples_path: a run's samples.npz.
        settings: options beyond the recipe.
        recipe: whose gates count; by default the recipe.toml beside the samples, which is that of their run, else
            recipe ``auto``, with a note.
        precision: whose limits of comparison A count; by default that of the artifact's metadata, else fp32.

    Raises:
        RequirementMissing: there is no such baseline, it does not hold the artifact, or a gate needs labelled images.
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
    inputs = _read_inputs(samples, settings, thresholds, teacher_sha256)
    if inputs.baseline is not None and artifact.name not in inputs.baseline.predictions:
        raise RequirementMissing(
            f"the baseline of {inputs.baseline.run} does not hold {artifact.name}",
            f"it holds {', '.join(inputs.baseline.predictions)}; networks are matched by name",
        )
    compares_export = thresholds.export.get(precision, ExportLimits()) != ExportLimits()
    origin = check_samples(samples, samples_path, artifact, form, compares_export=compares_export)
    notes = [*_data_notes(inputs), *origin.notes]
    if recipe is None and source == "auto":
        notes.append(f"gates of recipe auto: no recipe.toml lies beside {samples_path}, and none was named")
    if inputs.baseline is not None and teacher_sha256 is None:
        notes.append(f"{artifact.name} does not record its teacher: the baseline's teacher may be another")
    judge = NetworkJudge(inputs, thresholds, (artifact.name,), same_student=not origin.is_other, notes=notes)
    result = judge.artifact(ArtifactFile(artifact.name, precision, artifact.stat().st_size), artifact)
    if origin.is_other:
        student = student_not_run(samples, f"not that of {artifact.name}")
    else:  # its frozen outputs are for the samples only: it has no accuracy, and nothing to compare with a baseline
        student = verify_student(samples, replace(thresholds, min_accuracy=None))
    return build_report(
        samples=samples,
        thresholds=thresholds,
        student=student,
        artifacts=[result],
        required={artifact.name, *settings.required},
        additions=judge.additions(),
    )


def _read_inputs(
    samples: Samples, settings: VerifySettings, thresholds: Thresholds, teacher_sha256: str | None
) -> VerificationInputs:
    _check_judgeable(thresholds, settings)
    data, baseline = read_inputs(samples.contract, teacher_sha256, data=settings.data, baseline=settings.baseline)
    return VerificationInputs(samples, data, baseline).without_borders(thresholds.boundary_width)


def _judge_student(
    run: RunFolder, judge: NetworkJudge, settings: VerifySettings
) -> tuple[StudentResult, LabelledAccuracy | None]:
    """The fp32 student's result; with labelled images also its accuracy and the teacher's."""
    outputs = run_student(run, judge.inputs, factories=settings.factories)
    result, data = judge.student(outputs), judge.inputs.data
    if data is None or (accuracy := outputs.accuracy) is None:
        return result, None
    teacher = run_teacher(run, data, trust=settings.trust_teacher, factories=settings.factories)
    return result, LabelledAccuracy(teacher, accuracy)


def _data_notes(inputs: VerificationInputs) -> tuple[str, ...]:
    return () if inputs.data is None else inputs.data.notes


def _sample_notes(samples: Samples) -> list[str]:
    """Remark that the run was too short for a whole prior generator."""
    steps = samples.provenance.get("prior_steps")
    if not isinstance(steps, int) or steps >= PRIOR_STEPS:
        return []
    updates = f"the prior generator had {steps} updates, in a longer run it has {PRIOR_STEPS}"
    return [
        f"{updates}: students of runs of other lengths are judged on other samples, so their agreements do not compare"
    ]


def _check_judgeable(thresholds: Thresholds, settings: VerifySettings) -> None:
    """A gate on accuracy must not be left out because there are no labelled images."""
    if thresholds.min_accuracy is not None and settings.data is None:
        raise RequirementMissing(
            f"the gate on accuracy (at least {thresholds.min_accuracy:g}) needs labelled images",
            "pass --data, or switch it off: --set verify.min_accuracy=off",
        )
