"""Checkpoints: whole or absent, readable without running code, and there when the disk is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_python
from miniature import build_run
from states import assert_same_state

from dfadc.distillation.checkpoint import LAST, PREVIOUS, load_checkpoint, save_checkpoint
from dfadc.distillation.loop import distill
from dfadc.errors import DfadcError, StorageFailed

#: A process whose files may not grow past 64 KiB: a write beyond fails as it does on a full disk.
FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import torch
from dfadc.distillation.checkpoint import save_checkpoint
from dfadc.errors import DfadcError

folder = Path(sys.argv[1])
save_checkpoint(folder, {"step": 1})
save_checkpoint(folder, {"step": 2})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save_checkpoint(folder, {"step": 3, "weights": torch.zeros(1_000_000)})
except DfadcError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]))
    sys.exit(error.exit_code)
"""


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50, 50), float(step)), "name": "x", "parts": [None, 1.5, (True,)]}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(3))
    assert_same_state(load_checkpoint(tmp_path), state(3))


def test_the_state_of_a_real_game_needs_no_code_to_load(tmp_path: Path) -> None:
    run = build_run("auto")
    distill(run, 1, lambda _: None)
    save_checkpoint(tmp_path, run.state.state_dict())
    # weights_only: anything but tensors and plain values would be refused.
    loaded = torch.load(tmp_path / LAST, weights_only=True)
    assert_same_state(loaded, run.state.state_dict())


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step))
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    assert load_checkpoint(tmp_path)["step"] == 3
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_last_checkpoint_gives_way_to_the_one_before(share: float, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    whole = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(whole[: int(len(whole) * share)])
    assert load_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize(
    "damage", [b"", b"not a checkpoint", b"PK\x03\x04 cut", b"\x80\x02}q\x00.", b"\x80\x02K\x05h\x07.", bytes(3000)]
)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(damage: bytes, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    (tmp_path / LAST).write_bytes(damage)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_damaged_byte_never_passes_for_a_state(tmp_path: Path) -> None:
    """torch alone would take a changed weight, or raise anything at all, for most of these."""
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    whole = (tmp_path / LAST).read_bytes()
    steps = []
    for position in range(5, len(whole), 97):
        (tmp_path / LAST).write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        loaded = load_checkpoint(tmp_path)
        assert_same_state(loaded, state(loaded["step"]))
        steps.append(loaded["step"])
    # Some bytes mean nothing: padding, names' padding and time stamps.
    assert steps.count(1) > 0.8 * len(steps)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": Payload()}, tmp_path / LAST)
    with pytest.raises(DfadcError, match=r"cannot resume"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "reason"), [((), "no checkpoint yet"), ((LAST, PREVIOUS), r"last\.pt: .*; previous\.pt: ")]
)
def test_no_readable_checkpoint_is_an_error_that_says_why(files: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(DfadcError, match=reason) as caught:
        load_checkpoint(tmp_path)
    assert "--force" in caught.value.hint


def test_a_full_disk_is_said_and_costs_nothing(tmp_path: Path) -> None:
    done = run_python(FULL_DISK, tmp_path)
    assert done.code == StorageFailed.exit_code == 7, done.err
    assert "StorageFailed" in done.out
    assert "last.pt" in done.out
    assert "disk is full" in done.out
    assert "--resume" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    assert load_checkpoint(tmp_path) == {"step": 2}


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(StorageFailed, match="cannot write"):
        save_checkpoint(tmp_path / "checkpoints", state(1))
