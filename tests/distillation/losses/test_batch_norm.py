"""Matching batch-norm statistics, against an independent NumPy formula, over every kind of layer that keeps them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dfadc.distillation.losses.batch_norm import BatchNormMatching, BatchStatistics, watch_images
from dfadc.networks.norm_layers import is_batch_norm_with_statistics
from dfadc.teacher.exported_norms import restore_batch_norms_

Array = npt.NDArray[np.float64]


def draw(shape: tuple[int, ...], seed: int, scale: float = 3.0) -> Array:
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


class TwoNorms(nn.Module):
    """A 1x1 convolution, batch norm, ReLU, a 1x1 convolution and batch norm: NumPy can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(4)])
        rng = torch.Generator().manual_seed(0)
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(generator=rng)
            norm.running_var.uniform_(0.5, 2.0, generator=rng)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.norms[1](self.second(torch.relu(self.norms[0](self.first(images)))))
        return maps


def numpy_distance(network: TwoNorms, images: Array) -> float:
    """‖μ - running mean‖₂ + ‖σ² - running variance‖₂ at the input of each batch norm, added up."""
    total = 0.0
    for convolution, norm in zip((network.first, network.second), network.norms, strict=True):
        state = {name: value.detach().double().numpy() for name, value in norm.state_dict().items()}
        images = np.einsum("oc,nchw->nohw", convolution.weight.detach().double().numpy()[:, :, 0, 0], images)
        mean = np.array([images[:, c].mean() for c in range(images.shape[1])])
        variance = np.array([images[:, c].var() for c in range(images.shape[1])])
        total += np.sqrt(np.sum((mean - state["running_mean"]) ** 2))
        total += np.sqrt(np.sum((variance - state["running_var"]) ** 2))
        channel = (None, slice(None), None, None)
        images = (images - state["running_mean"][channel]) / np.sqrt(state["running_var"][channel] + 1e-5)
        images = np.maximum(images * state["weight"][channel] + state["bias"][channel], 0)
    return float(total)


def distance(matching: BatchNormMatching, network: nn.Module, images: Tensor) -> Tensor:
    with matching, matching.recording() as distances:
        network(images)
    return torch.stack(distances).sum()


def test_batch_norm_matching_is_numpys() -> None:
    network, images = TwoNorms(), draw((5, 2, 4, 3), 4, scale=1.0)
    matching = BatchNormMatching(list(network.norms))
    measured = distance(matching, network, torch.from_numpy(images).float())
    assert measured.dtype == torch.float32
    assert measured.item() == pytest.approx(numpy_distance(network, images), rel=1e-5)


def test_batch_norm_matching_of_flat_features() -> None:
    norm = nn.BatchNorm1d(3).eval()
    features = draw((6, 3), 5)
    expected = np.linalg.norm(features.mean(axis=0)) + np.linalg.norm(features.var(axis=0) - 1)
    measured = distance(BatchNormMatching([norm]), norm, torch.from_numpy(features).float())
    assert measured.item() == pytest.approx(expected, rel=1e-5)


def test_batch_norm_matching_is_zero_where_the_statistics_are_those_of_training() -> None:
    norm = nn.BatchNorm2d(2, momentum=1.0)
    images = torch.from_numpy(draw((64, 2, 16, 16), 6)).float()
    norm(images)
    # The stored variance is the unbiased one: N / (N - 1) of the batch's.
    assert distance(BatchNormMatching([norm.eval()]), norm, images).item() == pytest.approx(0.0, abs=1e-2)


def test_batch_norm_matching_computes_nothing_but_while_recording() -> None:
    network, images = TwoNorms(), torch.zeros(2, 2, 3, 3)
    with BatchNormMatching(list(network.norms)) as matching:
        network(images)
        with pytest.raises(RuntimeError), matching.recording():
            network(images[:, :1])
        network(images)
        with matching.recording() as distances:
            assert distances == []
            network(images)
        assert len(distances) == 2


def test_batch_norm_matching_forgets_what_it_gave() -> None:
    network, images = TwoNorms(), torch.from_numpy(draw((5, 2, 4, 3), 7)).float()
    matching = BatchNormMatching(list(network.norms))
    assert distance(matching, network, images).item() == distance(matching, network, images).item()


def test_batch_norm_matching_gives_a_gradient_to_the_images_alone() -> None:
    network = TwoNorms().requires_grad_(requires_grad=False)
    images = torch.from_numpy(draw((5, 2, 4, 3), 8)).float().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(BatchNormMatching(list(network.norms)), network, images), images)
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_batch_norm_matching_sums_half_precision_activations_in_fp32() -> None:
    norm = nn.BatchNorm2d(2).eval()
    images = (100 + torch.from_numpy(draw((64, 2, 8, 8), 9))).bfloat16()
    measured = distance(BatchNormMatching([norm]), norm, images)
    exact = images.double().numpy()
    expected = np.linalg.norm(exact.mean(axis=(0, 2, 3))) + np.linalg.norm(exact.var(axis=(0, 2, 3)) - 1)
    assert measured.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4, 6), (4, 2, 3, 3, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_statistics_have_the_gradient_of_autograd(shape: tuple[int, ...], memory_format: Any) -> None:
    activations = torch.from_numpy(2 + draw(shape, 10)).float()
    if len(shape) == 4:
        activations = activations.contiguous(memory_format=memory_format)
    weights = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(0))
    over = [0, *range(2, len(shape))]
    ours, theirs = (activations.clone().requires_grad_() for _ in range(2))
    mean, variance = BatchStatistics.apply(ours)
    exact_variance, exact_mean = torch.var_mean(theirs, dim=over, correction=0)
    torch.testing.assert_close(mean, exact_mean)
    torch.testing.assert_close(variance, exact_variance)
    gradients = [
        torch.autograd.grad((weights[0] * means + weights[1] * variances).sum(), images)[0]
        for means, variances, images in ((mean, variance, ours), (exact_mean, exact_variance, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_batch_statistics_of_bf16_activations_have_a_gradient_as_good_as_bf16() -> None:
    activations = torch.from_numpy(1 + draw((64, 4, 8, 8), 11, scale=1.0)).bfloat16()
    half, full = activations.clone().requires_grad_(), activations.float().requires_grad_()
    gradients = []
    for images in (half, full):
        mean, variance = BatchStatistics.apply(images)
        assert mean.dtype == variance.dtype == torch.float32
        gradients.append(torch.autograd.grad((mean + variance).sum(), images)[0].double())
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_a_channel_that_never_changes_has_no_variance_and_a_finite_gradient() -> None:
    """Dead channels are common behind a ReLU, and in images of one colour."""
    norm = nn.BatchNorm2d(2).eval()
    images = torch.from_numpy(draw((4, 2, 3, 3), 12)).float()
    images[:, 0] = 0.5
    images.requires_grad_()
    value = distance(BatchNormMatching([norm]), norm, images)
    (gradient,) = torch.autograd.grad(value, images)
    assert value.isfinite()
    assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------- every kind of layer


def make_norm(kind: str) -> nn.Module:
    """A layer of a kind that keeps statistics, with statistics of its own."""
    if kind == "timm":
        layers = pytest.importorskip("timm.layers")
        norm: nn.Module = layers.BatchNormAct2d(3)
    else:
        norm = {"plain": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "frozen": FrozenBatchNorm2d}[kind](3)
    rng = torch.Generator().manual_seed(1)
    norm.get_buffer("running_mean").normal_(generator=rng)
    norm.get_buffer("running_var").uniform_(0.5, 2.0, generator=rng)
    return norm.eval()


@pytest.mark.parametrize("kind", ["plain", "sync", "frozen", "timm"])
def test_every_kind_of_layer_is_matched(kind: str) -> None:
    norm, images = make_norm(kind), draw((5, 3, 4, 4), 20)
    assert is_batch_norm_with_statistics(norm)
    state = {name: norm.get_buffer(name).double().numpy() for name in ("running_mean", "running_var")}
    expected = np.linalg.norm(images.mean(axis=(0, 2, 3)) - state["running_mean"])
    expected += np.linalg.norm(images.var(axis=(0, 2, 3)) - state["running_var"])
    measured = distance(BatchNormMatching([norm]), norm, torch.from_numpy(images).float())
    assert measured.item() == pytest.approx(expected, rel=1e-5)


def test_batch_norms_of_an_exported_program_are_matched() -> None:
    """As load_teacher gives them: hung on containers that nothing calls, they gave no term at all."""
    network, images = TwoNorms(), torch.from_numpy(draw((5, 2, 4, 3), 21)).float()
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    module = program.module()
    restore_batch_norms_(module)
    layers = [layer for layer in module.modules() if is_batch_norm_with_statistics(layer)]
    exported = distance(BatchNormMatching(layers), module, images)
    torch.testing.assert_close(exported, distance(BatchNormMatching(list(network.norms)), network, images))


# ------------------------------------------------------------------------------------------------- momentum


def test_a_momentum_matches_the_average_over_turns() -> None:
    """FastDFKD: m · average + (1 - m) · batch, the average taken on once a turn, however many updates it has."""
    norm, momentum = make_norm("plain"), 0.8
    matching = BatchNormMatching([norm], momentum)
    targets = np.stack([norm.get_buffer(name).double().numpy() for name in ("running_mean", "running_var")])
    average: Array | None = None
    for step in range(3):
        for update in range(2):
            images = draw((5, 3, 4, 4), 30 + 2 * step + update)
            statistics = np.stack([images.mean(axis=(0, 2, 3)), images.var(axis=(0, 2, 3))])
            matched = statistics if average is None else momentum * average + (1 - momentum) * statistics
            expected = np.linalg.norm(matched - targets, axis=1).sum()
            measured = distance(matching, norm, torch.from_numpy(images).float())
            assert measured.item() == pytest.approx(expected, rel=1e-4)
        average = statistics if average is None else momentum * average + (1 - momentum) * statistics
        matching.end_updates()


def test_a_momentum_shortens_the_gradient_and_keeps_it() -> None:
    norm = make_norm("plain")
    matching = BatchNormMatching([norm], 0.9)
    images = torch.from_numpy(draw((5, 3, 4, 4), 40)).float().requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(distance(matching, norm, images), images)
        assert gradient.abs().sum() > 0
        matching.end_updates()


def test_averages_go_on_from_their_state() -> None:
    norm, images = make_norm("plain"), torch.from_numpy(draw((5, 3, 4, 4), 41)).float()
    one, other = (BatchNormMatching([norm], 0.9) for _ in range(2))
    distance(one, norm, images)
    one.end_updates()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    later = torch.from_numpy(draw((5, 3, 4, 4), 42)).float()
    assert torch.equal(distance(one, norm, later), distance(other, norm, later))


def test_hooks_are_on_the_layers_within_the_context_alone() -> None:
    network = TwoNorms()
    with BatchNormMatching(list(network.norms)):
        assert all(norm._forward_pre_hooks for norm in network.norms)  # noqa: SLF001 -- where torch keeps hooks
    assert all(not norm._forward_pre_hooks for norm in network.norms)  # noqa: SLF001
    with pytest.raises(RuntimeError), BatchNormMatching(list(network.norms)):
        network(torch.zeros(2, 1, 3, 3))
    assert all(not norm._forward_pre_hooks for norm in network.norms)  # noqa: SLF001


def test_how_far_single_images_are_from_the_statistics() -> None:
    """Per layer and image the mean over channels of ((μ - m) / σ)² + ((s - σ) / σ)², pass by pass."""
    network, images = TwoNorms(), draw((5, 2, 4, 3), 1)
    norms = [layer for layer in network.norms if isinstance(layer, nn.Module)]
    with watch_images(norms) as by_layer, torch.no_grad():
        for part in torch.from_numpy(images).float().split(3):
            network(part)
    assert [[len(part) for part in parts] for parts in by_layer] == [[3, 2], [3, 2]]
    state = {name: value.double().numpy() for name, value in norms[0].state_dict().items()}
    maps = np.einsum("oc,nchw->nohw", network.first.weight.detach().double().numpy()[:, :, 0, 0], images)
    deviation = np.sqrt(state["running_var"])
    apart = ((maps.mean(axis=(2, 3)) - state["running_mean"]) / deviation) ** 2
    apart += (maps.std(axis=(2, 3)) / deviation - 1) ** 2
    np.testing.assert_allclose(torch.cat(by_layer[0]).numpy(), apart.mean(axis=1), rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in norms)  # noqa: SLF001


def test_vectors_have_no_deviation_of_their_own() -> None:
    norm = nn.BatchNorm1d(3)
    with watch_images([norm]) as ((found),):
        norm.eval()(torch.zeros(4, 3))
    torch.testing.assert_close(found[0], torch.ones(4))
