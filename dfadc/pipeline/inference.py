"""Outputs of networks for samples, labelled images and a baseline: artifacts in their runtime, the others in torch.

Imports torch only if teacher or student has to run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError
from dfadc.verification.artifact_logits import artifact_logits, restore_offset
from dfadc.verification.baseline import Baseline
from dfadc.verification.label_agreement import LabelAccuracy
from dfadc.verification.pixel_outputs import Outputs, batch_size
from dfadc.verification.pixel_scores import PixelCounts, PixelScores
from dfadc.verification.rates import Accuracy
from exporters.describe import artifact_metadata
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.open import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from torch import nn

    from dfadc.contract import ImageContract
    from dfadc.evaluation.labelled_images import EvaluationData
    from dfadc.evaluation.masks import MaskedImages
    from dfadc.run_folder import RunFolder
    from dfadc.verification.pixel_agreement import MeasuredAccuracy
    from dfadc.verification.pixel_samples import Samples
    from dfadc.verification.samples import SampleSet

    Logits = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

#: Images in a batch of a session; fewer for segmentation.
BATCH_SIZE = 64

Images = npt.NDArray[np.float32]
#: Correctness on labelled images: a flag for each image, or for each of its labels, or counts of its pixels.
Correctness = npt.NDArray[np.bool_] | PixelCounts


@dataclass(frozen=True)
class VerificationInputs:
    """Images that every network of a verification runs on; the baseline holds samples of its own."""

    samples: Samples
    data: EvaluationData | MaskedImages | None = None
    baseline: Baseline | None = None

    def without_borders(self, width: int) -> VerificationInputs:
        """The same inputs, with mask pixels within ``width`` of a border between classes left out."""
        if self.data is None or not self.data.contract.is_dense:
            return self
        return replace(self, data=cast("MaskedImages", self.data).without_borders(width))


@dataclass(frozen=True)
class NetworkOutputs:
    """One network's results on :class:`VerificationInputs`.

    Args:
        outputs: logits (N, K) for the samples, or dense outputs.
        correct: (L,) or (L, K) correctness on the labelled images, or counts of their pixels; None without labels.
        baseline_classes: (B,) or (B, K) predictions for the baseline's samples, -1 if a logit is not finite; None
            without one.
        remark: why its runtime would compute otherwise by default; empty if it would not.
    """

    outputs: Outputs
    correct: Correctness | None
    baseline_classes: npt.NDArray[np.int32] | None
    remark: str = ""

    @property
    def accuracy(self) -> MeasuredAccuracy | None:
        """Accuracy with its interval; None without labels."""
        return None if self.correct is None else measured_accuracy(self.correct)


def read_inputs(
    contract: ImageContract, teacher_sha256: str | None, *, data: Path | None, baseline: Path | None
) -> tuple[EvaluationData | MaskedImages | None, Baseline | None]:
    """Reads labelled images and a baseline, and refuses what does not fit; the teacher's hash is None if unknown.

    Needs no samples: a long run reads them before it starts, so that it does not end with what does not fit.

    Raises:
        RequirementMissing: there is no such baseline.
        DfadcError: the data cannot be used, the baseline is another teacher's, or its labelled images are others.
        GateFailed: the baseline holds nothing to compare with.
    """
    loaded = None if baseline is None else Baseline.load(baseline)
    if loaded is not None:
        loaded.check_fits(contract, teacher_sha256)
    if data is None:
        return None, loaded
    labelled: EvaluationData | MaskedImages
    if contract.is_dense:  # both need Pillow
        from dfadc.evaluation.masks import load_masked_images  # noqa: PLC0415

        labelled = load_masked_images(data, contract)
    else:
        from dfadc.evaluation.labelled_images import load_evaluation_data  # noqa: PLC0415

        labelled = load_evaluation_data(data, contract)
    if loaded is not None and loaded.labelled is not None and loaded.labelled.sha256 != labelled.sha256:
        raise DfadcError(
            f"--data {data} holds other images or labels than the baseline {baseline} was made with: sha256 "
            f"{labelled.sha256[:12]}…, the baseline's {loaded.labelled.sha256[:12]}…",
            "pass the same labelled images, or make the baseline anew with these",
        )
    return labelled, loaded


def run_artifact(path: Path, inputs: VerificationInputs) -> NetworkOutputs:
    """Runs an artifact on all inputs, in a process of its own.

    Raises:
        RuntimeCrashed: its runtime ended that process.
        RequirementMissing, RuntimeRefused: it cannot run here.
        DfadcError: it is damaged, or does not take these samples.
    """
    form, samples = artifact_metadata(path), inputs.samples
    size = batch_size(samples.contract, BATCH_SIZE)
    with IsolatedSession(open_session, path, batch_size=size) as session:

        def logits(images: Images) -> Images:
            return artifact_logits(session.run, images, form=form, contract=samples.contract)

        outputs = samples.collect(map(logits, samples.batches(size)), str(path))
        correct, baseline_classes = _run_on_the_rest(logits, outputs, inputs)
        remark = session.remark
    outputs = restore_offset(outputs, samples.student_outputs, form=form)
    return NetworkOutputs(outputs, correct, baseline_classes, remark)


def run_student(run: RunFolder, inputs: VerificationInputs, *, factories: Collection[str] = ()) -> NetworkOutputs:
    """The fp32 student's outputs: those frozen with the samples, and new ones for labelled images and a baseline.

    Raises:
        DfadcError: the student has to run, and its file is damaged or names a factory that is none of ``factories``.
    """
    outputs = inputs.samples.student_outputs
    if inputs.data is None and inputs.baseline is None:
        return NetworkOutputs(outputs, None, None)
    return NetworkOutputs(outputs, *_run_on_the_rest(_student_on_cpu(run, factories), None, inputs))


def with_recomputed_student(run: RunFolder, samples: SampleSet, *, factories: Collection[str] = ()) -> SampleSet:
    """The run's samples, with the fp32 student's logits computed anew.

    Raises:
        DfadcError: its file is damaged or names a factory that is none of ``factories``.
    """
    logits = _student_on_cpu(run, factories)
    student_logits = samples.collect(map(logits, samples.batches(BATCH_SIZE)), str(run.student))
    return replace(samples, student_logits=student_logits)


def run_teacher(
    run: RunFolder, data: EvaluationData | MaskedImages, *, trust: bool, factories: Collection[str] = ()
) -> MeasuredAccuracy:
    """Accuracy of the teacher on labelled images.

    Raises:
        DfadcError: its file is gone or has changed, or needs code that is neither trusted nor one of ``factories``.
    """
    from dfadc.pipeline.distill import load_run_teacher  # noqa: PLC0415

    teacher = load_run_teacher(run, trust=trust, factories=factories)
    return measured_accuracy(_correctness(_on_cpu(teacher.module, teacher.contract), data))


def measured_accuracy(correct: Correctness) -> MeasuredAccuracy:
    """Accuracy with its interval."""
    if isinstance(correct, PixelCounts):
        return PixelScores.of(correct)
    return Accuracy.of(correct) if correct.ndim == 1 else LabelAccuracy.of(correct)


def classes_of(outputs: Outputs, samples: SampleSet) -> npt.NDArray[np.int32]:
    """(N,) or (N, K) predictions for a baseline, which no dense task has."""
    assert isinstance(outputs, np.ndarray), "there are no baselines of dense outputs"  # noqa: S101
    return samples.predict(outputs)


def _run_on_the_rest(
    logits: Logits, outputs: Outputs | None, inputs: VerificationInputs
) -> tuple[Correctness | None, npt.NDArray[np.int32] | None]:
    """Results on labelled images and the baseline's samples; ``outputs`` are those for the run's samples, if known."""
    correct = None if inputs.data is None else _correctness(logits, inputs.data)
    if inputs.baseline is None:
        return correct, None
    samples = inputs.baseline.samples
    if outputs is None or samples.sha256 != inputs.samples.sha256:
        outputs = samples.collect(map(logits, samples.batches(BATCH_SIZE)), "the network")
    return correct, classes_of(outputs, samples)


def _correctness(logits: Logits, data: EvaluationData | MaskedImages) -> Correctness:
    return data.judge(map(logits, data.batches(batch_size(data.contract, BATCH_SIZE))))


def _student_on_cpu(run: RunFolder, factories: Collection[str]) -> Logits:
    from dfadc.networks.network_file import load_network  # noqa: PLC0415

    student, metadata = load_network(run.student, factories=factories)
    return _on_cpu(student, metadata.contract)


def _on_cpu(network: nn.Module, contract: ImageContract) -> Logits:
    from dfadc.networks.logits import answering_pixels  # noqa: PLC0415
    from exporters.sessions.torch_session import TorchSession  # noqa: PLC0415

    module, size = answering_pixels(network, contract).eval(), batch_size(contract, BATCH_SIZE)
    return TorchSession(module, "cpu", batch_size=size).run
