"""The frozen sample set: generated images with the teacher's and the student's logits, in one checked .npz file.

The images are quantised *before* the networks run on them, so the logits belong to exactly what is stored.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.verification.agreement import ALL_SOURCES, predict
from dfadc.verification.archive import REMAKE_HINT, read_archive, write_archive
from dfadc.verification.pixel_outputs import check_output_shape, choose_positions, class_dtype
from dfadc.verification.stored_images import StoredImages, dequantise, stored_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

SCHEMA = "dfadc.samples/1"

ARRAYS = ("images", "source", "teacher_logits", "student_logits")
#: Provenance keys of the files of the networks whose logits are frozen. Sets of earlier versions lack them.
TEACHER_SHA256, STUDENT_SHA256 = "teacher_sha256", "student_sha256"

#: Shape and dtype of an array.
Layout = tuple[tuple[int, ...], type[np.generic]]


class FrozenImages:
    """Images, the source of each, and the file: shared by the sample sets of both tasks.

    The fields are those of :class:`SampleSet`.
    """

    __slots__ = ()

    #: Names of the arrays of a file.
    array_names: ClassVar[tuple[str, ...]]
    images: StoredImages
    source: npt.NDArray[np.int8]
    sources: tuple[str, ...]
    contract: ImageContract
    provenance: Mapping[str, str | int | float]

    def __len__(self) -> int:
        return len(self.images)

    def check(self, layouts: Mapping[str, Layout]) -> None:
        """Checks sources and arrays; name of an array of logits or classes -> shape and dtype that it must have.

        Raises:
            DfadcError: shapes, dtypes or indices contradict each other or the contract.
        """
        n = len(self.images)
        expected: dict[str, Layout] = {
            "images": ((n, *self.contract.input_size), stored_type(self.contract)),
            "source": ((n,), np.int8),
            **layouts,
        }
        arrays = self.arrays()
        for name, (shape, dtype) in expected.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != dtype:
                raise DfadcError(f"samples: {name} is {array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}")
        if ALL_SOURCES in self.sources or len(set(self.sources)) != len(self.sources):
            raise DfadcError(f"samples: source names must differ and not be {ALL_SOURCES!r}, got {self.sources}")
        if n and (self.source.min() < 0 or self.source.max() >= len(self.sources)):
            raise DfadcError(f"samples: a source index lies outside 0..{len(self.sources) - 1}")

    @property
    def sha256(self) -> str:
        """Hex SHA-256 over the images and their sources; equal for two sets whose results can be paired."""
        digest = hashlib.sha256()
        layout = [list(self.images.shape), str(self.images.dtype), list(self.sources)]
        digest.update(json.dumps(layout).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.source).data)
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Number of samples of each source."""
        return {name: int((self.source == index).sum()) for index, name in enumerate(self.sources)}

    def of_source(self, source: str) -> npt.NDArray[np.bool_]:
        """(N,) mask of a source's samples; all False if the set does not have the source."""
        if source not in self.sources:
            return np.zeros(len(self), np.bool_)
        return np.asarray(self.source == self.sources.index(source))

    def normalised(self) -> npt.NDArray[np.float32]:
        """All images in the networks' input form: (N, C, H, W) float32."""
        return dequantise(self.images, self.contract)

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.float32]]:
        """:meth:`normalised` in order, at most ``batch_size`` images at a time."""
        for start in range(0, len(self), batch_size):
            yield dequantise(self.images[start : start + batch_size], self.contract)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a file, by name."""
        return {name: getattr(self, name) for name in self.array_names}

    def metadata(self) -> dict[str, Any]:
        """The metadata of a file, as plain JSON values."""
        return {
            "contract": self.contract.to_dict(),
            "sources": list(self.sources),
            "provenance": dict(self.provenance),
            "sha256": self.sha256,
        }

    def save(self, path: Path) -> None:
        """Writes the set, whole or not at all; the same set gives the same bytes.

        Raises:
            StorageFailed: the file cannot be written.
        """
        write_archive(path, {"schema": SCHEMA, **self.metadata()}, self.arrays())

    @classmethod
    def array_fields(cls, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a set from the arrays of a file."""
        return {name: arrays[name] for name in cls.array_names}

    @classmethod
    def from_parts(cls, metadata: Mapping[str, Any], arrays: Mapping[str, Any], path: Path) -> Self:
        """Builds a set from the contents of ``path`` and checks its images against their hash.

        Raises:
            DfadcError: something is missing or contradicts the rest, or the images are not the hashed ones.
        """
        fields: dict[str, Any] = cls.array_fields(arrays)
        try:
            fields["sources"] = tuple(map(str, metadata["sources"]))
            fields["contract"] = ImageContract.from_dict(metadata["contract"])
            fields["provenance"] = metadata["provenance"]
            samples, expected = cls(**fields), metadata["sha256"]
        except (KeyError, TypeError) as exc:
            raise DfadcError(f"{path}: the samples' metadata is incomplete: {exc}", REMAKE_HINT) from exc
        if samples.sha256 != expected:
            raise DfadcError(
                f"{path}: images have sha256 {samples.sha256[:12]}…, the file was frozen with {str(expected)[:12]}…",
                REMAKE_HINT,
            )
        return samples

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a set and checks its images against its hash.

        Raises:
            DfadcError: the file is missing, damaged, of another schema, or its images are not the hashed ones.
        """
        if not path.exists():
            raise DfadcError(f"no sample file at {path}", "a finished run holds it as samples.npz")
        metadata, arrays = read_archive(path, cls.array_names, schema=SCHEMA, kind="sample file")
        return cls.from_parts(metadata, arrays, path)

    def recorded(self, key: str) -> str | None:
        """Hash of a network's file from the provenance; None if an earlier version did not record it."""
        value = self.provenance.get(key)
        return None if value is None else str(value)

    def check_complete(self, num_outputs: int, network: str) -> None:
        """Refuses outputs for fewer or more samples than the set has.

        Raises:
            DfadcError: the numbers differ.
        """
        if num_outputs != len(self):
            raise DfadcError(
                f"{network} gave outputs for {num_outputs} of {len(self)} samples",
                "verify it with the samples of its own run",
            )


@dataclass(frozen=True, slots=True)
class SampleSet(FrozenImages):
    """Generated images that no network was trained on, with the logits of teacher and fp32 student.

    Args:
        images: (N, C, H, W) uint8 pixels, or normalised float16 if the contract has no mean and std.
        source: (N,) int8 index into ``sources``.
        sources: names of the sources, e.g. ``("generator", "snapshots")``.
        teacher_logits: (N, K) float32, for :meth:`normalised`.
        student_logits: (N, K) float32, the fp32 student's.
        contract: of the images and logits.
        provenance: plain values on how the set was made (seeds, teacher sha256, ...).

    Raises:
        DfadcError: shapes, dtypes or indices contradict each other or the contract.
    """

    images: StoredImages
    source: npt.NDArray[np.int8]
    sources: tuple[str, ...]
    teacher_logits: npt.NDArray[np.float32]
    student_logits: npt.NDArray[np.float32]
    contract: ImageContract
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)

    array_names: ClassVar = ARRAYS

    def __post_init__(self) -> None:
        shape = (len(self.images), self.contract.num_classes)
        self.check({"teacher_logits": (shape, np.float32), "student_logits": (shape, np.float32)})

    @property
    def teacher_outputs(self) -> npt.NDArray[np.float32]:
        """The teacher's logits."""
        return self.teacher_logits

    @property
    def student_outputs(self) -> npt.NDArray[np.float32]:
        """The fp32 student's logits."""
        return self.student_logits

    @property
    def teacher_classes(self) -> npt.NDArray[np.int32]:
        """The teacher's classes (N,) or labels (N, K), as :meth:`predict` gives them."""
        return self.predict(self.teacher_logits)

    def predict(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Classes (N,) or, with several labels an image, labels (N, K) of logits; -1 if a logit is not finite."""
        return predict(logits, self.contract.task)

    def collect(self, batches: Iterable[npt.NDArray[np.float32]], network: str) -> npt.NDArray[np.float32]:
        """(N, K) logits of a network, from its logits for each of :meth:`batches`.

        Raises:
            DfadcError: the logits do not fit these samples.
        """
        parts = [np.empty((0, self.contract.num_classes), np.float32)]
        for logits in batches:
            check_output_shape(logits.shape, self.contract, network)
            parts.append(logits)
        whole = np.concatenate(parts)
        self.check_complete(len(whole), network)
        return whole


def sample_bytes(contract: ImageContract) -> int:
    """Bytes of one sample in a file: image, source and the outputs of two networks.

    An output is a row of float32 logits; for segmentation, class and margin of every pixel and the logits of a few.
    """
    values = int(np.prod(contract.input_size))
    output_bytes = 4 * contract.num_classes
    if contract.is_dense:
        _, height, width = contract.input_size
        pixel_bytes = np.dtype(class_dtype(contract.num_classes)).itemsize + 2
        output_bytes = height * width * pixel_bytes + len(choose_positions(height, width)) * output_bytes
    return values * np.dtype(stored_type(contract)).itemsize + 1 + 2 * output_bytes
