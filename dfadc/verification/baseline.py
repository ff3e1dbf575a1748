"""A baseline: a run's samples with the predictions of its networks, for a paired comparison with later ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError, GateFailed, RequirementMissing
from dfadc.verification.agreement import of_samples
from dfadc.verification.archive import read_archive, write_archive
from dfadc.verification.samples import ARRAYS, SampleSet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dfadc.contract import ImageContract

SCHEMA = "dfadc.baseline/1"
_ARRAYS = (*ARRAYS, "predictions", "correct")
_REMAKE = "make a baseline anew: dfadc baseline RUN -o FILE"


@dataclass(frozen=True, slots=True)
class LabelledResults:
    """Labelled images by hash, and network -> (L,) True where its prediction is the label, or every label."""

    sha256: str
    correct: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of labelled images."""
        return next((len(flags) for flags in self.correct.values()), 0)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Predictions of a run's networks, which later ones are tested against.

    Args:
        run: name of the run.
        teacher_sha256: of the teacher's file.
        samples: the run's samples, with the teacher's logits.
        predictions: network -> (N,) its top-1 classes, or (N, K) labels; the fp32 student and every artifact that ran.
        labelled: the same networks on labelled images, or None.

    Raises:
        GateFailed: there is no sample, or logits of a network or the teacher are not finite: nothing to compare with.
        DfadcError: the parts contradict each other.
    """

    run: str
    teacher_sha256: str
    samples: SampleSet
    predictions: Mapping[str, npt.NDArray[np.int32]]
    labelled: LabelledResults | None = None

    def __post_init__(self) -> None:
        n = len(self.samples)
        if n == 0:
            raise GateFailed(f"the run {self.run} has no samples, so there is nothing to compare with")
        expected = self.samples.teacher_classes
        highest = 1 if expected.ndim == 2 else self.samples.contract.num_classes - 1
        for name, classes in {"the teacher": expected, **self.predictions}.items():
            if classes.shape != expected.shape or classes.max() > highest or classes.dtype != np.int32:
                raise DfadcError(
                    f"baseline: {name} has {classes.shape} {classes.dtype} predictions for {n} samples", _REMAKE
                )
            if classes.min() < 0:
                count = int(of_samples(classes < 0).sum())
                raise GateFailed(f"{name} has NaN or infinite logits for {count} of {n} samples")
        if self.labelled is not None:
            shapes = {(flags.ndim, len(flags), flags.dtype) for flags in self.labelled.correct.values()}
            usable = shapes == {(1, self.labelled.n, np.dtype(np.bool_))} and self.labelled.n > 0
            if not usable or self.labelled.correct.keys() != self.predictions.keys():
                raise DfadcError("baseline: the labelled results do not fit the networks", _REMAKE)

    def save(self, path: Path) -> None:
        """Writes the baseline, whole or not at all; the same baseline gives the same bytes.

        Raises:
            StorageFailed: the file cannot be written.
        """
        labelled = self.labelled or LabelledResults("", {name: np.empty(0, np.bool_) for name in self.predictions})
        metadata = {
            "schema": SCHEMA,
            "run": self.run,
            "teacher_sha256": self.teacher_sha256,
            "networks": list(self.predictions),
            "data_sha256": None if self.labelled is None else self.labelled.sha256,
            "samples": self.samples.metadata(),
        }
        arrays: dict[str, npt.NDArray[Any]] = {
            **self.samples.arrays(),
            "predictions": np.stack(list(self.predictions.values())),
            "correct": np.stack([labelled.correct[name] for name in self.predictions]),
        }
        write_archive(path, metadata, arrays)

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Reads a baseline and checks its images against their hash.

        Raises:
            RequirementMissing: there is no such file.
            DfadcError: it is damaged, of another schema, or its images are not the hashed ones.
            GateFailed: it holds nothing to compare with.
        """
        if not path.exists():
            raise RequirementMissing(f"there is no baseline {path}", "make one: dfadc baseline RUN -o FILE")
        metadata, arrays = read_archive(path, _ARRAYS, schema=SCHEMA, kind="baseline")
        try:
            networks = list(map(str, metadata["networks"]))
            correct = dict(zip(networks, arrays["correct"], strict=True))
            data_sha256 = metadata["data_sha256"]
            return cls(
                run=str(metadata["run"]),
                teacher_sha256=str(metadata["teacher_sha256"]),
                samples=SampleSet.from_parts(metadata["samples"], arrays, path),
                predictions=dict(zip(networks, arrays["predictions"], strict=True)),
                labelled=None if data_sha256 is None else LabelledResults(str(data_sha256), correct),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise DfadcError(f"{path}: the baseline contradicts itself: {exc}", _REMAKE) from exc

    def check_fits(self, contract: ImageContract, teacher_sha256: str | None) -> None:
        """Refuses networks, by contract and teacher (None if unknown), that cannot be compared with these.

        Raises:
            DfadcError: another teacher, number of classes or image contract.
        """
        own, other = self.samples.contract.to_dict(), contract.to_dict()
        if differing := [name for name, value in own.items() if other[name] != value]:
            name = differing[0]
            raise DfadcError(
                f"the baseline of {self.run} has another image contract: {name} {own[name]}, here {other[name]}",
                _REMAKE,
            )
        if teacher_sha256 is not None and teacher_sha256 != self.teacher_sha256:
            raise DfadcError(
                f"the baseline of {self.run} has another teacher: sha256 {self.teacher_sha256[:12]}…, "
                f"here {teacher_sha256[:12]}…",
                _REMAKE,
            )
