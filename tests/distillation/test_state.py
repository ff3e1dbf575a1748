"""Training state and trainable networks: updates, skipped updates, and the state to go on from."""

from __future__ import annotations

import copy
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import SMALL_CONTRACT, SmallNetwork, build_run
from states import assert_same_state
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfadc.distillation.compute.policy import ComputePolicy
from dfadc.distillation.loop import distill
from dfadc.distillation.state import RESERVOIR_OFFER, TrainingState
from dfadc.distillation.trainable import TrainableNetwork, build_optimizer, rate_factor
from dfadc.recipe.load import change_recipe, load_recipe
from dfadc.recipe.schema import AdamSettings, OptimizerSettings, ScheduleSettings

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

CPU = torch.device("cpu")
FP32 = ComputePolicy(CPU, None, channels_last=False, reason="test")
FP16 = ComputePolicy(CPU, torch.float16, channels_last=False, reason="test")
SGD = OptimizerSettings(kind="sgd", learning_rate=0.1)
ADAM = OptimizerSettings(kind="adam", learning_rate=1e-2)
BAD = (float("nan"), float("inf"), float("-inf"))


def make_network(
    optimizer: OptimizerSettings = SGD,
    *,
    policy: ComputePolicy = FP32,
    schedule: ScheduleSettings | None = None,
    ema_decay: float = 0.0,
) -> TrainableNetwork:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return TrainableNetwork(module, optimizer, policy, schedule=schedule or ScheduleSettings(), ema_decay=ema_decay)


def loss_of(network: TrainableNetwork, seed: int = 0, *, factor: float = 1.0) -> Tensor:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    loss: Tensor = network.module(inputs).square().sum() * factor
    return loss


def weights(network: TrainableNetwork) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters])


# ------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("updates_before", [0, 2])
def test_an_update_that_is_not_finite_is_skipped_as_a_whole(
    bad: float, optimizer: OptimizerSettings, clip_norm: float, updates_before: int
) -> None:
    """Weights, momentum and Adam's step count stay bit by bit; the next good update is what it would have been."""
    settings = optimizer.model_copy(update={"clip_norm": clip_norm})
    network, twin = make_network(settings), make_network(settings)
    for seed in range(updates_before):
        network.update(loss_of(network, seed))
        twin.update(loss_of(twin, seed))
    before = weights(network)
    network.update(loss_of(network, 7, factor=bad))
    assert torch.equal(weights(network), before)
    # Only the statistics have seen the skipped images: for the comparison, let the twin's see them too.
    loss_of(twin, 7)
    for each in (network, twin):
        each.update(loss_of(each, 8))
    assert_same_state(network.module.state_dict(), twin.module.state_dict())
    assert_same_state(network.optimizer.state_dict()["state"], twin.optimizer.state_dict()["state"])


def test_one_bad_gradient_stops_all_parameters() -> None:
    network = make_network()
    before = weights(network)
    network.update(loss_of(network) + network.parameters[-1].sum() * float("inf"))
    assert torch.equal(weights(network), before)


def test_skipped_counts_updates_in_a_row() -> None:
    network = make_network()
    counts = []
    for factor in (1.0, float("nan"), float("inf"), 1.0, float("nan")):
        network.update(loss_of(network, factor=factor))
        counts.append(float(network.skipped))
    assert counts == [0, 1, 2, 0, 1]


def test_fp16_gradients_are_scaled_and_an_overflow_halves_the_scale() -> None:
    network, plain = make_network(policy=FP16), make_network()
    assert network.scaler.is_enabled()
    assert not plain.scaler.is_enabled()
    for each in (network, plain):
        each.update(loss_of(each))
    torch.testing.assert_close(weights(network), weights(plain))
    before, scale = weights(network), network.scaler.get_scale()
    network.update(loss_of(network, factor=float("inf")))
    assert torch.equal(weights(network), before)
    assert float(network.skipped) == 1
    assert network.scaler.get_scale() == scale / 2


def test_only_this_networks_gradients_are_computed() -> None:
    network, other = make_network(), make_network()
    network.update((loss_of(network) - loss_of(other)).square())
    assert all(parameter.grad is not None for parameter in network.parameters)
    assert all(parameter.grad is None for parameter in other.parameters)


def test_a_parameter_outside_the_graph_stays() -> None:
    """Some networks carry an auxiliary head that training does not touch."""
    network = make_network()
    before = [parameter.detach().clone() for parameter in network.parameters]
    first = next(network.module.children())
    network.update(first(torch.ones(1, 3)).sum())
    moved = [not torch.equal(now, was) for now, was in zip(network.parameters, before, strict=True)]
    assert moved == [True, True, False, False, False, False]


def test_frozen_parameters_do_not_move() -> None:
    frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
    before = frozen.weight.detach().clone()
    decaying = SGD.model_copy(update={"weight_decay": 0.5})
    module = nn.Sequential(frozen, nn.BatchNorm1d(3), nn.Linear(3, 2))
    network = TrainableNetwork(module, decaying, FP32, schedule=ScheduleSettings())
    network.update(loss_of(network))
    assert torch.equal(frozen.weight, before)


# ------------------------------------------------------------------------------------ clipping, averages, rates


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipping_bounds_the_norm_of_the_whole_gradient(clip_norm: float) -> None:
    plain = OptimizerSettings(kind="sgd", learning_rate=1.0, clip_norm=clip_norm)  # a first step has no momentum
    network = make_network(plain)
    loss = loss_of(network)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters)]).double().numpy()
    norm = float(np.sqrt(np.sum(gradient**2)))
    assert norm > 0.5
    before = weights(network)
    network.update(loss_of(network))
    expected = gradient * min(1.0, clip_norm / norm)
    np.testing.assert_allclose((before - weights(network)).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_the_average_follows_its_formula_statistics_included() -> None:
    """The first update copies; then average = d · average + (1 - d) · network, for parameters and statistics."""
    network = make_network(ema_decay=0.9)
    expected: dict[str, Tensor] = {}
    for seed in range(5):
        network.update(loss_of(network, seed))
        for name, value in network.module.state_dict().items():
            if value.is_floating_point():
                old = expected.get(name)
                expected[name] = value.clone() if old is None else 0.9 * old + 0.1 * value
    averaged = network.average.state_dict()
    assert "1.running_var" in expected
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)
    assert not torch.equal(averaged["0.weight"], network.module.state_dict()["0.weight"])


def test_the_average_is_that_of_torch_also_after_a_state_was_loaded() -> None:
    network, other = make_network(ema_decay=0.9), make_network(ema_decay=0.9)
    reference = AveragedModel(other.module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(6):
        if seed == 3:
            stranger = make_network(ema_decay=0.9)
            stranger.load_state_dict(copy.deepcopy(network.state_dict()))
            network = stranger
        network.update(loss_of(network, seed))
        other.update(loss_of(other, seed))
        reference.update_parameters(other.module)
    assert network.ema is not None
    assert int(network.ema.n_averaged) == int(reference.n_averaged) == 6
    for name, value in reference.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(network.average.state_dict()[name], value)
    assert int(network.average.state_dict()["1.num_batches_tracked"]) == 6


def test_without_a_decay_the_average_is_the_network_itself() -> None:
    network = make_network()
    assert network.ema is None
    assert network.average is network.module


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["constant", "cosine", "step"]),
    warmup=st.sampled_from([0.0, 0.1, 1.0]),
    milestones=st.lists(st.floats(0, 1), max_size=3),
    decay=st.floats(0.01, 1),
    progress=st.floats(0, 1),
)
def test_rates_follow_their_formula(
    kind: Any, warmup: float, milestones: list[float], decay: float, progress: float
) -> None:
    schedule = ScheduleSettings(kind=kind, warmup=warmup, milestones=tuple(milestones), decay=decay)
    expected = 1.0
    if kind == "cosine":
        expected = (1 + math.cos(math.pi * progress)) / 2
    elif kind == "step":
        for milestone in milestones:
            expected *= decay if progress >= milestone else 1
    if warmup and progress < warmup:
        expected *= progress / warmup
    assert rate_factor(schedule, progress) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_papers_rates_fall_at_epochs_100_and_200_of_500() -> None:
    schedule = load_recipe("dfad").student.schedule
    factors = [rate_factor(schedule, step / 25_000) for step in (0, 4_999, 5_000, 9_999, 10_000, 24_999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_learning_rate_is_rate_times_factor_times_scale() -> None:
    network = make_network(schedule=ScheduleSettings(kind="cosine"))
    network.rate_scale = 0.5
    network.set_learning_rate(1 / 3)
    assert network.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 * 0.75)


def test_optimizers_are_the_ones_asked_for() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    adam = build_optimizer(parameters, ADAM.model_copy(update={"weight_decay": 0.1}))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["betas"] == (0.9, 0.999)
    assert adam.defaults["weight_decay"] == 0.1
    generators = build_optimizer(parameters, AdamSettings(learning_rate=1e-3, momentum=0.5))
    assert isinstance(generators, torch.optim.Adam)
    assert (generators.defaults["betas"], generators.defaults["weight_decay"]) == ((0.5, 0.999), 0)
    for kind in ("sgd", "nesterov"):
        sgd = build_optimizer(parameters, SGD.model_copy(update={"kind": kind, "weight_decay": 0.1}))
        assert isinstance(sgd, torch.optim.SGD)
        assert {name: sgd.defaults[name] for name in ("lr", "momentum", "nesterov", "weight_decay")} == {
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": kind == "nesterov",
            "weight_decay": 0.1,
        }


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_a_momentum_of_zeros_is_plain_sgd(nesterov: bool) -> None:
    ours, plain = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizers = (
        build_optimizer(
            [ours], SGD.model_copy(update={"kind": "nesterov" if nesterov else "sgd", "weight_decay": 0.01})
        ),
        torch.optim.SGD([plain], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01),
    )
    for gradient in ((1.0, 2.0), (-3.0, 0.5), (0.1, 0.1)):
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    torch.testing.assert_close(ours, plain)


# ------------------------------------------------------------------------------------------------------ the state


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint: written, and read without running code."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.parametrize("policy", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_network_goes_on_from_its_state_bit_by_bit(optimizer: OptimizerSettings, policy: ComputePolicy) -> None:
    network, other = (make_network(optimizer, policy=policy, ema_decay=0.9) for _ in range(2))
    for seed in range(3):
        network.update(loss_of(network, seed))
    network.update(loss_of(network, factor=float("nan")))
    network.rate_scale = 0.25
    other.load_state_dict(through_a_file(network.state_dict()))
    assert_same_state(other.state_dict(), network.state_dict())
    for each in (network, other):
        each.set_learning_rate(0.5)
        for seed in (4, 5):
            each.update(loss_of(each, seed))
    assert_same_state(other.state_dict(), network.state_dict())


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_a_run_goes_on_from_their_state_bit_by_bit(recipe: str) -> None:
    run = build_run(recipe)
    distill(run, 2, lambda _: None)
    run.state.draw_unseen_latents(3)
    state = through_a_file(run.state.state_dict())
    distill(run, 4, lambda _: None)
    again = build_run(recipe)
    torch.rand(3)
    again.state.load_state_dict(state)
    distill(again, 4, lambda _: None)
    assert_same_state(again.state.state_dict(), run.state.state_dict())


def test_loading_leaves_the_state_alone() -> None:
    """A rollback loads the same state more than once."""
    run = build_run("auto")
    distill(run, 1, lambda _: None)
    state = copy.deepcopy(run.state.state_dict())
    kept = copy.deepcopy(state)
    run.state.load_state_dict(copy.deepcopy(state))
    distill(run, 2, lambda _: None)
    assert_same_state(state, kept)


# --------------------------------------------------------------------------------------------- memory and latents


def make_state(
    contract: ImageContract, network: type[nn.Module], *, reservoir_size: int = 100, **changes: Any
) -> TrainingState:
    recipe = change_recipe(load_recipe("auto"), {"generator.latent_dim": 8, "replay.capacity": 16, **changes})
    generator = nn.Linear(8, 64)
    return TrainingState(
        network(), generator, recipe=recipe, contract=contract, policy=FP32, reservoir_size=reservoir_size
    )


def test_images_go_into_the_replay_buffer_and_a_few_into_the_reservoir() -> None:
    state = make_state(SMALL_CONTRACT, SmallNetwork)
    for _ in range(3):
        state.store(torch.randn(6, 1, 8, 8))
    assert len(state.replay) == 16
    assert len(state.reservoir) == 3 * RESERVOIR_OFFER


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_nothing_is_stored_that_is_not_needed(share: float) -> None:
    state = make_state(SMALL_CONTRACT, SmallNetwork, reservoir_size=0, **{"replay.share": share})
    state.store(torch.randn(6, 1, 8, 8))
    assert len(state.replay) == (6 if share else 0)
    assert len(state.reservoir) == 0


def test_images_that_are_not_finite_are_not_stored() -> None:
    state = make_state(SMALL_CONTRACT, SmallNetwork)
    images = torch.randn(6, 1, 8, 8)
    images[0], images[1], images[2] = BAD
    state.store(images)
    for memory in (state.replay, state.reservoir):
        assert memory.images[: len(memory)].isfinite().all()
    torch.testing.assert_close(state.replay.images[3:6].float(), images[3:], rtol=1e-3, atol=1e-3)


def test_latents_are_standard_normal_and_their_streams_apart() -> None:
    state, twin = (make_state(SMALL_CONTRACT, SmallNetwork) for _ in range(2))
    latents = state.draw_latents(2000)
    assert latents.shape == (2000, 8)
    assert latents.mean().item() == pytest.approx(0.0, abs=0.04)
    assert latents.std().item() == pytest.approx(1.0, abs=0.04)
    unseen = state.draw_unseen_latents(2000)
    # Verification's latents are none of training's, and drawing them changes nothing that training draws.
    assert not set(unseen[:, 0].tolist()) & set(latents[:, 0].tolist())
    twin.draw_latents(2000)
    assert torch.equal(twin.draw_latents(5), state.draw_latents(5))


def test_the_same_seed_draws_the_same_latents() -> None:
    one, same, other = (make_state(SMALL_CONTRACT, SmallNetwork, seed=seed) for seed in (5, 5, 6))
    latents = one.draw_latents(4)
    assert torch.equal(latents, same.draw_latents(4))
    assert not torch.equal(latents, other.draw_latents(4))
