"""What fp16 cannot hold is found, named and refused, although no runtime here overflows."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from command_line import files_of, run_command
from judged_runs import record_student
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.network_file import load_network, save_network
from dfadc.run_folder import RunFolder
from dfadc.verification.samples import SampleSet
from exporters.describe import describe_onnx
from exporters.manifest import Manifest, check_unchanged
from exporters.to_onnx.fp16 import FP16_MAX
from exporters.to_onnx.ranges import Headroom, measure_headroom

if TYPE_CHECKING:
    from pathlib import Path

#: In a compact_resnet: what makes the stem's output, and who reads it.
LOUD_NORM = "stem.1"
READERS = ("stages.0.conv1", "stages.0.shortcut.0")
LOUD_NODES = ("stem.0/Conv", "stem.2/Relu", *(f"{reader}/Conv" for reader in READERS))


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def headroom_of(run: RunFolder) -> Headroom:
    return measure_headroom(load_network(run.student)[0], SampleSet.load(run.samples).batches(64))


def make_loud(run: RunFolder, peak: float) -> float:
    """Scales the student's activations behind the stem to ``peak``; its answers stay the same.

    Returns:
        The headroom that is left.
    """
    student, metadata = load_network(run.student)
    images = torch.from_numpy(SampleSet.load(run.samples).normalised())
    with torch.no_grad():
        before = student(images)
        gain = peak / headroom_of(run).peaks["stem.0"]
        norm = student.get_submodule(LOUD_NORM)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.mul_(gain)
        norm.bias.mul_(gain)
        for reader in READERS:
            weight = student.get_submodule(reader).weight
            assert isinstance(weight, Tensor)
            weight.div_(gain)
        torch.testing.assert_close(student(images), before, rtol=1e-3, atol=1e-3)
    save_network(
        run.student, student, architecture=metadata.architecture, stem=metadata.stem, contract=metadata.contract
    )
    record_student(run)
    return headroom_of(run).factor


def notes_of(run: RunFolder, name: str) -> tuple[str, ...]:
    record = Manifest.read(run.path).find(f"artifacts/{name}")
    assert record is not None
    return record.notes


def test_every_layer_is_measured_as_it_is_exported() -> None:
    """A convolution counts with the batch norm that is folded into it; what passes between them is in no artifact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1))
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.tensor([500.0, 0.0, 0.0])
    norm.running_var = torch.full((3,), 1e-8)
    network.eval().requires_grad_(False)
    images = torch.rand(70, 2, 6, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    normed = network[1](network[0](images))
    rectified = normed.relu()
    found = measure_headroom(network, [images.numpy()])
    expected = {
        "0": float(max(images.abs().max(), normed.abs().max())),
        "2": float(rectified.max()),  # it works in place: what went in is counted where it came from
        "3": float(max(rectified.max(), network[3](rectified).abs().max())),
    }
    assert found.peaks == pytest.approx(expected, rel=1e-5)
    assert float(normed.abs().max()) > 2 * float(rectified.max())  # or the test would not tell the two apart
    assert (found.worst_layer, found.num_images) == ("0", 70)
    assert found.factor == pytest.approx(FP16_MAX / expected["0"], rel=1e-5)


def test_a_convolution_without_a_batch_norm_counts_itself() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)).eval()
    with torch.no_grad():
        for layer, weight in ((network[0], -300.0), (network[3], 7000.0)):
            assert isinstance(layer, nn.Conv2d)
            layer.weight.fill_(weight)
            assert layer.bias is not None
            layer.bias.zero_()
    images = np.array([2.0, -1.0], np.float32).reshape(2, 1, 1, 1)
    found = measure_headroom(network, [images])
    assert found.peaks == pytest.approx({"0": 600, "1": 600, "2": 300, "3": 2.1e6}, rel=1e-3)
    assert str(found).startswith("warning: fp16 headroom 0.0312x: activations reach 2,09")


def test_hooks_leave_the_student_as_it_was(student: nn.Module, images: np.ndarray) -> None:
    before = copy.deepcopy(student.state_dict())
    found = measure_headroom(student, [images])
    peaks = dict(found.peaks)
    with torch.no_grad():
        student(torch.from_numpy(1e6 * images))
    assert found.peaks == peaks  # nobody listens any more
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert "features.0.0" in found.peaks
    assert not found.is_small


def test_not_a_number_has_no_headroom() -> None:
    images = np.zeros((2, 1, 4, 4), np.float32)
    images[1, 0, 0, 0] = np.nan
    found = measure_headroom(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), [images])
    assert found.factor == 0
    assert found.is_small
    with pytest.raises(DfadcError, match="no samples to measure"):
        measure_headroom(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), [])


def test_the_headroom_is_told_once_and_recorded_with_every_fp16_artifact(run_copy: RunFolder) -> None:
    pytest.importorskip("openvino", reason="pip install openvino")
    expected = str(headroom_of(run_copy))
    outcome = run_command("export", run_copy.path, "-e", "onnx:fp16", "-e", "openvino:fp16", "-e", "openvino")
    assert outcome.code == 0, outcome.err
    assert [line.strip() for line in outcome.err.splitlines() if "fp16 headroom" in line] == [expected]
    assert "warning" not in outcome.err
    for name in ("student.fp16.onnx", "student.fp16.openvino.xml"):
        assert expected in notes_of(run_copy, name)
    assert not any("headroom" in note for note in notes_of(run_copy, "student.openvino.xml"))
    again = run_command("export", run_copy.path, "-e", "onnx:fp16", "--json", "--quiet")
    assert json.loads(again.out)["student.fp16.onnx"]["notes"] == [expected]


def test_a_small_headroom_is_a_warning(run_copy: RunFolder) -> None:
    """And the samples go into the graph as it takes them: normalised twice they would overflow."""
    run_copy.calibration.unlink()
    factor = make_loud(run_copy, peak=FP16_MAX / 1.4)
    assert factor == pytest.approx(1.4, rel=1e-3)
    for flags in (("--embed-normalisation",), ()):  # the second takes the fp32 ONNX as it is: with pixels
        outcome = run_command("export", run_copy.path, "-e", "onnx:fp16", *flags)
        assert outcome.code == 0, outcome.err
        warnings = [line for line in outcome.err.splitlines() if "warning" in line]
        assert len(warnings) == 1
        assert "fp16 headroom 1.4x: activations reach 46,789 (stem.0) on 192 verification samples" in warnings[0]
    assert describe_onnx(run_copy.artifacts / "student.fp16.onnx")["metadata"]["dfadc.input"].startswith("pixels")


def test_what_overflows_on_the_calibration_images_stays_in_fp32(run_copy: RunFolder) -> None:
    assert make_loud(run_copy, peak=2 * FP16_MAX) < 1
    outcome = run_command("export", run_copy.path, "-e", "onnx:fp16")
    assert outcome.code == 0, outcome.err
    assert "right only where those layers are computed in fp32" in outcome.err
    (kept,) = [note for note in notes_of(run_copy, "student.fp16.onnx") if note.startswith("kept in fp32: ")]
    assert set(LOUD_NODES) <= set(kept.removeprefix("kept in fp32: ").split(", "))


def test_an_overflow_that_calibration_did_not_show_is_refused_and_named(run_copy: RunFolder) -> None:
    """The samples select nothing, they judge: what they find is for the user to decide."""
    assert run_command("export", run_copy.path, "-e", "onnx:fp16", "--quiet").code == 0
    make_loud(run_copy, peak=2 * FP16_MAX)
    run_copy.calibration.unlink()
    before = files_of(run_copy.artifacts)["student.fp16.onnx"]
    outcome = run_command("export", run_copy.path, "-e", "onnx:fp16")
    assert outcome.code == 5
    assert "fp16 overflows in" in outcome.errors[0]
    for node in LOUD_NODES:
        assert node in outcome.errors[0]
        assert f"--keep-fp32 {node}" in outcome.hints[0]
    assert files_of(run_copy.artifacts)["student.fp16.onnx"] == before
    check_unchanged(run_copy.path)
    flags = outcome.hints[0].partition("fp32: ")[2].split()
    heeded = run_command("export", run_copy.path, "-e", "onnx:fp16", *flags, "--json", "--quiet")
    assert heeded.code == 0, heeded.err
    assert json.loads(heeded.out)["student.fp16.onnx"]["precision"] == f"fp16, {len(flags) // 2} nodes in fp32"
