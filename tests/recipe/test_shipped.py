"""Every shipped recipe trains in miniature: on and on, from a checkpoint, compiled."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import MINIATURE, SMALL_CONTRACT, build_run, resolve
from states import assert_same_state
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfadc.contract import ImageContract
from dfadc.distillation.loop import StepLosses, distill
from dfadc.distillation.monitor import Monitor
from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe, recipe_names

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation

#: Steps of hundreds of updates become steps of a few.
SHORT = ("student.steps=2", "generator.steps=2", "log.interval=1")
#: Recipes whose student is trained on replayed images alone, with which the buffer is filled before it starts.
REPLAY_ALONE = {"pool"}


def build(name: str, *overrides: str, **networks: Any) -> Distillation:
    return build_run(name, *SHORT, *overrides, **networks)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_and_goes_on_bit_by_bit_from_a_checkpoint(name: str) -> None:
    whole, again = build(name), build(name)
    monitor = Monitor(whole)
    losses: list[StepLosses] = []
    distill(whole, 3, losses.append)
    monitor.check(float(losses[-1].student_loss))
    state = through_a_file(whole.state.state_dict())
    distill(whole, 6, losses.append)
    monitor.check(float(losses[-1].student_loss))

    torch.rand(5)
    again.state.load_state_dict(state)
    resumed = Monitor(again)
    continued: list[StepLosses] = []
    distill(again, 6, continued.append)
    resumed.check(float(continued[-1].student_loss))
    assert_same_state(again.state.state_dict(), whole.state.state_dict())

    assert float(whole.state.student.skipped) == float(whole.state.generator.skipped) == 0
    assert all(each.generator_loss.isfinite() for each in losses)
    assert [bool(each.student_loss.isnan()) for each in losses] == [name in REPLAY_ALONE, *[False] * 5]


@pytest.mark.parametrize("name", recipe_names())
def test_both_networks_of_a_recipe_learn(name: str) -> None:
    """The student moves, and the generator's loss has a gradient that moves all that is to move."""
    run = build(name)
    student = [parameter.detach().clone() for parameter in run.state.student.parameters]
    distill(run, 2, lambda _: None)
    assert any(not torch.equal(now, was) for now, was in zip(run.state.student.parameters, student, strict=True))
    run.generator.begin_updates()
    loss, _ = run.generator.loss(run.generator.draw_batch())
    gradients = torch.autograd.grad(loss, run.state.generator.parameters)
    assert all(bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0 for gradient in gradients)


class TracedNetwork(nn.Module):
    """As little as there is to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(4 * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layers(images))
        return logits


#: Two are compiled where objectives are tested.
@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in {"auto", "dfad"}])
def test_a_recipe_compiles_as_whole_graphs_that_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    teacher = TracedNetwork().eval().requires_grad_(requires_grad=False)
    # Pixels: a last batch norm is rounded in another way, and the games make much of that.
    small = ["generator.architecture=scalable"]
    results: dict[str, tuple[list[StepLosses], Tensor]] = {}
    torch.compiler.reset()
    counters.clear()
    for how in ("eager", "compiled"):
        torch.manual_seed(1)
        run = build(name, *small, teacher=teacher, student=TracedNetwork())
        if how == "compiled":
            run.compile(backend="aot_eager")
        losses: list[StepLosses] = []
        distill(run, 4, losses.append)
        moved = [*run.state.student.parameters, *run.state.generator.parameters]
        results[how] = losses, torch.cat([parameter.detach().flatten() for parameter in moved])
        run.__exit__()
    # One for each network, one more of the student's before there is anything to replay, and one for repeated batches.
    replay = load_recipe(name).replay
    assert counters["stats"]["unique_graphs"] == 2 + (0 < replay.share < 1) + (replay.repeats > 0)
    assert not counters["graph_break"]
    for plain, traced in zip(results["eager"][0], results["compiled"][0], strict=True):
        assert float(traced.student_loss) == pytest.approx(float(plain.student_loss), rel=1e-4, nan_ok=True)
        assert float(traced.generator_loss) == pytest.approx(float(plain.generator_loss), rel=1e-4)
        assert traced.terms.keys() == plain.terms.keys()
    # The gradients too, then.
    torch.testing.assert_close(results["compiled"][1], results["eager"][1], rtol=1e-4, atol=1e-5)


def test_the_papers_recipes_are_not_reset_after_a_collapse() -> None:
    """A reset would be a method of ours in a paper's result."""
    for name in set(recipe_names()) - {"auto", "pool"}:
        assert load_recipe(name).generator.on_collapse == "warn", name


@pytest.mark.parametrize("name", sorted(REPLAY_ALONE))
def test_without_a_warm_up_a_pool_recipe_would_begin_on_an_empty_buffer(name: str) -> None:
    recipe = load_recipe(name, ["student.start=0.0"])
    with pytest.raises(DfadcError, match="begin on an empty replay buffer"):
        resolve(recipe, ImageContract((3, 32, 32), 10, mean=(0.5,) * 3, std=(0.2,) * 3), 5)


def test_the_miniature_changes_no_method() -> None:
    """Overrides of the tests above change a recipe's size alone."""
    sizes = {"steps", "batch_size", "generator.latent_dim", "replay.capacity"}
    sizes |= {"student.steps", "generator.steps", "log.interval"}
    changed = {override.partition("=")[0] for override in (*MINIATURE, *SHORT)}
    assert {path for path in changed if not path.startswith("compute.")} == sizes
    assert SMALL_CONTRACT.task == "classification"
