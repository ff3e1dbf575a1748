"""The frozen sample set: what is saved is what was answered, and damage is noticed."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, StorageFailed
from dfadc.verification import archive
from dfadc.verification.samples import SCHEMA, SampleSet, sample_bytes
from dfadc.verification.stored_images import dequantise, quantise

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = ImageContract((3, 8, 6), 5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
UNKNOWN = ImageContract((1, 8, 8), 5)


def make_samples(contract: ImageContract = CONTRACT, n: int = 12) -> SampleSet:
    rng = np.random.default_rng(0)
    images = quantise(rng.normal(size=(n, *contract.input_size)).astype(np.float32), contract)
    return SampleSet(
        images=images,
        source=(np.arange(n) % 2).astype(np.int8),
        sources=("generator", "snapshots"),
        teacher_logits=rng.normal(size=(n, contract.num_classes)).astype(np.float32),
        student_logits=rng.normal(size=(n, contract.num_classes)).astype(np.float32),
        contract=contract,
        provenance={"seed": 7, "teacher_sha256": "ab" * 32},
    )


def rewrite(path: Path, **changes: npt.NDArray[Any] | None) -> None:
    """Saves the file again with some arrays changed or (None) removed."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays |= {name: value for name, value in changes.items() if value is not None}
    for name in [name for name, value in changes.items() if value is None]:
        del arrays[name]
    np.savez(path, **arrays)


@pytest.mark.parametrize("contract", [CONTRACT, UNKNOWN])
def test_a_saved_set_comes_back_whole(contract: ImageContract, tmp_path: Path) -> None:
    samples = make_samples(contract)
    samples.save(tmp_path / "samples.npz")
    loaded = SampleSet.load(tmp_path / "samples.npz")
    for name in ("images", "source", "teacher_logits", "student_logits"):
        expected, found = getattr(samples, name), getattr(loaded, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert loaded.sha256 == samples.sha256
    assert (loaded.contract, loaded.sources) == (samples.contract, samples.sources)
    assert loaded.provenance == samples.provenance
    assert loaded.counts() == {"generator": 6, "snapshots": 6}


def test_the_file_keeps_its_name_and_its_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_samples().save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    make_samples().save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # A real write error, without filling a disk.
    try:
        with pytest.raises(StorageFailed, match="cannot write"):
            make_samples(n=24).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_changed_images_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    samples = make_samples()
    samples.save(path)
    images = samples.images.copy()
    images[3, 0, 0, 0] ^= 1
    rewrite(path, images=images)
    with pytest.raises(DfadcError, match="was frozen with"):
        SampleSet.load(path)


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    samples = make_samples()
    samples.save(path)
    rewrite(path, source=1 - samples.source)
    with pytest.raises(DfadcError, match="was frozen with"):
        SampleSet.load(path)


def test_the_hash_is_of_the_questions_not_of_the_answers() -> None:
    samples = make_samples()
    assert replace(samples, student_logits=samples.student_logits + 1).sha256 == samples.sha256
    assert replace(samples, sources=("generator", "prior")).sha256 != samples.sha256


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="no sample file at"):
        SampleSet.load(tmp_path / "samples.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"not a zip at all"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(DfadcError, match="cannot be read as a sample file"):
        SampleSet.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    make_samples().save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DfadcError, match="cannot be read"):
        SampleSet.load(path)


@pytest.mark.parametrize("name", ["images", "metadata", "student_logits"])
def test_a_missing_array_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    make_samples().save(path)
    rewrite(path, **{name: None})
    with pytest.raises(DfadcError, match=f"not a dfadc sample file: .*{name}"):
        SampleSet.load(path)


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    make_samples().save(path)
    rewrite(path, source=np.array([object()], dtype=object))
    with pytest.raises(DfadcError, match="cannot be read as a sample file"):
        SampleSet.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"schema": "dfadc.samples/99"}, "schema 'dfadc.samples/99'"),
        ([1], "schema None"),
        ({"schema": SCHEMA}, "metadata is incomplete"),
    ],
)
def test_other_metadata_are_refused(metadata: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    make_samples().save(path)
    rewrite(path, metadata=np.array(json.dumps(metadata)))
    with pytest.raises(DfadcError, match=message):
        SampleSet.load(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.npz"
    make_samples().save(path)
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 100)
    with pytest.raises(DfadcError, match="more than 100"):
        SampleSet.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((12, 3, 8, 8), np.uint8)}, "images is"),
        ({"images": np.zeros((12, 3, 8, 6), np.float32)}, "images is"),
        ({"source": np.zeros(11, np.int8)}, "source is"),
        ({"teacher_logits": np.zeros((12, 4), np.float32)}, "teacher_logits is"),
        ({"source": np.full(12, 2, np.int8)}, "outside 0..1"),
        ({"sources": ("generator", "all")}, "source names"),
        ({"sources": ("generator", "generator")}, "source names"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DfadcError, match=message):
        replace(make_samples(), **changes)


def test_batches_are_the_normalised_images() -> None:
    samples = make_samples()
    batches = list(samples.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate(batches), samples.normalised())
    assert samples.normalised().dtype == np.float32


def test_an_empty_set_is_a_set(tmp_path: Path) -> None:
    make_samples(n=0).save(tmp_path / "samples.npz")
    assert len(SampleSet.load(tmp_path / "samples.npz")) == 0


shares = st.floats(0.01, 0.99)


@given(seed=st.integers(0, 2**32 - 1), mean=st.tuples(shares, shares), std=st.tuples(shares, shares))
def test_pixels_survive_normalisation_exactly(seed: int, mean: tuple[float, float], std: tuple[float, float]) -> None:
    contract = ImageContract((2, 4, 4), 2, mean=mean, std=std)
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 2, 4, 4), dtype=np.uint8)
    restored = quantise(dequantise(pixels, contract), contract)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, pixels)


@given(seed=st.integers(0, 2**32 - 1))
def test_quantisation_moves_a_real_image_by_at_most_half_a_step(seed: int) -> None:
    low, high = (np.array(bound).reshape(1, 3, 1, 1) for bound in CONTRACT.value_range())
    images = np.random.default_rng(seed).uniform(low, high, (2, *CONTRACT.input_size)).astype(np.float32)
    half_step = 0.5 / 255 / np.array(CONTRACT.std).reshape(1, 3, 1, 1) + 1e-5
    assert (np.abs(dequantise(quantise(images, CONTRACT), CONTRACT) - images) <= half_step).all()


def test_values_beyond_pixels_are_clipped() -> None:
    images = np.full((1, *CONTRACT.input_size), 1e6, np.float32)
    assert (quantise(images, CONTRACT) == 255).all()
    assert (quantise(-images, CONTRACT) == 0).all()


def test_without_mean_and_std_images_are_float16() -> None:
    images = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    stored = quantise(images, UNKNOWN)
    assert stored.dtype == np.float16
    np.testing.assert_allclose(dequantise(stored, UNKNOWN), images, rtol=1e-3, atol=1e-6)
    with pytest.raises(DfadcError, match="range of float16"):
        quantise(images * np.float32(1e6), UNKNOWN)


def test_broken_images_are_refused() -> None:
    with pytest.raises(DfadcError, match="the contract needs"):
        quantise(np.zeros((2, 1, 8, 6), np.float32), CONTRACT)
    with pytest.raises(DfadcError, match="NaN or infinity"):
        quantise(np.full((1, *CONTRACT.input_size), np.nan, np.float32), CONTRACT)


@pytest.mark.parametrize(
    "contract", [CONTRACT, UNKNOWN, ImageContract((3, 224, 224), 1000, mean=(0.5,) * 3, std=(0.5,) * 3)]
)
def test_the_bytes_of_a_sample_are_those_of_the_file(contract: ImageContract, tmp_path: Path) -> None:
    count = 40
    images = np.zeros((count, *contract.input_size), np.uint8 if contract.has_pixels else np.float16)
    logits = np.zeros((count, contract.num_classes), np.float32)
    SampleSet(images, np.zeros(count, np.int8), ("generator",), logits, logits, contract).save(tmp_path / "full.npz")
    size = (tmp_path / "full.npz").stat().st_size
    assert 0 <= size - count * sample_bytes(contract) < 4096
