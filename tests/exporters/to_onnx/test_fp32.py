from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, ExportFailed, StorageFailed
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.describe import describe_onnx
from exporters.to_onnx.fp32 import export_onnx

if TYPE_CHECKING:
    from exporters.exporter import ExportResult

SMALL = ImageContract((3, 8, 8), 4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        for value in network.buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return network.eval()


def export_small(module: nn.Module, path: Path, **options: bool) -> ExportResult:
    return export_onnx(module, path, contract=SMALL, metadata={}, **options)


def run(path: Path, images: Tensor) -> np.ndarray:
    with OnnxRuntimeSession(path, threads=1) as session:
        return session.run(images.numpy())


def test_a_real_student_is_exported_as_promised(exported: ExportResult, contract: ImageContract) -> None:
    description = describe_onnx(exported.path)
    assert description["inputs"] == [{"name": "images", "dtype": "float", "shape": ["batch", 3, 32, 32]}]
    assert description["outputs"] == [{"name": "logits", "dtype": "float", "shape": ["batch", 10]}]
    assert description["opset"] == 20
    assert "BatchNormalization" not in description["operators"]
    assert description["metadata"]["dfadc.architecture"] == "torchvision:mobilenet_v2"
    assert description["metadata"]["dfadc.contract"] == contract.to_json()
    assert set(description["metadata"]) == {
        f"dfadc.{key}"
        for key in ("architecture", "contract", "input", "output", "precision", "runtime", "schema", "size", "version")
    }
    assert description["ir_version"] == 9  # ONNX Runtime 1.17 knows no later one
    assert description["metadata"]["dfadc.runtime"] == "onnxruntime>=1.17"
    assert exported.sha256 == hashlib.sha256(exported.path.read_bytes()).hexdigest()
    assert exported.size_bytes == exported.path.stat().st_size


def test_nothing_inside_names_this_machine(student_onnx: Path) -> None:
    data = student_onnx.read_bytes()
    for local in (str(Path.cwd()), str(Path(torch.__file__).parent), "site-packages", "stack_trace", ".py"):
        assert local.encode() not in data
    names = {node.name for node in onnx.load(student_onnx).graph.node}
    assert {"features.0.0/Conv", "classifier.1/Gemm"} <= names


def test_the_onnx_computes_what_the_module_does(
    student_onnx: Path, images: np.ndarray, student_logits: np.ndarray
) -> None:
    with OnnxRuntimeSession(student_onnx, threads=1) as session:
        logits = session.run(images)
    assert np.abs(logits - student_logits).max() <= 1e-4 * np.ptp(student_logits)
    assert len(set(student_logits.argmax(1))) > 1


def test_the_same_student_gives_the_same_bytes(tmp_path: Path) -> None:
    first = export_small(small_network(), tmp_path / "first.onnx")
    second = export_small(small_network(), tmp_path / "elsewhere" / "second.onnx")
    assert first.sha256 == second.sha256
    script = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_fp32 import export_small, small_network\n"
        f"print(export_small(small_network(), Path({str(tmp_path / 'third.onnx')!r})).sha256)"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd())},
    )
    assert (done.stdout.strip(), done.stderr) == (first.sha256, "")


def test_the_callers_module_and_random_state_are_untouched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = small_network().train().to(memory_format=torch.channels_last)
    before = copy.deepcopy(module.state_dict())
    random_state = torch.get_rng_state()
    export_small(module, tmp_path / "student.onnx")
    assert all(part.training for part in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert next(module.parameters()).requires_grad
    assert next(module.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "")


class Watched(nn.ReLU6):
    """Remembers whether it was asked to work in place."""

    asked: ClassVar[list[bool]] = []

    def forward(self, values: Tensor) -> Tensor:
        self.asked.append(self.inplace)
        return super().forward(values)


def test_activations_in_place_are_none_in_the_copy_that_is_exported(tmp_path: Path) -> None:
    module = nn.Sequential(small_network(), Watched(inplace=True))
    export_small(module, tmp_path / "student.onnx")
    assert not any(Watched.asked)
    assert len(Watched.asked) > 1
    assert module[1].inplace


def test_compiled_half_and_training_modules_give_the_plain_bytes(tmp_path: Path) -> None:
    plain = export_small(small_network(), tmp_path / "plain.onnx")
    compiled = torch.compile(small_network().train(), backend="eager")
    assert export_small(cast("nn.Module", compiled), tmp_path / "compiled.onnx").sha256 == plain.sha256
    inside = small_network()
    inside[0] = torch.compile(inside[0], backend="eager")  # type: ignore[operator,index]
    assert export_small(inside, tmp_path / "inside.onnx").sha256 == plain.sha256
    half = export_small(small_network().bfloat16(), tmp_path / "half.onnx")
    assert (
        describe_onnx(half.path)["weight_dtypes"].keys()
        == {"float", "int64"} & describe_onnx(plain.path)["weight_dtypes"].keys()
    )


def test_preprocessing_and_softmax_can_be_embedded(tmp_path: Path) -> None:
    module = small_network()
    result = export_small(module, tmp_path / "pixels.onnx", embed_normalisation=True, embed_softmax=True)
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SMALL.mean, SMALL.std))
    with torch.no_grad():
        expected = module((pixels - mean) / std).softmax(1).numpy()
    np.testing.assert_allclose(run(result.path, pixels), expected, atol=1e-5)
    description = describe_onnx(result.path)
    assert description["outputs"][0]["name"] == "probabilities"
    assert description["metadata"]["dfadc.input"] == "pixels in [0, 1], NCHW"


def test_normalisation_needs_mean_and_std(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="mean and std are unknown"):
        export_onnx(
            small_network(),
            tmp_path / "a.onnx",
            contract=ImageContract((3, 8, 8), 4),
            metadata={},
            embed_normalisation=True,
        )


class FixedBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([image.flatten()[:4] for image in images])


class Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :4]
        return logits if logits.sum() > 0 else logits.mul(2)


class NoOperator(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        spectrum: Tensor = torch.linalg.svdvals(images.mean(1))[:, :4]
        return spectrum


class NoisyInEval(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4].add(torch.rand(4))


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class Diverged(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4] * float("nan")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (FixedBatch(), "tracing inferred a static shape of 3"),
        (Branches(), "torch cannot export Branches to ONNX: Could not guard on data-dependent expression"),
        (NoOperator(), "svd"),
        (NoisyInEval(), "of the logit range away from the module"),
        (Pair(), "returns tuple, not a tensor of logits"),
        (Diverged(), "are not finite"),
        (nn.Flatten(), r"returns \(1, 192\) for 1 images, not \(1, 4\)"),
        (nn.Conv2d(1, 4, 1), "does not take 1 images of 3x8x8"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_exported_says_why_and_leaves_nothing(
    module: nn.Module, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "student.onnx"
    path.write_text("the earlier artifact")
    with pytest.raises(ExportFailed, match=reason) as caught:
        export_small(module, path)
    assert caught.value.exit_code == 5
    assert [file.name for file in tmp_path.iterdir()] == ["student.onnx"]
    assert path.read_text() == "the earlier artifact"
    assert capfd.readouterr() == ("", "")


def test_an_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        export_small(small_network(), tmp_path / "file" / "student.onnx")


class Masked(nn.Module):
    """Adds a mask that is filled in at every call, as shifted windows do it; nothing of it depends on the images."""

    def forward(self, images: Tensor) -> Tensor:
        mask = images.new_zeros(8, 8)
        mask[:4, 4:] = -1.0
        mask[4:, :4] = 2.0
        differences = mask.flatten()[None] - mask.flatten()[:, None]
        mask = differences.masked_fill(differences != 0, -100.0)[0].view(8, 8)
        return (images + mask).flatten(1)


def test_what_does_not_depend_on_the_images_is_a_constant(tmp_path: Path) -> None:
    contract = ImageContract((1, 8, 8), 64)
    result = export_onnx(Masked().eval(), tmp_path / "masked.onnx", contract=contract, metadata={})
    graph = onnx.load(result.path).graph
    depends = {graph.input[0].name}
    for node in graph.node:
        assert depends.intersection(node.input), f"{node.name} ({node.op_type}) depends on no image"
        depends.update(node.output)
    images = torch.randn(3, 1, 8, 8)
    np.testing.assert_allclose(run(result.path, images), Masked()(images).numpy(), atol=1e-5)
