"""Runs and judges the networks of a verification, each also against itself in a baseline. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, OutOfMemory, RequirementMissing, RuntimeCrashed, RuntimeRefused, memory_errors
from dfadc.pipeline.inference import NetworkOutputs, VerificationInputs, run_artifact
from dfadc.verification.checks import remark_checks
from dfadc.verification.gate import STUDENT
from dfadc.verification.judge import (
    ArtifactFile,
    ArtifactResult,
    StudentResult,
    artifact_failed,
    artifact_not_run,
    verify_artifact,
    verify_student,
)
from dfadc.verification.pixel_scores import PixelCounts
from dfadc.verification.regression import (
    BaselineComparison,
    baseline_checks,
    compare_with_baseline,
    describe_baseline,
    unseen_drops,
)

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.verification.checks import Check
    from dfadc.verification.thresholds import Thresholds

LESS_MEMORY = "free some; a run with a lower verify.num_samples needs less here"


@dataclass
class NetworkJudge:
    """Runs networks and judges their outputs.

    The networks of the baseline that are ``expected`` must run. With ``same_student`` the samples hold the outputs of
    the artifacts' own fp32 student.
    """

    inputs: VerificationInputs
    thresholds: Thresholds
    expected: tuple[str, ...] = ()
    same_student: bool = True
    notes: list[str] = field(default_factory=list)
    _compared: dict[str, BaselineComparison | None] = field(default_factory=dict)

    def student(self, outputs: NetworkOutputs) -> StudentResult:
        """Judges the fp32 student."""
        extras = self._baseline_checks(STUDENT, outputs)
        return verify_student(self.inputs.samples, self.thresholds, accuracy=outputs.accuracy, extras=extras)

    def artifact(self, file: ArtifactFile, path: Path, *, is_intact: bool = False) -> ArtifactResult:
        """Runs and judges an artifact; one that cannot run here is NOT RUN, one that crashes its runtime fails.

        If it ``is_intact``, its bytes are those that were exported, and any other error is its failure to run.
        """
        try:
            with memory_errors(LESS_MEMORY):
                outputs = run_artifact(path, self.inputs)
        except OutOfMemory:
            raise
        except (RequirementMissing, RuntimeRefused) as exc:
            return artifact_not_run(file, exc.message)
        except DfadcError as exc:
            if not (is_intact or isinstance(exc, RuntimeCrashed)):
                raise
            return artifact_failed(file, exc.message)
        return self.judged(file, outputs)

    def judged(self, file: ArtifactFile, outputs: NetworkOutputs) -> ArtifactResult:
        """Judges an artifact that ran."""
        return verify_artifact(
            file,
            outputs.outputs,
            samples=self.inputs.samples,
            thresholds=self.thresholds,
            accuracy=outputs.accuracy,
            extras=(*remark_checks(outputs.remark), *self._baseline_checks(file.name, outputs)),
            same_student=self.same_student,
        )

    def missing(self) -> list[str]:
        """Networks of the baseline that had to run and did not."""
        return [name for name in self.expected if name not in self._compared]

    def additions(self) -> dict[str, Any]:
        """The report's ``baseline`` and ``notes``."""
        baseline, max_drop = self.inputs.baseline, self.thresholds.max_baseline_drop
        if baseline is None:
            return {"baseline": None, "notes": self.notes}
        described = describe_baseline(baseline, self._compared, max_drop=max_drop)
        missing = [f"the baseline holds {name}, which did not run" for name in self.missing()]
        has_data, unpaired = self.inputs.data is not None, []
        if has_data and baseline.labelled is None:
            unpaired = ["the baseline was made without --data: the accuracy is not compared with it"]
        elif baseline.labelled is not None and not has_data:
            unpaired = ["the baseline has labelled results: pass --data to compare the accuracy with them"]
        unseen = unseen_drops(baseline, max_drop, with_labels=has_data)
        return {
            "baseline": {**described, "missing": self.missing()},
            "notes": [*self.notes, *missing, *unseen, *unpaired],
        }

    def _baseline_checks(self, name: str, outputs: NetworkOutputs) -> tuple[Check, ...]:
        baseline = self.inputs.baseline
        if baseline is None or outputs.baseline_classes is None:
            return ()
        assert not isinstance(outputs.correct, PixelCounts), "no dense baselines"  # noqa: S101
        compared = compare_with_baseline(baseline, name, classes=outputs.baseline_classes, correct=outputs.correct)
        self._compared[name] = compared
        return baseline_checks(compared, self.thresholds.max_baseline_drop)
