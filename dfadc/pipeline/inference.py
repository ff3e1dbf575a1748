"""Putting questions to networks: to an artifact through its runtime, to teacher and fp32 student through torch.

Imports torch only where teacher or student must answer themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError
from dfadc.verification.agreement import predict
from dfadc.verification.answers import ask, level
from dfadc.verification.baseline import Baseline
from dfadc.verification.pixel_samples import batch_size
from dfadc.verification.pixel_scores import PixelCounts
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
    from dfadc.verification.pixel_agreement import DenseAnswers
    from dfadc.verification.pixel_samples import Samples
    from dfadc.verification.samples import SampleSet

    Answer = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

#: Images that a session is given at once; fewer where every pixel is answered.
BATCH_SIZE = 64

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
#: How a network did on each labelled image: whether it is right, or which pixels it got right.
Rights = Flags | PixelCounts


@dataclass(frozen=True)
class Questions:
    """What every network of a verification is asked.

    Args:
        samples: the run's.
        data: labelled images, where the user gave some.
        baseline: its samples, where there is one.
    """

    samples: Samples
    data: EvaluationData | MaskedImages | None = None
    baseline: Baseline | None = None

    @property
    def baseline_is_of_these_samples(self) -> bool:
        """Whether an answer to the samples is one to the baseline's."""
        return self.baseline is not None and self.baseline.samples.sha256 == self.samples.sha256

    def without_borders(self, width: int) -> Questions:
        """The same; of masks, pixels within ``width`` of a border between classes do not count."""
        if self.data is None or self.data.contract.task == "classification":
            return self
        return replace(self, data=cast("MaskedImages", self.data).without_borders(width))


@dataclass(frozen=True)
class Answers:
    """What one network answered.

    Args:
        given: its logits (N, K) to the samples, or its dense answers.
        correct: (L,) whether it gave each labelled image its label, or the counts of its pixels; None without labels.
        on_baseline: (B,) its classes for the baseline's samples, -1 where a logit is not finite; None without one.
        remark: why its runtime would answer otherwise by default; empty where it would not.
    """

    given: Logits | DenseAnswers
    correct: Rights | None
    on_baseline: npt.NDArray[np.int32] | None
    remark: str = ""


def read_questions(
    samples: Samples, *, data: Path | None, baseline: Path | None, teacher_sha256: str | None
) -> Questions:
    """Reads what is asked besides the samples, and refuses what does not go with them.

    Args:
        samples: the run's.
        data: labelled images.
        baseline: a baseline's file.
        teacher_sha256: of the teacher's file; None where it is not known.

    Raises:
        RequirementMissing: there is no such baseline.
        DfadcError: the data cannot be used, the baseline is another teacher's, or its labelled images are others.
        GateFailed: there is nothing in the baseline to compare with.
    """
    return Questions(samples, *read_inputs(samples.contract, teacher_sha256, data=data, baseline=baseline))


def read_inputs(
    contract: ImageContract, teacher_sha256: str | None, *, data: Path | None, baseline: Path | None
) -> tuple[EvaluationData | MaskedImages | None, Baseline | None]:
    """What :func:`read_questions` reads, also before there are samples: a long run must not end with what cannot be."""
    known = None if baseline is None else Baseline.load(baseline)
    if known is not None:
        known.check_fits(contract, teacher_sha256)
    if data is None:
        return None, known
    labelled = _read_data(data, contract)
    if known is not None and known.labelled is not None and known.labelled.sha256 != labelled.sha256:
        raise DfadcError(
            f"--data {data} holds other images or labels than the baseline {baseline} was made with: sha256 "
            f"{labelled.sha256[:12]}…, the baseline's {known.labelled.sha256[:12]}…",
            "pass the same labelled images, or make the baseline anew with these",
        )
    return labelled, known


def _read_data(path: Path, contract: ImageContract) -> EvaluationData | MaskedImages:
    # Pillow, only with --data.
    if contract.task == "segmentation":
        from dfadc.evaluation.masks import load_masked_images  # noqa: PLC0415

        return load_masked_images(path, contract)
    from dfadc.evaluation.labelled_images import load_evaluation_data  # noqa: PLC0415

    return load_evaluation_data(path, contract)


def ask_artifact(path: Path, questions: Questions) -> Answers:
    """Runs an artifact on everything that is asked, in a process of its own.

    Raises:
        RuntimeCrashed: its runtime ended that process.
        RequirementMissing, RuntimeRefused: it cannot run here.
        DfadcError: it is damaged, or does not take these samples.
    """
    form, samples = artifact_metadata(path), questions.samples
    size = batch_size(samples.contract, BATCH_SIZE)
    with IsolatedSession(open_session, path, batch_size=size) as session:

        def answer(images: Images) -> Logits:
            return ask(session.run, images, form=form, contract=samples.contract)

        given = samples.collect(map(answer, samples.batches(size)), str(path))
        correct, on_baseline = _further_answers(answer, given, questions)
        remark = session.remark
    return Answers(level(given, samples.student_answers, form=form), correct, on_baseline, remark)


def ask_student(run: RunFolder, questions: Questions, *, factories: Collection[str] = ()) -> Answers:
    """The fp32 student's answers: those frozen with the samples, and today's to labelled images and a baseline's.

    Raises:
        DfadcError: it has to answer, and its file is damaged or names a factory that is none of ``factories``.
    """
    given = questions.samples.student_answers
    if questions.data is None and questions.baseline is None:
        return Answers(given, None, None)
    return Answers(given, *_further_answers(_student_on_cpu(run, factories), None, questions))


def with_answers_of_today(run: RunFolder, samples: SampleSet, *, factories: Collection[str] = ()) -> SampleSet:
    """The run's samples, with the fp32 student's answers of today instead of the frozen ones.

    Raises:
        DfadcError: its file is damaged or names a factory that is none of ``factories``.
    """
    answer = _student_on_cpu(run, factories)
    logits = samples.collect(map(answer, samples.batches(BATCH_SIZE)), str(run.student))
    return replace(samples, student_logits=logits)


def _student_on_cpu(run: RunFolder, factories: Collection[str]) -> Answer:
    from dfadc.networks.network_file import load_network  # noqa: PLC0415

    student, metadata = load_network(run.student, factories=factories)
    return _on_cpu(student, metadata.contract)


def ask_teacher(
    run: RunFolder, data: EvaluationData | MaskedImages, *, trust: bool, factories: Collection[str] = ()
) -> Rights:
    """(L,) whether the teacher gives each labelled image its label, or the counts of its pixels.

    Raises:
        DfadcError: its file is gone or has changed, or needs code that is neither trusted nor one of ``factories``.
    """
    from dfadc.pipeline.distill import load_run_teacher  # noqa: PLC0415

    teacher = load_run_teacher(run, trust=trust, factories=factories)
    return _correct(_on_cpu(teacher.module, teacher.contract), data)


def _further_answers(
    answer: Answer, given: Logits | DenseAnswers | None, questions: Questions
) -> tuple[Rights | None, npt.NDArray[np.int32] | None]:
    """Labelled images and the baseline's samples; ``given`` is what was just answered to the run's own, if anything."""
    correct = None if questions.data is None else _correct(answer, questions.data)
    if questions.baseline is None:
        return correct, None
    if given is not None and questions.baseline_is_of_these_samples:
        return correct, predicted(given)
    samples = questions.baseline.samples
    return correct, predict(samples.collect(map(answer, samples.batches(BATCH_SIZE)), "the network"))


def predicted(given: Logits | DenseAnswers) -> npt.NDArray[np.int32]:
    """Classes of the samples, for a baseline, which holds one of each image."""
    assert isinstance(given, np.ndarray), "there are no baselines of dense answers"  # noqa: S101
    return predict(given)


def _correct(answer: Answer, data: EvaluationData | MaskedImages) -> Rights:
    return data.judge(map(answer, data.batches(batch_size(data.contract, BATCH_SIZE))))


def _on_cpu(network: nn.Module, contract: ImageContract) -> Answer:
    from dfadc.networks.logits import answering_pixels  # noqa: PLC0415
    from exporters.sessions.torch_session import TorchSession  # noqa: PLC0415

    module, size = answering_pixels(network, contract).eval(), batch_size(contract, BATCH_SIZE)
    return TorchSession(module, "cpu", batch_size=size).run
