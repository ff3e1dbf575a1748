"""Sessions in a process of their own: the same answers and errors, and a crash there ends nothing here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfadc.errors import DfadcError, ExportFailed, RequirementMissing, RuntimeCrashed
from exporters.exporter import PoolUnusable
from exporters.sessions import isolated
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.open import open_session
from exporters.sessions.session import BatchedSession


class Double(BatchedSession):
    """Answers each image's sum and its double, and does on demand what native code can do."""

    def __init__(self, path: Path, *, batch_size: int = 4, does: str = "") -> None:
        super().__init__(batch_size=batch_size)
        self.device = f"torch loaded: {'torch' in sys.modules}"
        self._does = does
        if does == "kill":
            os.write(2, b"something to hold on to\nstack smashed\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if does == "exit":
            os._exit(7)
        if does == "needs":
            raise RequirementMissing(f"no GPU for {path.name}", "buy one")
        if does == "pool":
            raise PoolUnusable("a child class that dfadc.errors does not have")

    def _run_batch(self, images: np.ndarray) -> np.ndarray:
        if self._does == "abort":
            os.abort()
        if self._does == "bug":
            raise KeyError("a mistake of ours")
        os.write(1, b"a runtime that prints\n")
        sums = images.reshape(len(images), -1).sum(1)
        return np.stack([sums, 2 * sums], 1)


@pytest.fixture(autouse=True)
def _new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user's process: here the start itself is tested."""
    monkeypatch.setattr(isolated, "subprocess", subprocess)


def session(**settings: Any) -> IsolatedSession:
    return IsolatedSession(Double, Path("some.onnx"), **settings)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 3, 4, 4)).astype(np.float32)


def test_it_answers_what_the_session_answers(noise: np.ndarray) -> None:
    with session(batch_size=3) as there:
        assert there.batch_size == 3
        assert there.device == "torch loaded: False"
        for images in (noise, noise[:1], noise.transpose(0, 1, 3, 2)):
            np.testing.assert_array_equal(there.run(images), Double(Path()).run(images))
        assert there.benchmark(noise, seconds=0.01).batch == 10


def test_an_onnx_file_there_and_here(student_onnx: Path, images: np.ndarray) -> None:
    with IsolatedSession(open_session, student_onnx, threads=1, batch_size=7) as there:
        answers = there.run(images)
    with open_session(student_onnx, threads=1, batch_size=7) as here:
        np.testing.assert_array_equal(answers, here.run(images))


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("kill", "the runtime crashed (signal 11) while opening some.onnx: stack smashed"),
        ("exit", "the runtime crashed (exit code 0x7) while opening some.onnx"),
    ],
)
def test_a_death_while_opening_is_an_error(does: str, message: str) -> None:
    with pytest.raises(RuntimeCrashed) as caught:
        session(does=does)
    assert (caught.value.message, caught.value.exit_code) == (message, 3)


def test_a_death_while_running_is_an_error(noise: np.ndarray) -> None:
    with session(does="abort") as there:
        with pytest.raises(RuntimeCrashed, match=r"crashed \(signal 6\) while running some.onnx"):
            there.run(noise)
        with pytest.raises(RuntimeCrashed, match=r"crashed \(signal 6\) while timing some.onnx"):
            there.benchmark(noise, seconds=0.01)


def test_errors_arrive_as_what_they_are(noise: np.ndarray) -> None:
    with pytest.raises(RequirementMissing) as caught:
        session(does="needs")
    assert (caught.value.message, caught.value.hint) == ("no GPU for some.onnx", "buy one")
    with pytest.raises(DfadcError, match="a child class") as other:
        session(does="pool")
    assert type(other.value) is ExportFailed
    wrongs: list[Any] = [noise[:0], noise.astype(np.float64), noise[0]]
    for wrong in wrongs:
        with session() as there, pytest.raises(DfadcError, match="images"):
            there.run(wrong)


def test_a_mistake_of_ours_is_no_crash_of_the_runtime(noise: np.ndarray) -> None:
    with session(does="bug") as there, pytest.raises(RuntimeError, match="KeyError: 'a mistake of ours'"):
        there.run(noise)
