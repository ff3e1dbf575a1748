"""fp16 overflow is found, named and refused, although no runtime here overflows."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from command_line import files_of, run_command
from judged_runs import record_student
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.network_file import load_network, save_network
from dfadc.run_folder import RunFolder
from dfadc.verification.samples import SampleSet
from exporters.manifest import Manifest, check_unchanged
from exporters.to_onnx.describe import describe_onnx
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.ranges import FP16_MAX, ActivationRanges, measure_activations

if TYPE_CHECKING:
    import onnx

#: In a compact_resnet: what makes the stem's output, and who reads it.
LOUD_NORM = "stem.1"
READERS = ("stages.0.conv1", "stages.0.shortcut.0")
LOUD_NODES = ("stem.0/Conv", "stem.2/Relu", *(f"{reader}/Conv" for reader in READERS))


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def ranges_of(run: RunFolder) -> ActivationRanges:
    """Of the student as it is now, of which the artifacts may not be."""
    with tempfile.TemporaryDirectory() as folder:
        student, metadata = load_network(run.student)
        path = export_onnx(student, Path(folder) / "student.onnx", contract=metadata.contract, metadata={}).path
        return measure_activations(load_onnx(path), SampleSet.load(run.samples).batches(64))


def make_loud(run: RunFolder, peak: float) -> float:
    """Scales the student's activations behind the stem to ``peak``; its answers stay the same.

    Returns:
        The headroom that is left.
    """
    student, metadata = load_network(run.student)
    images = torch.from_numpy(SampleSet.load(run.samples).normalised())
    with torch.no_grad():
        before = student(images)
        gain = peak / ranges_of(run).peaks["stem.0/Conv"]
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
    return ranges_of(run).headroom


def notes_of(run: RunFolder, name: str) -> tuple[str, ...]:
    record = Manifest.read(run.path).find(f"artifacts/{name}")
    assert record is not None
    return record.notes


def export(network: nn.Module, contract: ImageContract, folder: Path) -> onnx.ModelProto:
    path = export_onnx(network.eval(), folder / "student.onnx", contract=contract, metadata={}).path
    return load_onnx(path)


def test_a_folded_batch_norm_is_part_of_its_convolution(tmp_path: Path) -> None:
    """The output of the convolution alone, 500 times as large, is in no artifact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 4))
        network.append(nn.Flatten())
        assert isinstance(network[0].bias, Tensor)
        nn.init.constant_(network[0].bias, 500.0)
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.full((3,), 500.0)
    norm.running_var = torch.full((3,), 1e-4)
    network.eval().requires_grad_(requires_grad=False)
    images = torch.rand(70, 2, 6, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    normed = norm(network[0](images))
    found = measure_activations(export(network, ImageContract((2, 6, 6), 4), tmp_path), [images.numpy()])
    expected = float(normed.abs().max())
    assert float(network[0](images).abs().max()) > 2 * expected  # or the test would not tell the two apart
    assert found.peaks["0/Conv"] == pytest.approx(expected, rel=1e-3)
    assert (found.worst_node, found.num_images) == ("0/Conv", 70)
    assert found.headroom == pytest.approx(FP16_MAX / expected, rel=1e-3)


def test_not_a_number_has_no_headroom(tmp_path: Path) -> None:
    model = export(nn.Sequential(nn.Conv2d(1, 2, 4), nn.Flatten()), ImageContract((1, 4, 4), 2), tmp_path)
    images = np.zeros((2, 1, 4, 4), np.float32)
    assert not measure_activations(model, [images]).is_headroom_small
    images[1, 0, 0, 0] = np.nan
    found = measure_activations(model, [images])
    assert found.headroom == 0
    assert found.is_headroom_small
    with pytest.raises(DfadcError, match="no images to measure"):
        measure_activations(model, [])


def test_the_headroom_is_told_once_and_recorded_with_every_fp16_artifact(run_copy: RunFolder) -> None:
    pytest.importorskip("openvino", reason="pip install openvino")
    expected = str(ranges_of(run_copy))
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
        assert (
            "fp16 headroom 1.4x: activations reach 46,789 (network.stem.0/Conv) on 192 verification samples"
            in warnings[0]
        )
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
