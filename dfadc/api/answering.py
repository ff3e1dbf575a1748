"""Putting questions to networks: to an artifact through its runtime, to teacher and fp32 student through torch.

Imports torch only where teacher or student must answer themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError
from dfadc.verification.agreement import predict
from dfadc.verification.answers import ask, level
from dfadc.verification.baseline import Baseline
from exporters.describe import artifact_metadata
from exporters.engine_sessions import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import nn

    from dfadc.contract import ImageContract
    from dfadc.run import RunFolder
    from dfadc.verification.data import EvaluationData
    from dfadc.verification.samples import SampleSet

    Answer = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

#: Images that a session is given at once.
BATCH_SIZE = 64

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Questions:
    """What every network of a verification is asked.

    Args:
        samples: the run's.
        data: labelled images, where the user gave some.
        baseline: its samples, where there is one.
    """

    samples: SampleSet
    data: EvaluationData | None = None
    baseline: Baseline | None = None

    @property
    def baseline_is_of_these_samples(self) -> bool:
        """Whether an answer to the samples is one to the baseline's."""
        return self.baseline is not None and self.baseline.samples.sha256 == self.samples.sha256


@dataclass(frozen=True)
class Answers:
    """What one network answered.

    Args:
        logits: (N, K) to the samples.
        correct: (L,) whether it gave each labelled image its label; None without labels.
        on_baseline: (B,) its classes for the baseline's samples, -1 where a logit is not finite; None without one.
    """

    logits: Logits
    correct: Flags | None
    on_baseline: npt.NDArray[np.int32] | None


def read_questions(
    samples: SampleSet, *, data: Path | None, baseline: Path | None, teacher_sha256: str | None
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
) -> tuple[EvaluationData | None, Baseline | None]:
    """What :func:`read_questions` reads, also before there are samples: a long run must not end with what cannot be."""
    known = None if baseline is None else Baseline.load(baseline)
    if known is not None:
        known.check_fits(contract, teacher_sha256)
    if data is None:
        return None, known
    from dfadc.verification.data import load_evaluation_data  # noqa: PLC0415 - pillow, only with --data

    labelled = load_evaluation_data(data, contract)
    if known is not None and known.labelled is not None and known.labelled.sha256 != labelled.sha256:
        raise DfadcError(
            f"--data {data} holds other images or labels than the baseline {baseline} was made with: sha256 "
            f"{labelled.sha256[:12]}…, the baseline's {known.labelled.sha256[:12]}…",
            "pass the same labelled images, or make the baseline anew with these",
        )
    return labelled, known


def ask_artifact(path: Path, questions: Questions) -> Answers:
    """Runs an artifact on everything that is asked.

    Raises:
        RequirementMissing: it cannot run here.
        DfadcError: it is damaged, or does not take these samples.
    """
    form, samples = artifact_metadata(path), questions.samples
    with open_session(path, batch_size=BATCH_SIZE) as session:

        def answer(images: Images) -> Logits:
            return ask(session.run, images, form=form, contract=samples.contract)

        logits = _answer_all(answer, samples.batches(BATCH_SIZE), samples.contract)
        if logits.shape != samples.teacher_logits.shape:
            raise DfadcError(
                f"{path} answers {logits.shape[1:]}, the samples have {samples.contract.num_classes} classes",
                "verify it with the samples of its own run",
            )
        correct, on_baseline = _further_answers(answer, logits, questions)
    return Answers(level(logits, samples.student_logits, form=form), correct, on_baseline)


def ask_student(run: RunFolder, questions: Questions) -> Answers:
    """The fp32 student's answers: those frozen with the samples, and its own to whatever else is asked.

    Raises:
        DfadcError: it has to answer, and its file is damaged.
    """
    logits = questions.samples.student_logits
    if questions.data is None and (questions.baseline is None or questions.baseline_is_of_these_samples):
        return Answers(logits, None, predict(logits) if questions.baseline is not None else None)
    from dfadc.models.network_file import load_network  # noqa: PLC0415

    student, _ = load_network(run.student, architecture=run.record()["student"]["architecture"])
    return Answers(logits, *_further_answers(_on_cpu(student), logits, questions))


def ask_teacher(run: RunFolder, data: EvaluationData, *, trust: bool) -> Flags:
    """(L,) whether the teacher gives each labelled image its label.

    Raises:
        DfadcError: its file is gone or has changed, or holds code that is not trusted.
    """
    from dfadc.api.distil import load_run_teacher  # noqa: PLC0415

    return _correct(_on_cpu(load_run_teacher(run, trust=trust).module), data)


def _further_answers(
    answer: Answer, logits: Logits, questions: Questions
) -> tuple[Flags | None, npt.NDArray[np.int32] | None]:
    """Labelled images and the baseline's samples; ``logits`` are the answers to the run's own."""
    correct = None if questions.data is None else _correct(answer, questions.data)
    if questions.baseline is None:
        return correct, None
    if questions.baseline_is_of_these_samples:
        return correct, predict(logits)
    samples = questions.baseline.samples
    return correct, predict(_answer_all(answer, samples.batches(BATCH_SIZE), samples.contract))


def _correct(answer: Answer, data: EvaluationData) -> Flags:
    classes = np.concatenate([predict(answer(batch)) for batch in data.batches(BATCH_SIZE)])
    return np.asarray(classes == data.labels)


def _answer_all(
    answer: Answer,
    batches: Iterable[Images],
    contract: ImageContract,
) -> Logits:
    """(N, K) logits of all batches; (0, K) where there are none."""
    answers = [answer(batch) for batch in batches]
    return np.concatenate(answers) if answers else np.empty((0, contract.num_classes), np.float32)


def _on_cpu(network: nn.Module) -> Answer:
    from exporters.sessions import TorchSession  # noqa: PLC0415

    return TorchSession(network.eval(), "cpu", batch_size=BATCH_SIZE).run
