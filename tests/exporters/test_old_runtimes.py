"""The files of a device kit on old releases of ONNX Runtime, each really installed in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from command_line import run_command
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from exporters.exporter import BuildSettings, ExportRequest
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_onnx.fp32 import export_onnx

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.contract import ImageContract
    from dfadc.run_folder import RunFolder

pytestmark = pytest.mark.slow

#: The first release that reads the files, the next, one of those that crashed, and the newest; numpy 2 came after 1.18.
RELEASES = ("onnxruntime==1.17.*", "onnxruntime==1.18.*", "onnxruntime==1.23.*", "onnxruntime")
TOO_OLD = "onnxruntime==1.16.*"
EXPORTS = ("onnx", "onnx:fp16", "onnx:int8", "onnx:int8:ort-cpu")
RUN = """\
import sys
from pathlib import Path
import numpy as np
from exporters.kit.device_sessions import open_on_device
with open_on_device(Path(sys.argv[1]), "onnxruntime", threads=1) as session:
    np.save(sys.argv[3], session.run(np.load(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def kit(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kit") / "run"
    shutil.copytree(finished_run.path, run)
    wanted = [part for export in (*EXPORTS, "kit") for part in ("-e", export)]
    outcome = run_command("export", run, *wanted)
    assert outcome.code == 0, outcome.err
    return run / "artifacts" / "kit"


class OneToken(nn.Module):
    """As in LeViT: linear layers with batch norms on flattened tokens, and attention over a single token."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 16, 16)
        self.linear, self.norm = nn.Linear(24, 72, bias=False), nn.BatchNorm1d(72)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        products = self.linear(tokens)
        products = self.norm(products.flatten(0, 1)).reshape_as(products).mean(1, keepdim=True)
        query, key, value = products.reshape(-1, 1, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        logits: Tensor = self.head((weights @ value).flatten(1))
        return logits


@pytest.fixture(scope="module")
def transformers(contract: ImageContract, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same exports of torchvision's transformer (attention, layer norms, shared constants) and of OneToken."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision, one_token = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval(), OneToken().eval()
        nn.init.normal_(vision.heads.head.weight)
        nn.init.normal_(one_token.head.weight)
    made = []
    for network in (vision, one_token):
        folder = tmp_path_factory.mktemp(type(network).__name__)
        paths = [folder / ExportRequest.parse(export).file_name for export in EXPORTS]
        export_onnx(network, paths[0], contract=contract, metadata={})
        for export, path in zip(EXPORTS[1:], paths[1:], strict=True):
            settings = BuildSettings(calibration=images, calibrator="minmax")
            DerivedOnnxExporter().export(paths[0], path, ExportRequest.parse(export), settings)
        made += paths
    return made


def installed(requirement: str, folder: Path) -> dict[str, str]:
    """The environment in which Python finds this release first."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), requirement]
    numpy = "numpy" if requirement == "onnxruntime" else "numpy<2"
    done = subprocess.run([*pip, numpy], capture_output=True, text=True, check=False)  # noqa: S603 -- pip
    if done.returncode:
        pytest.skip(f"pip cannot install {requirement}: {done.stderr[-300:]}")
    return {**os.environ, "PYTHONPATH": str(folder)}


def python(*arguments: object, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.mark.parametrize("requirement", RELEASES)
def test_a_release_runs_the_files_of_the_kit(
    requirement: str, kit: Path, transformers: list[Path], images: np.ndarray, tmp_path: Path
) -> None:
    environment = installed(requirement, tmp_path / "release")
    said = python("-c", "import onnxruntime; print(onnxruntime.__version__)", folder=kit, environment=environment)
    assert requirement.partition("==")[2].rstrip("*") in said.stdout
    done = python("check.py", "--json", folder=kit, environment=environment)
    artifacts = json.loads(done.stdout)["artifacts"]
    assert set(artifacts) == {"student.onnx", "student.fp16.onnx", "student.int8.onnx"}, done.stderr
    for name, artifact in artifacts.items():
        assert "A" in artifact["comparisons"], (name, artifact["reasons"])
        assert artifact["comparisons"]["A"]["all"]["agreement"] >= 0.9, name
    np.save(tmp_path / "images.npy", images)
    for path in transformers:
        arguments = ("-c", RUN, path, tmp_path / "images.npy", tmp_path / "logits.npy")
        done = python(*arguments, folder=kit, environment=environment)
        assert done.returncode == 0, (path, done.stderr)
        with OnnxRuntimeSession(path, threads=1) as session:
            here = session.run(images)
        assert (np.load(tmp_path / "logits.npy").argmax(1) == here.argmax(1)).mean() >= 0.95, path


def test_an_older_one_is_told_what_it_lacks(kit: Path, tmp_path: Path) -> None:
    environment = installed(TOO_OLD, tmp_path / "release")
    done = python("check.py", "student.onnx", "--runtime", "onnxruntime", folder=kit, environment=environment)
    assert done.returncode == 4, done.stderr
    assert "student.onnx needs ONNX Runtime 1.17 or newer, and 1.16" in done.stdout
