"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

from dfadc.errors import StorageFailed
from dfadc.storage import (
    atomic_write,
    atomic_write_bytes,
    atomic_write_text,
    remove_leftovers,
    replace_together,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    from pathlib import Path

#: A process whose files may not grow past 4 KiB: a write beyond fails as it does on a full disk.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write_bytes

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    atomic_write_bytes(Path(sys.argv[1]), bytes(100_000))
except DfadcError as error:
    print(type(error).__name__, error.message, error.hint)
    sys.exit(error.exit_code)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("is_there_before", [False, True])
def test_a_file_is_written_or_replaced_and_nothing_else_left(is_there_before: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    if is_there_before:
        path.write_bytes(b"a much longer old content")
    atomic_write_bytes(path, b"new\x00")
    assert path.read_bytes() == b"new\x00"
    assert names(tmp_path) == {"file.bin"}


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a" / "b" / "c.txt", "Grüße\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "Grüße\n".encode()


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        # The suffix stays: some writers choose the format by it.
        assert temporary.suffix == ".txt"
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("whole")
        written = temporary.stat().st_ino
    assert path.read_text() == "whole"
    # Moved, not copied: a copy can be seen half done.
    assert path.stat().st_ino == written


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file_and_passes_on(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file.txt"}


def test_a_storage_error_while_writing_is_a_storage_failure(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageFailed, match=r"file.txt: No space left on device") as caught:
        write_half()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.exit_code == 7
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file.txt"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 -- our own interpreter
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("StorageFailed cannot write")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file.bin"}


def test_a_file_where_a_folder_should_be_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageFailed, match="cannot write"):
        atomic_write_text(tmp_path / "taken" / "file.txt", "x")


def test_a_folder_where_the_file_should_be_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageFailed, match="cannot write"):
        atomic_write_text(tmp_path / "taken", "x")
    assert names(tmp_path) == {"taken"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file(umask: int, mode: int, tmp_path: Path) -> None:
    """A run folder may be for a web server, another container, a colleague, or for nobody else."""
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode


def test_the_file_and_then_its_folder_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "file.txt").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write_text(tmp_path / "file.txt", "x")
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize("failing", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_pair_is_replaced_as_one(
    failing: int | None, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file and a folder: of four moves, any may fail."""
    for folder, text in ((tmp_path, "old"), (tmp_path / "drafts", "new")):
        (folder / "kit").mkdir(parents=True)
        (folder / "kit" / "file").write_text(text)
        (folder / "model.xml").write_text(text)
    (tmp_path / "aside").mkdir()
    places = [tmp_path / "model.xml", tmp_path / "kit"]
    calls = 0
    rename = type(tmp_path).rename

    def rename_until(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", rename_until)
    with nullcontext() if failing is None else pytest.raises(type(error)):
        replace_together({place: tmp_path / "drafts" / place.name for place in places}, tmp_path / "aside")
    expected = "new" if failing is None else "old"
    assert [path.read_text() for path in (tmp_path / "kit" / "file", tmp_path / "model.xml")] == [expected] * 2


def test_json_is_written_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, 2.5, None], "b": "é"})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None], "b": "é"}
    assert path.read_text().count("\n") > 2
    assert path.read_text().endswith("}\n")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    foreign = {"last.pt", ".gitignore", ".config.settings", ".last.pt", ".last.pt.short.pt", ".last.pt.k3_9zz0a.json"}
    for name in foreign:
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    temporaries = []
    for name in ("last.pt", "run.json", "student.fp16.engine"):
        with atomic_write(tmp_path / name) as temporary:
            temporaries.append(temporary)
    # As if the process had died inside the block.
    for temporary in temporaries:
        temporary.touch()
    in_a_folder = tmp_path / "deeper" / temporaries[0].name
    in_a_folder.touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == foreign | {"deeper", "run.json", "student.fp16.engine"}
    assert in_a_folder.exists()


def test_there_may_be_nothing_to_remove(tmp_path: Path) -> None:
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [float("-inf")]}])
def test_what_is_no_json_is_refused_before_anything_is_written(value: object, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, "old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, value)
    assert json.loads(path.read_text()) == "old"


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_hash_is_sha256_of_the_bytes(size: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
