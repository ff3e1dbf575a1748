"""Arrays of an .npz: the named ones alone are unpacked, and none that lies about its size."""

from __future__ import annotations

import io
import re
import resource
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dfadc.array_file import read_arrays
from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.evaluation.labelled_images import load_evaluation_data

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GREY = ImageContract((1, 8, 8), 3, mean=(0.25,), std=(0.5,))
SMALL = np.arange(6, dtype=np.int64)


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def write_zeros(path: Path, name: str, num_bytes: int) -> None:
    """Appends an array of zeros, deflated, without ever holding it."""
    block = bytes(2**24)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(header((num_bytes,)))
        for _ in range(num_bytes // len(block)):
            stream.write(block)


def test_named_arrays_are_read_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, one=SMALL, two=SMALL * 2.5, three=np.asfortranarray(SMALL.reshape(2, 3)), word="x")
    read = read_arrays(path, ("one", "three"), optional=("word", "absent"))
    assert list(read) == ["one", "three", "word"]
    np.testing.assert_array_equal(read["one"], SMALL)
    np.testing.assert_array_equal(read["three"], SMALL.reshape(2, 3))
    assert str(read["word"]) == "x"
    with pytest.raises(KeyError, match=r"no `four` \(found: one, two, three, word\)"):
        read_arrays(path, ("four",))
    with pytest.raises(ValueError, match="unpacks to 96 bytes, more than 95"):
        read_arrays(path, ("one", "two"), limit_bytes=95)


def test_an_unused_array_of_gigabytes_costs_no_memory(tmp_path: Path) -> None:
    """A process reads 4 labelled images beside an array larger than all that it may hold."""
    limit = 2**30 + 2**29  # Address space: the interpreter and numpy take a part of it.
    path = tmp_path / "test.npz"
    np.savez(path, images=np.full((4, 8, 8), 9, np.uint8), labels=[0, 1, 2, 0])
    write_zeros(path, "unused", limit)
    program = f"""
import sys
from pathlib import Path
import numpy, dfadc.evaluation.labelled_images as data, dfadc.contract as contract
read = data.load_evaluation_data(Path({str(path)!r}), contract.ImageContract((1, 8, 8), 3, mean=(0.25,), std=(0.5,)))
assert len(read) == 4 and (read.images == 9).all()
"""
    done = subprocess.run(  # noqa: S603 -- our own interpreter
        [sys.executable, "-c", program],
        env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def bomb(path: Path) -> None:
    write_zeros(path, "images", 2**30 + 2**24)


def false_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header((10**15,)) + bytes(64))


def negative_shape(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header((-1, -64)) + bytes(64))


def no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"text")


def objects(path: Path) -> None:
    np.savez(path, images=np.array([object()]))


def damaged(path: Path) -> None:
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes(64) + whole[564:])


def encrypted(path: Path) -> None:
    np.savez(path, images=SMALL)
    whole = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(magic) + flags] |= 1
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (bomb, "a decompression bomb"),
        (false_header, "has another length"),
        (negative_shape, "has another length"),
        (no_array, "magic string"),
        (objects, "Python objects"),
        (damaged, "CRC|invalid|incorrect"),
        (encrypted, "encrypted"),
    ],
)
def test_what_is_no_plain_array_is_a_clear_error(write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path)
    with pytest.raises(ValueError, match=message):
        read_arrays(path, ("images",))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels.npy", header((4,)) + bytes(4))
    with pytest.raises(DfadcError, match=f"cannot be read: .*({message})") as caught:
        load_evaluation_data(path, GREY)
    assert re.search("an .npz holds", caught.value.hint)
