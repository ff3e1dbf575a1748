"""Fixtures, all of them real: a teacher trained on digits in seconds, labelled images, and that teacher distilled."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from command_line import FEW_IMAGES, Outcome, run_command, settings
from filelock import FileLock
from processes import ForkedProcess
from sklearn.datasets import load_digits
from torch import nn
from torch._export.utils import _collect_all_valid_cia_ops
from torch.export import decomp_utils, exported_program
from torch.nn import functional
from torch.onnx._internal.exporter._registration import ONNXRegistry

import dfadc
from dfadc.contract import ImageContract
from dfadc.networks.names import build_architecture, resolve_architecture
from dfadc.networks.network_file import save_network
from dfadc.reporting import charts, html
from dfadc.teacher import match
from dfadc.training import stock
from exporters.sessions import isolated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dfadc.run_folder import RunFolder

#: Fixtures that only the tests of the exporters, of dense answers, of several labels, and of gates use.
pytest_plugins = ["small_student", "small_scenes", "small_labels", "judged_runs"]

#: More than twenty seconds of a core each.
LONG_FILES = (
    *("tests/test_docs.py", "tests/test_resume.py", "tests/test_ends.py"),
    *("teacher/test_onnx_teacher.py", "training/test_training.py", "examples/test_targets.py"),
    *("pipeline/test_pipeline.py", "pipeline/test_exports.py", "pipeline/test_multilabel_pipeline.py"),
    *("cli/test_streams.py", "cli/test_endings.py"),
)
DIGITS_CONTRACT = ImageContract(
    input_size=(1, 8, 8),
    num_classes=10,
    mean=(0.305,),
    std=(0.376,),
    class_names=tuple("0123456789"),
)
DIGITS_ARCHITECTURE = "compact_resnet_16"
#: What the teacher reaches on the held-out digits before any test may rely on it.
DIGITS_ACCURACY = 0.97
NUM_HELD_OUT = 397
QUICK_STUDENT = "compact_resnet_4"
QUICK_STEPS = 24
#: Recipe ``auto`` in seconds. Its student is no good, and the gates are set to what it reaches.
QUICK_RECIPE = {
    "steps": QUICK_STEPS,
    "batch_size": 32,
    "student.steps": 2,
    "student.ema_decay": 0.8,
    "student.optimizer.learning_rate": 0.1,
    "replay.repeats": 6,
    "generator.ema_decay": 0.8,
    "prior.balance": 20,
    "compute.precision": "fp32",
    "compute.compile": "off",
    "log.interval": 1,
    "verify.num_samples": 192,
    "verify.gate_source": "generator",
    "verify.min_agreement": 0.1,
}


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) uint8 and labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class TrainedTeacher(NamedTuple):
    """A dfadc teacher file and its accuracy on the held-out digits."""

    path: Path
    accuracy: float


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first: a process that takes one of them last keeps the others waiting."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG_FILES))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and need not be looked at by each collection: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _nowhere_special() -> Iterator[None]:
    """Commands are not to take the job that runs these tests for one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """A shell that runs the tests in the background, or with nohup, has them ignore two."""
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, ctrl_c)
    signal.signal(signal.SIGHUP, hang_up)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread here and in child processes: faster for small networks, and the same sums on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _sessions_are_forked() -> Iterator[None]:
    """An artifact's session is a process that imports NumPy and a runtime: there are hundreds, and NumPy is done."""
    path = os.environ.get("PYTHONPATH")

    def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        if os.environ.get("PYTHONPATH") != path:  # only an interpreter that begins looks at it
            return subprocess.Popen(command, **settings)  # noqa: S603 -- ours
        return ForkedProcess(command[2:], imports=("numpy",), **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
        yield


@pytest.fixture(scope="session", autouse=True)
def _operators_listed_once() -> Iterator[None]:
    """torch lists its operators, and torch.onnx its translations, anew for each export: half of a small one's time."""
    translations = functools.cache(ONNXRegistry.from_torchlib)
    operators = functools.cache(_collect_all_valid_cia_ops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(translations))
        for module in (exported_program, decomp_utils):
            patch.setattr(module, "_collect_all_valid_cia_ops", operators)
        yield


@pytest.fixture(scope="session", autouse=True)
def _curves_drawn_once() -> Iterator[None]:
    """Most runs that a test verifies are copies of a few, with the same curves; drawing them is half of a verify."""
    drawn: dict[str, str] = {}

    def panel_svg(panel: charts.Panel) -> str:
        return drawn.get(repr(panel)) or drawn.setdefault(repr(panel), charts.panel_svg(panel))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "panel_svg", panel_svg)
        yield


@pytest.fixture(scope="session", autouse=True)
def _references_built_once() -> Iterator[None]:
    """What weights are compared with, our networks and torchvision's, are the same in every test."""
    build, build_once = match.reference_network, functools.cache(match.reference_network)

    def reference_network(name: str, **settings: Any) -> nn.Module:
        is_factory = resolve_architecture(name).library == "factory"
        return (build if is_factory else build_once)(name, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(match, "reference_network", reference_network)
        yield


@pytest.fixture(scope="session", autouse=True)
def _students_fitted_on_few_images() -> Iterator[None]:
    """Nearly every student here begins as its teacher made smaller, fitted to it: ten seconds of a core each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW_IMAGES.items():
            patch.setattr(stock, name, value)
        yield


@pytest.fixture(scope="session")
def digits_contract() -> ImageContract:
    """The contract of the digits teacher: one channel, 8 x 8 pixels, ten classes."""
    return DIGITS_CONTRACT


@pytest.fixture(scope="session")
def digits_split() -> tuple[Digits, Digits]:
    """Scikit-learn's 1,797 real digits: training part and held-out part."""
    digits = load_digits()
    images = np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


@pytest.fixture(scope="session")
def digits_data(digits_split: tuple[Digits, Digits], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out digits as an .npz file, as ``--data`` takes it."""
    path = tmp_path_factory.mktemp("digits") / "held_out.npz"
    np.savez(path, images=digits_split[1].images, labels=digits_split[1].labels)
    return path


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this session see."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder with what ``make`` puts there, in whichever process of the session asks first; the others wait."""
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def trained_digits_teacher(digits_split: tuple[Digits, Digits], session_folder: Path) -> TrainedTeacher:
    """A batch-norm teacher, trained once a session with a fixed seed, as a dfadc teacher file."""
    train, held_out = digits_split

    def make(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_architecture(DIGITS_ARCHITECTURE, DIGITS_CONTRACT)
            _train(network.module, train, epochs=10)
        with torch.no_grad():
            predictions = network.module.eval()(_normalise(held_out.images)).argmax(1)
        accuracy = (predictions == torch.from_numpy(held_out.labels)).double().mean().item()
        assert accuracy >= DIGITS_ACCURACY, f"the digits teacher reached only {accuracy:.3f}"
        path = folder / "digits.safetensors"
        save_network(path, network.module, architecture=network.name, stem=network.stem, contract=DIGITS_CONTRACT)
        (folder / "accuracy.json").write_text(json.dumps(accuracy))

    folder = made_once(session_folder / "teacher", make)
    return TrainedTeacher(folder / "digits.safetensors", json.loads((folder / "accuracy.json").read_text()))


@pytest.fixture(scope="session")
def digits_teacher(trained_digits_teacher: TrainedTeacher) -> Path:
    """The digits teacher's file."""
    return trained_digits_teacher.path


@pytest.fixture(scope="session")
def finished_run(digits_teacher: Path, session_folder: Path) -> RunFolder:
    """The digits teacher distilled, exported and verified through the Python API. Tests that change it copy it."""

    def make(folder: Path) -> None:
        recipe = dfadc.load_recipe("auto", [f"{path}={value}" for path, value in QUICK_RECIPE.items()])
        run = dfadc.run_distillation(digits_teacher, QUICK_STUDENT, out=folder / "run", recipe=recipe)
        dfadc.export_student(run, ["onnx"])
        dfadc.verify_run(run)

    return dfadc.open_run(made_once(session_folder / "api", make) / "run")


@pytest.fixture(scope="session")
def command_run(digits_teacher: Path, digits_data: Path, session_folder: Path) -> tuple[RunFolder, Outcome]:
    """The same by one command, which was given labelled images besides; and what it printed."""

    def make(folder: Path) -> None:
        outcome = run_command(
            *("distill", digits_teacher, "--student", QUICK_STUDENT, *settings(QUICK_RECIPE)),
            *("--export", "onnx", "--out", folder / "run", "--data", digits_data, "--json"),
        )
        assert outcome.code == 0, outcome.err
        (folder / "printed.json").write_text(json.dumps(outcome))

    folder = made_once(session_folder / "command", make)
    return dfadc.open_run(folder / "run"), Outcome(*json.loads((folder / "printed.json").read_text()))


def _normalise(images: NDArray[np.uint8]) -> torch.Tensor:
    assert DIGITS_CONTRACT.mean is not None
    assert DIGITS_CONTRACT.std is not None
    return (torch.from_numpy(images).float() / 255 - DIGITS_CONTRACT.mean[0]) / DIGITS_CONTRACT.std[0]


def _train(network: nn.Module, train: Digits, *, epochs: int) -> None:
    images, labels = _normalise(train.images), torch.from_numpy(train.labels)
    batches = len(labels) // 64
    optimizer = torch.optim.SGD(network.train().parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(64)[:batches]:
            loss = functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
