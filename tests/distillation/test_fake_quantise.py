"""A student that plays rounded to INT8: what the rounding is, who sees it, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import SMALL_CONTRACT, SmallNetwork, build_game
from onnx import numpy_helper
from states import assert_same_state
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from dfadc.distillation.fake_quantise import FakeQuantiser
from dfadc.distillation.loop import StepLosses, distill, update_generator
from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe
from dfadc.recipe.resolve import check_budget
from dfadc.sampling.generators import train_prior
from dfadc.verification.logit_error import sqnr_db
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.int8.quantise import quantise
from exporters.to_onnx.int8.sensitivity import logits_of

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.distillation.objectives import Game


def images(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, *SMALL_CONTRACT.input_size, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> SmallNetwork:
    """A student whose batch norms have seen images, so that folding them changes the weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = SmallNetwork()
        with torch.no_grad():
            for _ in range(30):
                student(images(seed=int(torch.randint(1000, ()))))
    return student.eval()


def play(game: Game, steps: int) -> list[StepLosses]:
    losses: list[StepLosses] = []
    distill(game, steps, losses.append)
    return losses


def rounded(values: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Symmetric INT8, written down independently."""
    step = largest / 127
    return np.clip(np.round(values / step), -127, 127) * step


# ---------------------------------------------------------------------------------------------------- the rounding


def test_weights_are_rounded_by_output_channel_and_inputs_as_a_whole() -> None:
    layer = nn.Linear(6, 3)
    quantiser = FakeQuantiser(layer)
    inputs = torch.randn(5, 6)
    found = quantiser(inputs, learns=True).detach().numpy()
    weight, values = layer.weight.detach().numpy(), inputs.numpy()
    expected = rounded(values, np.abs(values).max()) @ rounded(weight, np.abs(weight).max(axis=1, keepdims=True)).T
    np.testing.assert_allclose(found, expected + layer.bias.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_range_is_a_moving_average_that_only_learning_moves() -> None:
    layer = nn.Linear(2, 2)
    quantiser = FakeQuantiser(layer)
    for peak, expected in ((4.0, 4.0), (8.0, 4.04), (2.0, 4.0196)):
        quantiser(torch.tensor([[1.0, -peak]]), learns=True)
        assert quantiser.ranges.tolist() == pytest.approx([expected], rel=1e-6)
    quantiser(torch.tensor([[1.0, 100.0]]), learns=False)
    quantiser(torch.tensor([[1.0, torch.inf]]), learns=True)
    quantiser(torch.tensor([[1.0, torch.nan]]), learns=True)
    assert quantiser.ranges.tolist() == pytest.approx([4.0196], rel=1e-6)


def test_what_lies_beyond_the_range_is_cut_off_and_gets_no_gradient() -> None:
    layer = nn.Linear(2, 1, bias=False)
    quantiser = FakeQuantiser(layer)
    quantiser(torch.tensor([[0.5, 1.0]]), learns=True)
    beyond = torch.tensor([[0.5, 7.0]], requires_grad=True)
    quantiser(beyond, learns=False).sum().backward()
    assert beyond.grad is not None
    weight = rounded(layer.weight.detach().numpy(), layer.weight.detach().abs().max().numpy())
    np.testing.assert_allclose(beyond.grad.numpy(), [[weight[0, 0], 0.0]], rtol=1e-5)
    assert layer.weight.grad is not None
    np.testing.assert_allclose(layer.weight.grad.numpy(), [[64 / 127, 1.0]], rtol=1e-5)
    for end in (7.0, -7.0):
        answer = float(quantiser(torch.tensor([[0.0, end]]), learns=False).detach())
        assert answer == pytest.approx(np.sign(end) * weight[0, 1], rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(factors=st.lists(st.floats(0.01, 100).flatmap(lambda f: st.sampled_from([f, -f])), min_size=8, max_size=8))
def test_folding_a_batch_norm_does_not_change_how_weights_are_rounded(factors: list[float]) -> None:
    convolution = nn.Conv2d(3, 8, 3)
    quantiser = FakeQuantiser(convolution)
    scale = torch.tensor(factors, dtype=torch.float32).view(-1, 1, 1, 1)
    with torch.no_grad():
        before = quantiser._round_weight(convolution.weight) * scale  # noqa: SLF001 -- what is rounded, apart from inputs
        after = quantiser._round_weight(convolution.weight * scale)  # noqa: SLF001
    step = (convolution.weight * scale).detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    # A value half-way between two steps may fall to either side.
    assert ((before - after).abs() <= 1.001 * step).all()
    assert ((before - after).abs() > 1e-3 * step).float().mean() < 0.01


def test_it_computes_what_the_int8_export_computes(tmp_path: Path) -> None:
    """With the export's ranges: its own come from other images, and a grid a thousandth finer rounds differently."""
    student, pool = nn.Sequential(network().features, nn.Flatten(), nn.Linear(128, 10)).eval(), images(256)
    path = export_onnx(student, tmp_path / "student.onnx", contract=SMALL_CONTRACT, metadata={}).path
    int8 = quantise(load_onnx(path), pool.numpy(), calibrator="minmax").model
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    ranges = [127 * float(scales[name]) for name in ("images_scale", "relu_scale", "relu_1_scale")]
    quantiser = FakeQuantiser(student)
    quantiser.load_state_dict({"ranges": torch.tensor(ranges)})
    with torch.no_grad():
        simulated, in_float = quantiser(pool, learns=False).numpy(), student(pool).numpy()
    exported = logits_of(int8, pool.numpy())
    # A value half-way between two steps may fall to either side.
    assert sqnr_db(simulated, exported) > sqnr_db(in_float, exported) + 15
    assert np.isclose(simulated, exported, atol=1e-5).mean() > 0.5


def test_a_student_without_layers_to_round_is_refused() -> None:
    with pytest.raises(DfadcError, match=r"student\.quantise_from is set"):
        FakeQuantiser(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)))


# -------------------------------------------------------------------------------------------------- within the game


def test_both_players_see_the_rounded_student_from_its_share_on() -> None:
    game = build_game("auto", "student.quantise_from=0.5", "student.steps=1")
    play(game, 4)
    assert not game.quantises
    assert game.quantiser is not None
    assert not game.quantiser.ranges.any()
    play(game, 5)
    assert game.quantiser.ranges.all()
    before = game.quantiser.ranges.clone()
    latents = game.players.draw_latents(8)
    batch = game.draw_generator_batch()._replace(latents=latents)
    game.players.student.module.eval()
    game.players.generator.module.eval()
    _, terms = game.generator_loss(batch)
    with torch.no_grad():
        drawn = game.players.generator.module(latents)
        student_logits, teacher_logits = game.quantiser(drawn, learns=False), game.teacher(drawn)
        in_float = game.players.student.module(drawn)
    assert float(terms["discrepancy"]) == pytest.approx(float((student_logits - teacher_logits).abs().mean()), rel=1e-5)
    assert float(terms["discrepancy"]) != pytest.approx(float((in_float - teacher_logits).abs().mean()), rel=1e-5)
    update_generator(game)
    assert torch.equal(game.quantiser.ranges, before), "the generator's images are not the student's"


def test_gradients_reach_both_players_through_the_rounding() -> None:
    game = build_game("auto", "student.quantise_from=0", "prior.batch_norm=0", "prior.one_hot=0", "prior.balance=0")
    game.begin_step()
    loss, *_ = game.student_loss(game.draw_student_batch())
    for gradient in torch.autograd.grad(loss, game.players.student.parameters):
        assert gradient.isfinite().all()
        assert gradient.any()
    loss, _ = game.generator_loss(game.draw_generator_batch())
    gradients = torch.autograd.grad(loss, game.players.generator.parameters, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("stop", [3, 6])
def test_a_run_goes_on_bit_by_bit_across_the_switch(stop: int) -> None:
    rules = ("student.quantise_from=0.5", "student.steps=2")
    whole, first, second = (build_game("auto", *rules) for _ in range(3))
    losses = play(whole, 8)
    play(first, stop)
    second.players.load_state_dict(copy.deepcopy(first.players.state_dict()))
    later = play(second, 8)
    assert_same_state(second.players.state_dict(), whole.players.state_dict())
    assert [float(step.student_loss) for step in later] == [float(step.student_loss) for step in losses[stop:]]


def test_before_its_share_and_without_one_a_run_is_what_it_was() -> None:
    plain, late = build_game("auto"), build_game("auto", "student.quantise_from=0.5")
    assert plain.quantiser is None
    assert not any(module._forward_pre_hooks for module in plain.players.student.module.modules())  # noqa: SLF001
    play(plain, 4)
    play(late, 4)
    states: list[dict[str, Any]] = [game.players.state_dict() for game in (plain, late)]
    assert "quantiser" not in states[0]["carried"]
    assert set(states[1]["carried"].pop("quantiser")) == {"ranges"}
    assert_same_state(states[1], states[0])
    play(plain, 5)
    play(late, 5)
    weights = [game.players.student.module.get_parameter("features.0.weight") for game in (plain, late)]
    assert not torch.equal(*weights), "from there on it plays rounded"


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_is_exported_has_no_trace_of_it(ema_decay: float) -> None:
    game = build_game("auto", "student.quantise_from=0", f"student.ema_decay={ema_decay}")
    play(game, 2)
    average = game.players.student.average.eval()
    assert average.state_dict().keys() == SmallNetwork().state_dict().keys()
    clean = SmallNetwork().eval().to(memory_format=game.policy.memory_format)
    clean.load_state_dict(average.state_dict())
    assert torch.equal(average(images()), clean(images()))
    game.close()
    assert not any(module._forward_pre_hooks for module in game.players.student.module.modules())  # noqa: SLF001


def test_examiners_ask_the_student_in_float() -> None:
    game = build_game("auto", "student.quantise_from=0", "verify.prior_steps=2", "steps=20")
    play(game, 1)
    assert game.quantiser is not None
    before = game.quantiser.ranges.clone()
    assert "quantiser" not in train_prior(game).state_dict()["carried"]
    assert torch.equal(game.quantiser.ranges, before)


@pytest.mark.slow
def test_compiled_it_is_whole_graphs_with_the_same_losses() -> None:
    eager, compiled = (build_game("dfad", "student.quantise_from=0.5", "steps=4") for _ in range(2))
    torch.compiler.reset()
    counters.clear()
    compiled.compile(backend="aot_eager")
    plain, traced = play(eager, 4), play(compiled, 4)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4, "one a player, and after the switch one more each"
    for one, other in zip(plain, traced, strict=True):
        assert float(other.student_loss) == pytest.approx(float(one.student_loss), rel=1e-3)
        assert float(other.generator_loss) == pytest.approx(float(one.generator_loss), rel=1e-3)


def test_it_plays_in_bf16() -> None:
    game = build_game("auto", "student.quantise_from=0", "compute.precision=bf16")
    assert all(torch.isfinite(step.student_loss) for step in play(game, 2))


def test_a_share_that_no_step_reaches_is_refused() -> None:
    with pytest.raises(DfadcError, match="would never play in INT8"):
        check_budget(load_recipe("auto", ["steps=8", "student.quantise_from=0.99"]))
    check_budget(load_recipe("auto", ["steps=200", "student.quantise_from=0.99"]))


def test_rounding_costs_the_student_something_to_learn_under() -> None:
    """The plain loss of the float student and the loss it is trained on differ: it feels the rounding."""
    student = network()
    quantiser = FakeQuantiser(student)
    with torch.no_grad():
        for _ in range(3):
            quantiser(images(), learns=True)
        difference = functional.l1_loss(quantiser(images(), learns=False), student(images()))
    assert 0 < float(difference) < 0.1


def test_who_learns_rounded_answers_better_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 bits, where rounding hurts: the float student learns well and loses it."""
    monkeypatch.setattr("dfadc.distillation.fake_quantise.LARGEST", 3)
    errors = {}
    for quantise_from in (0.0, 1.0):
        rules = ("steps=60", "batch_size=32", "student.optimizer.learning_rate=0.1", "student.hints=0")
        game = build_game("auto", f"student.quantise_from={quantise_from}", *rules)
        play(game, 60)
        student = game.players.student.average.eval()
        quantiser = FakeQuantiser(student)
        with torch.no_grad():
            drawn = torch.cat([game.players.generator.average.eval()(game.players.draw_unseen_latents(256)), images()])
            quantiser(drawn, learns=True)
            errors[quantise_from] = float((quantiser(drawn, learns=False) - game.teacher(drawn)).abs().mean())
    assert errors[0.0] < 0.9 * errors[1.0], errors
