"""The frozen sample set: generated images and the answers of teacher and student, in one checked .npz file.

The images are quantised *before* the teacher is asked, so what is stored is exactly what was answered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from dfadc.array_file import read_arrays
from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write
from dfadc.verification.agreement import ALL_SOURCES
from dfadc.verification.pixel_agreement import choose_positions, class_dtype
from dfadc.verification.stored_images import StoredImages, dequantise, stored_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

SCHEMA = "dfadc.samples/1"
#: A sample file that unpacks to more than this is not read.
MAX_UNPACKED_BYTES = 2 * 2**30

SourceName = Literal["generator", "snapshots", "prior", "adversary"]
ARRAYS = ("images", "source", "teacher_logits", "student_logits")
#: In the provenance: the files of the networks whose answers are frozen. Sets of earlier versions lack them.
TEACHER_SHA256, STUDENT_SHA256 = "teacher_sha256", "student_sha256"


class FrozenImages:
    """What sample sets share whatever is answered to them: the images, where each came from, and the file.

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

    def check(self, answers: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]) -> None:
        """Checks arrays and sources.

        Args:
            answers: shape and dtype that the arrays of answers must have, by name.

        Raises:
            DfadcError: shapes, dtypes or indices contradict each other or the contract.
        """
        n = len(self.images)
        expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "images": ((n, *self.contract.input_size), stored_type(self.contract)),
            "source": ((n,), np.int8),
            **answers,
        }
        arrays = self.arrays()
        for name, (shape, dtype) in expected.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != dtype:
                wanted = f"{shape} {np.dtype(dtype)}"
                raise DfadcError(f"samples: {name} is {array.shape} {array.dtype}, expected {wanted}")
        if ALL_SOURCES in self.sources or len(set(self.sources)) != len(self.sources):
            raise DfadcError(f"samples: source names must differ and not be {ALL_SOURCES!r}, got {self.sources}")
        if n and (self.source.min() < 0 or self.source.max() >= len(self.sources)):
            raise DfadcError(f"samples: a source index lies outside 0..{len(self.sources) - 1}")

    @property
    def sha256(self) -> str:
        """Hex SHA-256 over the images and their sources: what makes two sample sets the same questions."""
        digest = hashlib.sha256()
        layout = [list(self.images.shape), str(self.images.dtype), list(self.sources)]
        digest.update(json.dumps(layout).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.source).data)
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Number of samples of each source."""
        return {name: int((self.source == index).sum()) for index, name in enumerate(self.sources)}

    def normalised(self) -> npt.NDArray[np.float32]:
        """All images as the networks take them: (N, C, H, W) float32."""
        return dequantise(self.images, self.contract)

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.float32]]:
        """:meth:`normalised` in order, at most ``batch_size`` images at a time."""
        for start in range(0, len(self), batch_size):
            yield dequantise(self.images[start : start + batch_size], self.contract)

    def save(self, path: Path) -> None:
        """Writes the set, whole or not at all; the same set gives the same bytes.

        Raises:
            StorageFailed: the file cannot be written.
        """
        write_archive(path, {"schema": SCHEMA, **self.metadata()}, self.arrays())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a file, by name."""
        return {name: getattr(self, name) for name in self.array_names}

    def metadata(self) -> dict[str, Any]:
        """What a file holds besides, as plain JSON values."""
        return {
            "contract": self.contract.to_dict(),
            "sources": list(self.sources),
            "provenance": dict(self.provenance),
            "sha256": self.sha256,
        }

    def recorded(self, key: str) -> str | None:
        """The hash of one of the networks that answered; None where an earlier version did not record it."""
        value = self.provenance.get(key)
        return None if value is None else str(value)

    def check_unchanged(self, expected: object, path: Path) -> None:
        """Compares the images with the hash that they were frozen with.

        Raises:
            DfadcError: they are others.
        """
        if self.sha256 != expected:
            raise DfadcError(
                f"{path}: images have sha256 {self.sha256[:12]}…, the file was frozen with {str(expected)[:12]}…",
                _REMAKE,
            )


@dataclass(frozen=True, slots=True)
class SampleSet(FrozenImages):
    """Images that nobody trained on, where each came from, and what teacher and student answer.

    Args:
        images: (N, C, H, W) uint8 pixels, or normalised float16 where the contract has no mean and std.
        source: (N,) int8 index into ``sources``.
        sources: names of the sources, e.g. ``("generator", "snapshots")``.
        teacher_logits: (N, K) float32, the teacher's answers to :meth:`normalised`.
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
        logits = (len(self.images), self.contract.num_classes)
        self.check({"teacher_logits": (logits, np.float32), "student_logits": (logits, np.float32)})

    @property
    def teacher_answers(self) -> npt.NDArray[np.float32]:
        """The teacher's logits."""
        return self.teacher_logits

    @property
    def student_answers(self) -> npt.NDArray[np.float32]:
        """The fp32 student's logits."""
        return self.student_logits

    def collect(self, batches: Iterable[npt.NDArray[np.float32]], who: str) -> npt.NDArray[np.float32]:
        """(N, K), what ``who`` answered to one batch after the other.

        Raises:
            DfadcError: that is no answer to these samples.
        """
        logits = np.concatenate([np.empty((0, self.contract.num_classes), np.float32), *_checked(batches, self, who)])
        if len(logits) != len(self):
            raise DfadcError(f"{who} answers {len(logits)} of {len(self)} samples", _OWN_SAMPLES)
        return logits

    @classmethod
    def load(cls, path: Path) -> SampleSet:
        """Reads a set and checks its images against its hash.

        Raises:
            DfadcError: the file is missing, damaged, of another schema, or its images are not the hashed ones.
        """
        if not path.exists():
            raise DfadcError(f"no sample file at {path}", "a finished run holds it as samples.npz")
        metadata, arrays = read_archive(path, ARRAYS, schema=SCHEMA, what="sample file")
        return cls.from_parts(metadata, arrays, path)

    @classmethod
    def from_parts(cls, metadata: Mapping[str, Any], arrays: Mapping[str, Any], path: Path) -> SampleSet:
        """A set from what was read of ``path``, its images checked against its hash.

        Raises:
            DfadcError: something is missing or contradicts the rest, or the images are not the hashed ones.
        """
        try:
            samples = cls(
                **{name: arrays[name] for name in ARRAYS},
                sources=tuple(map(str, metadata["sources"])),
                contract=ImageContract.from_dict(metadata["contract"]),
                provenance=metadata["provenance"],
            )
            expected = metadata["sha256"]
        except (KeyError, TypeError) as exc:
            raise DfadcError(f"{path}: the samples' metadata is incomplete: {exc}", _REMAKE) from exc
        samples.check_unchanged(expected, path)
        return samples


def _checked(
    batches: Iterable[npt.NDArray[np.float32]], samples: FrozenImages, who: str
) -> Iterator[npt.NDArray[np.float32]]:
    for logits in batches:
        check_answers(logits.shape, samples.contract, who)
        yield logits


def check_answers(shape: tuple[int, ...], contract: ImageContract, who: str) -> None:
    """Refuses logits (n, K), or (n, K, H, W) of another shape than the contract's.

    Raises:
        DfadcError: ``who`` answers something else.
    """
    expected = (contract.num_classes, *(contract.input_size[1:] if contract.task == "segmentation" else ()))
    if shape[1:] != expected:
        asked = f"have {contract.num_classes} classes" if len(expected) == 1 else f"want {expected}"
        raise DfadcError(f"{who} answers {shape[1:]}, the samples {asked}", _OWN_SAMPLES)


_OWN_SAMPLES = "verify it with the samples of its own run"
_REMAKE = "the file was changed or damaged: take it from the run again, or make the run's samples anew"


def sample_bytes(contract: ImageContract) -> int:
    """Bytes of one sample in a file: image, source and the answers of two networks.

    An answer is a row of float32 logits; a dense one is of every pixel its class and margin, and logits of a few.
    """
    values = int(np.prod(contract.input_size))
    answer_bytes = 4 * contract.num_classes
    if contract.task == "segmentation":
        _, height, width = contract.input_size
        pixel_bytes = np.dtype(class_dtype(contract.num_classes)).itemsize + 2
        answer_bytes = height * width * pixel_bytes + len(choose_positions(height, width)) * answer_bytes
    return values * np.dtype(stored_type(contract)).itemsize + 1 + 2 * answer_bytes


def write_archive(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes arrays and plain JSON values as one .npz, whole or not at all; the same values give the same bytes.

    Raises:
        StorageFailed: the file cannot be written.
    """
    text = np.array(json.dumps(metadata, sort_keys=True))
    # Uncompressed: generated images are noise to a compressor. An open file keeps numpy from adding a suffix.
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, metadata=text, **arrays)


def read_archive(
    path: Path, names: Sequence[str], *, schema: str, what: str
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Metadata and named arrays of an .npz of :func:`write_archive`, before anything in them is believed.

    Args:
        path: the file.
        names: of the arrays.
        schema: what its metadata must say.
        what: what it should be, for messages.

    Raises:
        DfadcError: it cannot be read, is something else or of another schema.
    """
    try:
        metadata = json.loads(str(read_arrays(path, ("metadata",), limit_bytes=MAX_UNPACKED_BYTES)["metadata"]))
        found = metadata.get("schema") if isinstance(metadata, dict) else None
        if found != schema:
            raise DfadcError(
                f"{path}: schema {found!r}, this version reads {schema!r} in a {what}",
                f"name a {what}, and use the version that wrote it",
            )
        return metadata, read_arrays(path, names, limit_bytes=MAX_UNPACKED_BYTES)
    except KeyError as exc:
        raise DfadcError(f"{path} is not a dfadc {what}: {exc.args[0]}", f"name a {what} that dfadc wrote") from exc
    except (OSError, ValueError) as exc:
        raise DfadcError(f"{path} cannot be read as a {what}: {exc}", _REMAKE) from exc
