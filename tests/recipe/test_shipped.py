"""Every shipped recipe plays in miniature: on and on, from a checkpoint, compiled, on the teacher it is made for."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import MINIATURE, SMALL_CONTRACT, build_game
from states import assert_same_state
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfadc.contract import ImageContract
from dfadc.distillation.loop import StepLosses, distill
from dfadc.distillation.monitor import Monitor
from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe, recipe_names
from dfadc.recipe.resolve import fit_recipe

if TYPE_CHECKING:
    from dfadc.distillation.objectives import Game

#: Steps of hundreds of updates become steps of a few.
SHORT = ("student.steps=2", "generator.steps=2", "verify.snapshots=0", "log.interval=1")
#: Recipes that match batch-norm statistics, and so have nothing to say to a teacher without.
NEED_BATCH_NORM = {"deepinversion", "dfq", "fast", "nayer", "pool"}
#: Recipes whose student lives from the ring alone, filled before it starts.
RING_ALONE = {"deepinversion", "fast", "nayer", "pool"}


def build(name: str, *overrides: str, **networks: Any) -> Game:
    # Free pixels are as many as the image has; all others take the miniature's latents.
    latents = ("generator.latent_dim=0",) if load_recipe(name).generator.latent_dim == 0 else ()
    return build_game(name, *SHORT, *latents, *overrides, **networks)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_plays_and_goes_on_bit_by_bit_from_a_checkpoint(name: str) -> None:
    whole, again = build(name), build(name)
    monitor = Monitor(whole)
    losses: list[StepLosses] = []
    distill(whole, 3, losses.append)
    monitor.look(float(losses[-1].student_loss))
    state = through_a_file(whole.players.state_dict())
    distill(whole, 6, losses.append)
    monitor.look(float(losses[-1].student_loss))

    torch.rand(5)
    again.players.load_state_dict(state)
    resumed = Monitor(again)
    continued: list[StepLosses] = []
    distill(again, 6, continued.append)
    resumed.look(float(continued[-1].student_loss))
    assert_same_state(again.players.state_dict(), whole.players.state_dict())

    assert float(whole.players.student.skipped) == float(whole.players.generator.skipped) == 0
    assert all(each.generator_loss.isfinite() for each in losses)
    assert [bool(each.student_loss.isnan()) for each in losses] == [name in RING_ALONE, *[False] * 5]


@pytest.mark.parametrize("name", recipe_names())
def test_both_players_of_a_recipe_learn(name: str) -> None:
    """The student moves, and the generator's loss has a gradient that moves all that is to move."""
    game = build(name)
    student = [parameter.detach().clone() for parameter in game.players.student.parameters]
    distill(game, 2, lambda _: None)
    assert any(not torch.equal(now, was) for now, was in zip(game.players.student.parameters, student, strict=True))
    game.begin_turn()
    loss, _ = game.generator_loss(game.draw_generator_batch())
    gradients = torch.autograd.grad(loss, game.players.generator.parameters)
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


#: What is compiled: the recipes that test_game.py does not, and a memory that no recipe asks for.
COMPILED: dict[str, list[str]] = {name: [] for name in recipe_names() if name != "dfad"} | {
    "auto": ["prior.balance_momentum=0.9"]
}
#: Of them, what is traced by default: no batch norm, a pool, and classes given to latents. test_game.py traces auto.
TRACED_BY_DEFAULT = ("dfad+", "pool", "nayer")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param(name, overrides, id=name, marks=() if name in TRACED_BY_DEFAULT else pytest.mark.slow)
        for name, overrides in COMPILED.items()
    ],
)
def test_a_recipe_compiles_as_whole_graphs_that_compute_the_same(name: str, overrides: list[str]) -> None:
    torch.manual_seed(0)
    teacher = TracedNetwork().eval().requires_grad_(requires_grad=False)
    # Pixels: a last batch norm is rounded in another way, and the games make much of that.
    small = ["generator.output=pixels", "generator.architecture=scalable"]
    if load_recipe(name).generator.latent_dim == 0:
        small.pop()
    results: dict[str, tuple[list[StepLosses], Tensor]] = {}
    torch.compiler.reset()
    counters.clear()
    for how in ("eager", "compiled"):
        torch.manual_seed(1)
        game = build(name, *small, *overrides, teacher=teacher, student=TracedNetwork())
        if how == "compiled":
            game.compile(backend="aot_eager")
        losses: list[StepLosses] = []
        distill(game, 4, losses.append)
        moved = [*game.players.student.parameters, *game.players.generator.parameters]
        results[how] = losses, torch.cat([parameter.detach().flatten() for parameter in moved])
        game.close()
    # One for each player, one more of the student's before there is anything to replay, and one for echoes.
    replay = load_recipe(name).replay
    assert counters["stats"]["unique_graphs"] == 2 + (0 < replay.share < 1) + (replay.echoes > 0)
    assert not counters["graph_break"]
    for plain, traced in zip(results["eager"][0], results["compiled"][0], strict=True):
        assert float(traced.student_loss) == pytest.approx(float(plain.student_loss), rel=1e-4, nan_ok=True)
        assert float(traced.generator_loss) == pytest.approx(float(plain.generator_loss), rel=1e-4)
        assert traced.terms.keys() == plain.terms.keys()
    # The gradients too, then.
    torch.testing.assert_close(results["compiled"][1], results["eager"][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("num_batch_norms", [0, 5])
def test_a_recipe_fits_the_teacher_it_is_made_for(name: str, num_batch_norms: int) -> None:
    contract = ImageContract((3, 32, 32), 10, mean=(0.5,) * 3, std=(0.2,) * 3)
    recipe = load_recipe(name)
    if num_batch_norms == 0 and name in NEED_BATCH_NORM:
        with pytest.raises(DfadcError, match=f"recipe {name} matches batch-norm statistics") as caught:
            fit_recipe(recipe, contract, num_batch_norms)
        assert caught.value.exit_code == 2
        return
    fitted, _ = fit_recipe(recipe, contract, num_batch_norms)
    # What adapts drops the term that batch norm gives; all others ask for none, or were refused.
    assert (fitted == recipe) is (num_batch_norms > 0 or recipe.prior.batch_norm == 0)


def test_the_recipes_of_the_papers_are_left_alone_by_the_watch() -> None:
    """A reset would be a method of ours in a paper's result."""
    for name in set(recipe_names()) - {"auto", "auto-seg", "dfad+", "pool"}:
        assert load_recipe(name).generator.on_collapse == "warn", name


@pytest.mark.parametrize("name", sorted(RING_ALONE))
def test_without_a_warm_up_a_pool_recipe_would_begin_on_an_empty_ring(name: str) -> None:
    recipe = load_recipe(name, ["student.start=0.0"])
    with pytest.raises(DfadcError, match="begin on an empty ring"):
        fit_recipe(recipe, ImageContract((3, 32, 32), 10, mean=(0.5,) * 3, std=(0.2,) * 3), 5)


def test_the_miniature_changes_no_method() -> None:
    """What the tests above lay over a recipe is its size alone."""
    sizes = {"steps", "batch_size", "generator.latent_dim", "replay.capacity", "replay.reservoir"}
    sizes |= {"student.steps", "generator.steps", "verify.snapshots", "log.interval"}
    changed = {override.partition("=")[0] for override in (*MINIATURE, *SHORT)}
    assert {path for path in changed if not path.startswith("compute.")} == sizes
    assert SMALL_CONTRACT.task == "classification"
