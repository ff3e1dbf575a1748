"""The engine on a device: the same bodies on the CPU by default, and with ``-m gpu`` on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from miniature import SMALL_CONTRACT, SmallNetwork, build_run, save_untrained_teacher
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.checkpoint import load_checkpoint, save_checkpoint
from dfadc.distillation.generator.latents import FreshLatents
from dfadc.distillation.loop import distill
from dfadc.distillation.monitor import Monitor
from dfadc.networks.full_precision import full_fp32
from dfadc.networks.zoo.compact_resnet import CompactResNet
from dfadc.recipe.load import load_recipe
from dfadc.sampling.freeze import collect_calibration, freeze_samples
from dfadc.sampling.generators import train_adversary, train_prior
from dfadc.student.inherit import copy_weights_, corresponding_layers, find_copy
from dfadc.teacher.load import load_teacher
from dfadc.training.build import prepare
from dfadc.verification.samples import SampleSet
from exporters.sessions.torch_session import TorchSession

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.distillation.distillation import Distillation

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
#: Each release of torch has warnings of its own on CUDA, where the default tests do not go.
pytestmark = pytest.mark.filterwarnings("default")


def weights_of(run: Distillation) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in run.state.student.module.state_dict().items()}


def train(run: Distillation, until: int) -> list[float]:
    """Student losses."""
    losses: list[Tensor] = []
    distill(run, until, lambda step: losses.append(step.student_loss))
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
@on_each_device
def test_twenty_steps_lead_where_they_lead_on_the_cpu(
    device: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full fp32 the weights end within 2% of the way that they went; sums are taken in another order there."""
    settings = ("replay.procedural_share=0", "student.optimizer.learning_rate=0.01")

    def trained(where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rng = torch.Generator().manual_seed(5)
        monkeypatch.setattr(
            FreshLatents,
            "draw",
            # CUDA's generators draw other numbers from the same seed.
            lambda self, count: torch.randn(count, self.latent_dim, generator=rng).to(self.rng.device),
        )
        run = build_run(recipe, *settings, device=where)
        before = weights_of(run)
        with full_fp32(torch.device(where)):
            train(run, 20)
        return before, weights_of(run)

    before, expected = trained("cpu")
    begun, reached = trained(device)
    moved = 0.0
    for name, tensor in expected.items():
        assert torch.equal(before[name], begun[name]), name
        if tensor.is_floating_point():
            way = float((tensor - before[name]).norm())
            moved += way
            assert float((reached[name] - tensor).norm()) <= 0.02 * way + 1e-5, name
    assert moved > 0.01


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        *(pytest.param("cuda", p, marks=pytest.mark.gpu) for p in ("fp32", "bf16", "fp16")),
    ],
)
def test_every_precision_learns(device: str, precision: str, channels_last: bool) -> None:
    settings = (f"compute.precision={precision}", "student.optimizer.learning_rate=0.05", "generator.steps=1")
    run = build_run("auto", *settings, "replay.procedural_share=0.25", device=device, channels_last=channels_last)
    assert run.state.student.scaler.is_enabled() == (precision == "fp16")
    losses = train(run, 40)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert all(float(network.skipped) == 0 for network in (run.state.student, run.state.generator))
    tensors = [*run.state.student.module.state_dict().values(), *run.state.student.optimizer.state_dict()["state"]]
    assert {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} == {device}


@on_each_device
def test_memory_formats_have_the_same_loss(device: str) -> None:
    found = []
    for channels_last in (True, False):
        run = build_run("dfad", device=device, channels_last=channels_last)
        with torch.no_grad(), full_fp32(torch.device(device)):
            found.append(float(run.student.loss(run.student.draw_batch()).loss))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("recipe", ["auto", "pool"])
@on_each_device
def test_a_run_goes_on_from_its_checkpoint(device: str, recipe: str, tmp_path: Path) -> None:
    """Bit by bit on the CPU. On CUDA all that is drawn is the same, and sums of threads in no fixed order differ."""
    whole, first = (build_run(recipe, device=device) for _ in range(2))
    for run in (whole, first):
        Monitor(run)
    train(whole, 6)
    train(first, 3)
    save_checkpoint(tmp_path, first.state.state_dict())
    second = build_run(recipe, device=device)
    Monitor(second)
    torch.rand(3, device=device)  # another process has drawn other numbers
    second.state.load_state_dict(load_checkpoint(tmp_path))
    assert second.state.student.skipped.device.type == device
    train(second, 6)
    expected, found = (run.state.state_dict() for run in (whole, second))
    for stream in ("rng", "latent_rng", "sample_rng", "global_rng"):
        assert torch.equal(expected[stream], found[stream]), stream
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 0.02, "atol": 2e-3}
    torch.testing.assert_close(weights_of(second), weights_of(whole), **tolerance)
    torch.testing.assert_close(
        second.state.reservoir.images.cpu(), whole.state.reservoir.images.cpu(), rtol=tolerance["rtol"], atol=0.05
    )
    with torch.no_grad():  # and a rollback finds its way back from what was loaded
        second.state.go_back(second.state.snapshot())
    train(second, 7)


@on_each_device
def test_samples_hold_logits_of_full_precision(device: str) -> None:
    """An fp32 artifact is compared with them to a ten-thousandth; TF32 would be off by a thousandth."""
    run = build_run("auto", "verify.num_samples=48", "calibration.num_images=16", device=device)
    train(run, 3)
    prior, adversary = train_prior(run, 2), train_adversary(run, 2, restarts=2)
    samples = freeze_samples(run, prior=prior, adversary=adversary)
    assert isinstance(samples, SampleSet)
    network = run.state.student.average.cpu().eval()
    images = np.concatenate(list(samples.batches(16)))
    logits = TorchSession(network).run(images)
    assert np.abs(logits - samples.student_logits).max() <= 2e-5 * np.ptp(logits)
    network.to(device)
    calibration = collect_calibration(run, prior=prior, exclude=samples)
    assert len(calibration) == 16


@on_each_device
def test_a_session_of_torch_computes_what_the_cpu_does(device: str) -> None:
    network = SmallNetwork().eval()
    images = np.random.default_rng(0).standard_normal((9, *SMALL_CONTRACT.input_size), dtype=np.float32)
    with TorchSession(network) as one, TorchSession(network, device, batch_size=4) as other:
        expected, found = one.run(images), other.run(images)
    assert np.abs(found - expected).max() <= 5e-3 * np.ptp(expected)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    contract = ImageContract((1, 8, 8), 10, mean=(0.3,), std=(0.4,))
    return save_untrained_teacher(tmp_path_factory.mktemp("teacher"), contract)


@on_each_device
def test_a_teacher_can_be_distilled_twice(device: str, teacher_file: Path) -> None:
    """The first run has moved its network to the device; the second begins as the first did."""
    teacher = load_teacher(teacher_file)
    settings = ["steps=2", "batch_size=8", "compute.compile=off", "compute.precision=fp32", "replay.capacity=32"]
    started = []
    for _ in range(2):
        with prepare(teacher, "compact_resnet_4", recipe=load_recipe("auto", settings), device=device) as training:
            assert training.plan().estimate.seconds_per_step > 0
            started.append(weights_of(training.run))
            train(training.run, 2)
    torch.testing.assert_close(started[1], started[0], rtol=0, atol=0)


@on_each_device
def test_a_teacher_there_is_inherited_from(device: str) -> None:
    contract = ImageContract((1, 28, 28), 5)
    torch.manual_seed(0)
    teacher, expected, student = (CompactResNet(contract, width=width) for width in (12, 6, 6))
    copy = find_copy(student, teacher.eval(), torch.randn(2, *contract.input_size))
    assert not isinstance(copy, str)
    copy_weights_(expected, teacher, copy)
    teacher.to(device)
    student.to(device)
    copy_weights_(student, teacher, copy)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor.cpu(), expected.state_dict()[name]), name
    layers = corresponding_layers(student, teacher, copy)
    assert {layer.channels.device.type for layer in layers} == {device}
    assert all(isinstance(layer.student, nn.BatchNorm2d) for layer in layers)
