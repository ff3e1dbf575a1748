"""What the players are paid: the losses, where their gradients lead, and the compiled functions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from miniature import SmallNetwork, build_game
from states import assert_same_state
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfadc.contract import ImageContract
from dfadc.distillation.loop import StepLosses, distill, update_student

if TYPE_CHECKING:
    from dfadc.distillation.objectives import Game

#: Switches every term of the generator off but the discrepancy.
NO_PRIORS = ("prior.batch_norm=0", "prior.one_hot=0", "prior.balance=0", "generator.student_mode=eval")


def started(game: Game, steps: int = 1) -> Game:
    """After a first step the ring holds images to replay."""
    distill(game, steps, lambda _: None)
    return game


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def array(logits: Tensor) -> Any:
    return logits.detach().double().numpy()


# ------------------------------------------------------------------------------------------------ student's side


def test_the_first_batch_is_all_fresh_and_later_ones_replay() -> None:
    game = build_game("auto", "batch_size=10", "replay.share=0.3", "replay.procedural_share=0")
    batch = game.draw_student_batch()
    assert (len(batch.latents), len(batch.replayed)) == (10, 0)
    batch = started(game).draw_student_batch()
    assert (len(batch.latents), len(batch.replayed)) == (7, 3)
    assert batch.replayed.shape[1:] == (1, 8, 8)


def test_the_averaged_generator_draws_its_share() -> None:
    shares = ("replay.share=0.3", "replay.average_share=0.25", "replay.procedural_share=0")
    rules = ("batch_size=10", *shares, "augmentation.mixup=0")
    game = build_game("auto", *rules)
    batch = game.draw_student_batch()
    assert (len(batch.latents), len(batch.average_latents), len(batch.replayed)) == (8, 2, 0)
    batch = started(game, 3).draw_student_batch()
    assert (len(batch.latents), len(batch.average_latents), len(batch.replayed)) == (5, 2, 3)
    _, fresh, _, *_ = game.student_loss(batch)
    generator = game.players.generator
    assert generator.average is not generator.module
    assert not generator.average.training
    with torch.no_grad():
        torch.testing.assert_close(fresh[5:], generator.average(batch.average_latents))
        torch.testing.assert_close(fresh[:5], generator.module(batch.latents))


def test_procedural_images_are_shown_and_remembered_beside_the_generators() -> None:
    game = started(build_game("auto", "replay.procedural_share=0.25"))
    batch = game.draw_student_batch()
    assert (len(batch.latents), len(batch.procedural), len(batch.replayed)) == (2, 2, 4)
    lesson = game.student_loss(batch)
    torch.testing.assert_close(lesson.fresh[2:], batch.procedural)
    seen = game.players.ring.seen
    update_student(game, batch)
    assert game.players.ring.seen == seen + 4
    assert not torch.equal(batch.procedural, game.draw_student_batch().procedural)


def test_a_student_that_lives_from_the_ring_alone_is_shown_nothing_else() -> None:
    game = started(build_game("auto", "replay.share=1", "student.start=0.1"))
    assert len(game.players.ring) == 8
    batch = game.draw_student_batch()
    assert (len(batch.latents), len(batch.replayed)) == (0, 8)
    generator = copy.deepcopy(game.players.generator.module.state_dict())
    _, fresh, _, *_ = game.student_loss(batch)
    assert len(fresh) == 0
    # The generator was not even asked: its statistics saw nothing.
    assert_same_state(game.players.generator.module.state_dict(), generator)


def test_a_known_answer_is_not_asked_for_again() -> None:
    """Neither augmented nor mixed: the teacher sees fresh images alone, and the loss is what it would be."""
    rules = ("augmentation.shift=0", "augmentation.mixup=0", "student.hints=0")
    game = started(build_game("auto", *rules), 2)
    batch = game.draw_student_batch()
    assert batch.answers.shape == (4, 10)
    torch.testing.assert_close(batch.answers, game.teacher(batch.replayed), rtol=1e-2, atol=1e-2)
    asked: list[int] = []
    handle = game.teacher.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    game.players.student.module.eval()
    loss, fresh, answers, *_ = game.student_loss(batch)
    handle.remove()
    assert asked == [4]
    plain, *_ = game.student_loss(batch._replace(answers=batch.answers[:0]))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-2)
    torch.testing.assert_close(answers, game.teacher(fresh))


@pytest.mark.parametrize("change", ["augmentation.shift=1", "augmentation.flip=true", "augmentation.mixup=0.5"])
def test_an_answer_is_asked_for_where_the_image_changed(change: str) -> None:
    game = started(build_game("auto", "replay.balanced=true", "augmentation.shift=0", "augmentation.mixup=0", change))
    assert game.players.ring.keeps_answers
    assert len(game.draw_student_batch().answers) == 0


def test_the_ring_learns_the_classes_of_the_images_before_they_are_mixed() -> None:
    game = started(build_game("auto", "replay.balanced=true", "augmentation.mixup=1"))
    batch = game.draw_student_batch()
    assert float(batch.mixup) < 1
    _, fresh, answers, *_ = game.student_loss(batch)
    torch.testing.assert_close(answers, game.teacher(fresh))


@pytest.mark.parametrize(("batch_size", "share"), [(2, 0.9), (64, 0.999)])
def test_a_batch_always_holds_a_fresh_image(batch_size: int, share: float) -> None:
    game = started(build_game("auto", f"batch_size={batch_size}", f"replay.share={share}"))
    assert len(game.draw_student_batch().latents) == 1
    started(game, 2)


def test_without_replay_every_batch_is_fresh() -> None:
    batch = started(build_game("dfad")).draw_student_batch()
    assert (len(batch.latents), len(batch.replayed)) == (8, 0)
    assert float(batch.mixup) == 1.0


@pytest.mark.parametrize(
    ("overrides", "is_changed"),
    [
        (("augmentation.shift=0", "augmentation.flip=false"), False),
        (("augmentation.shift=2",), True),
        (("augmentation.shift=0", "augmentation.flip=true"), True),
    ],
)
def test_replayed_images_are_shifted_and_flipped_as_asked(overrides: tuple[str, ...], is_changed: bool) -> None:
    game = started(build_game("auto", *overrides))
    stored = game.players.ring.images[: len(game.players.ring)].float()
    replayed = game.draw_student_batch().replayed
    is_stored = [(stored == image).flatten(1).all(dim=1).any().item() for image in replayed]
    assert all(is_stored) is not is_changed


def test_the_students_loss_is_the_weighted_sum_of_l1_and_kl() -> None:
    weights = ("student.l1=0.5", "student.kl=2.0", "student.temperature=3.0", "student.hints=0")
    game = started(build_game("auto", *weights, "augmentation.mixup=0"))
    game.players.student.module.train()
    batch = game.draw_student_batch()
    loss, fresh, _, *_ = game.student_loss(batch)
    images = torch.cat([fresh, batch.replayed])
    student, teacher = array(game.players.student.module(images)), array(game.teacher(images))

    def log_softmax(logits: Any) -> Any:
        return logits / 3 - np.log(np.exp(logits / 3).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    kl = 9 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    assert loss.item() == pytest.approx(0.5 * np.abs(student - teacher).mean() + 2 * kl, rel=1e-4)


def test_the_scaled_l1_is_the_l1_in_units_of_the_teacher() -> None:
    weights = ("student.l1=0", "student.kl=0", "student.scaled_l1=2", "student.hints=0")
    game = build_game("auto", *weights, "augmentation.mixup=0")
    game.players.student.module.eval()
    loss, fresh, _, *_ = game.student_loss(game.draw_student_batch())
    student, teacher = array(game.players.student.module(fresh)), array(game.teacher(fresh))
    scale = np.abs(teacher - teacher.mean(axis=1, keepdims=True)).mean()
    assert loss.item() == pytest.approx(2 * np.abs(student - teacher).mean() / scale, rel=1e-4)


def test_a_mixed_batch_is_what_both_networks_see() -> None:
    game = started(build_game("auto", "student.kl=0", "student.hints=0", "augmentation.mixup=1"))
    game.players.student.module.train()
    batch = game.draw_student_batch()
    assert 0 <= float(batch.mixup) < 1
    loss, fresh, _, *_ = game.student_loss(batch)
    images = torch.cat([fresh, batch.replayed])
    images = batch.mixup * images + (1 - batch.mixup) * images.roll(4, dims=0)
    student, teacher = array(game.players.student.module(images)), array(game.teacher(images))
    assert loss.item() == pytest.approx(np.abs(student - teacher).mean(), rel=1e-4)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_no_graph_leads_from_the_students_loss_to_generator_or_teacher(recipe: str) -> None:
    game = started(build_game(recipe))
    game.teacher.requires_grad_()
    loss, fresh, _, *_ = game.student_loss(game.draw_student_batch())
    assert fresh.grad_fn is None
    assert not fresh.requires_grad
    assert all(gradient is None for gradient in gradients(loss, game.players.generator.module))
    assert all(gradient is None for gradient in gradients(loss, game.teacher))
    assert all(gradient is not None for gradient in gradients(loss, game.players.student.module))


# ---------------------------------------------------------------------------------------------- generator's side


def test_the_generators_loss_is_minus_the_discrepancy_plus_the_weighted_priors() -> None:
    names = ("batch_norm", "one_hot", "balance", "total_variation", "activation", "l2")
    weights = dict(zip(names, (0.5, 2.0, 3.0, 4.0, 1.5, 0.25), strict=True))
    overrides = [f"prior.{name}={weight}" for name, weight in weights.items()]
    game = started(build_game("auto", *overrides, "generator.adversarial=1.5"))
    loss, terms = game.generator_loss(game.draw_generator_batch())
    expected = -1.5 * terms["discrepancy"] + sum(weight * terms[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert set(terms) == {"discrepancy", *weights}
    assert not any(term.requires_grad for term in terms.values())


def test_the_discrepancy_counts_from_its_start() -> None:
    game = build_game("auto", "steps=10", "generator.adversarial=1.5", "generator.adversarial_start=0.25")
    weights = []
    for step in range(5):
        game.players.step = step
        weights.append(float(game.draw_generator_batch().adversarial))
    assert weights == [0, 0, 0, 1.5, 1.5]
    game.players.step = 0
    game.players.student.module.eval()
    loss, terms = game.generator_loss(game.draw_generator_batch())
    assert loss.item() == pytest.approx(float(terms["batch_norm"] + terms["one_hot"] + 5 * terms["balance"]), rel=1e-5)


def test_without_a_discrepancy_the_student_is_not_asked() -> None:
    game = build_game("auto", "generator.adversarial=0")
    asked: list[object] = []
    game.players.student.module.register_forward_pre_hook(lambda *call: asked.append(call))
    _, terms = game.generator_loss(game.draw_generator_batch())
    assert "discrepancy" not in terms
    assert asked == []


def test_given_targets_are_those_of_the_latents() -> None:
    rules = ("replay.share=1", "student.start=0.2", "generator.latents=optimised", "prior.targets=balanced")
    game = build_game("auto", *NO_PRIORS, *rules, "prior.one_hot=1", "batch_size=10", "generator.adversarial=0")
    batch = game.draw_generator_batch()
    assert batch.targets is not None
    assert sorted(batch.targets.tolist()) == list(range(10))
    loss, _ = game.generator_loss(batch)
    assert batch.latents is None
    logits = array(game.teacher(game.players.generator.module(game.players.draw_latents(10))))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_p[np.arange(10), batch.targets.numpy()].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert build_game("auto").draw_generator_batch().targets is None


@pytest.mark.parametrize("discrepancy", ["l1", "log_l1", "kl"])
def test_the_generator_is_paid_for_the_discrepancy_that_the_recipe_names(discrepancy: str) -> None:
    game = build_game("auto", *NO_PRIORS, f"generator.discrepancy={discrepancy}")
    game.players.student.module.eval()
    batch = game.draw_generator_batch()
    assert batch.latents is not None
    loss, terms = game.generator_loss(batch)
    images = game.players.generator.module(batch.latents)
    student, teacher = array(game.players.student.module(images)), array(game.teacher(images))
    l1 = np.abs(student - teacher).mean()
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (teacher, student))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    expected = {"l1": l1, "log_l1": np.log1p(l1), "kl": kl}[discrepancy]
    assert terms["discrepancy"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(-expected, rel=1e-4)


def test_a_term_of_weight_zero_is_not_computed() -> None:
    game = build_game("auto", *NO_PRIORS)
    _, terms = game.generator_loss(game.draw_generator_batch())
    assert set(terms) == {"discrepancy"}
    assert game.priors.matching is None


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_generator_has_a_gradient(recipe: str) -> None:
    game = build_game(recipe)
    loss, _ = game.generator_loss(game.draw_generator_batch())
    found = [gradient for gradient in gradients(loss, game.players.generator.module) if gradient is not None]
    assert len(found) == len(list(game.players.generator.module.parameters()))
    assert all(gradient.isfinite().all() for gradient in found)
    assert sum(float(gradient.abs().sum()) for gradient in found) > 0


@pytest.mark.parametrize("discrepancy", ["l1", "log_l1", "kl"])
def test_the_generator_has_no_gradient_when_the_student_is_the_teacher(discrepancy: str) -> None:
    torch.manual_seed(3)
    teacher, student = SmallNetwork(), SmallNetwork()
    student.load_state_dict(teacher.state_dict())
    teacher.eval().requires_grad_(requires_grad=False)
    overrides = (*NO_PRIORS, f"generator.discrepancy={discrepancy}")
    game = build_game("dfad", *overrides, teacher=teacher, student=student)
    game.players.student.module.eval()
    loss, _ = game.generator_loss(game.draw_generator_batch())
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    for gradient in gradients(loss, game.players.generator.module):
        assert gradient is not None
        assert float(gradient.abs().max()) < 1e-6


def test_each_prior_alone_moves_the_generator() -> None:
    for prior in ("batch_norm", "one_hot", "balance", "total_variation", "activation", "l2"):
        game = build_game("auto", *NO_PRIORS, f"prior.{prior}=1", "generator.adversarial=0")
        loss, _ = game.generator_loss(game.draw_generator_batch())
        found = [gradient for gradient in gradients(loss, game.players.generator.module) if gradient is not None]
        assert sum(float(gradient.abs().sum()) for gradient in found) > 0, prior


def test_what_terms_remember_goes_with_the_players() -> None:
    rules = ("prior.batch_norm_momentum=0.9", "prior.balance_momentum=0.9")
    whole, again = build_game("auto", *rules), build_game("auto", *rules)
    started(whole, 3)
    state = copy.deepcopy(whole.players.state_dict())
    carried = state["carried"]
    assert set(carried) == {"batch_norm", "balance"}
    # It remembers indeed: the averages are those of activations, and the classes are not uniform any more.
    assert all(float(average[1].min()) > 0 for average in carried["batch_norm"]["averages"])
    assert float(carried["balance"]["log_mean"].std()) > 1e-3
    started(whole, 6)
    again.players.load_state_dict(state)
    started(again, 6)
    assert_same_state(again.players.state_dict(), whole.players.state_dict())


def test_close_leaves_no_hook_on_the_teacher() -> None:
    game = build_game("auto", "prior.activation=1", "prior.batch_norm_momentum=0.9")
    game.close()
    assert not any(module._forward_pre_hooks for module in game.teacher.modules())  # noqa: SLF001 -- torch's place


class DenseNetwork(nn.Module):
    """(N, C, H, W) -> logits for each pixel."""

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, num_classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def test_dense_outputs_are_played_for_too() -> None:
    contract = ImageContract((1, 8, 8), 5, task="segmentation")
    torch.manual_seed(0)
    teacher = DenseNetwork(num_classes=5, width=6).eval().requires_grad_(requires_grad=False)
    student = DenseNetwork(num_classes=5, width=3)
    game = build_game("auto", "generator.discrepancy=log_l1", teacher=teacher, student=student, contract=contract)
    losses: list[StepLosses] = []
    distill(game, 2, losses.append)
    assert all(each.student_loss.isfinite() and each.generator_loss.isfinite() for each in losses)
    assert float(game.players.student.skipped) == float(game.players.generator.skipped) == 0
    echo = game.draw_echo_batch()
    assert echo.answers.shape == (len(echo.replayed), 5, 8, 8)
    torch.testing.assert_close(echo.answers, teacher(echo.replayed).detach(), rtol=0.02, atol=0.02)  # stored in fp16


# ------------------------------------------------------------------------------- precision, layout and compiling


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_under_bf16_networks_compute_in_bf16_and_losses_in_fp32(recipe: str) -> None:
    game = started(build_game(recipe, "compute.precision=bf16"))
    seen: list[torch.dtype] = []
    game.players.student.module.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    game.teacher.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    student_loss, fresh, _, *_ = game.student_loss(game.draw_student_batch())
    generator_loss, terms = game.generator_loss(game.draw_generator_batch())
    assert seen == [torch.bfloat16] * 4
    assert fresh.dtype == torch.float32
    assert {value.dtype for value in (student_loss, generator_loss, *terms.values())} == {torch.float32}
    assert {parameter.dtype for parameter in game.players.student.parameters} == {torch.float32}


@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_and_images_have_the_memory_format_asked_for(channels_last: bool) -> None:
    contract = ImageContract((3, 8, 8), 10)
    game = build_game("auto", f"compute.channels_last={str(channels_last).lower()}", contract=contract)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    seen: list[Tensor] = []
    game.players.student.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    game.student_loss(game.draw_student_batch())
    game.generator_loss(game.draw_generator_batch())
    weights = [parameter for parameter in game.players.student.parameters if parameter.dim() == 4]
    assert len(seen) == 2
    assert all(tensor.is_contiguous(memory_format=wanted) for tensor in (*seen, *weights))


class TracedNetwork(nn.Module):
    """As little as there is to trace: compiling takes seconds even so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.0), nn.Flatten())
        self.classifier = nn.Linear(width * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layers(images))
        return logits


@pytest.mark.parametrize(("recipe", "graphs"), [("auto", 4), ("dfad", 2)])
def test_compiled_functions_are_whole_graphs_with_the_same_losses(recipe: str, graphs: int) -> None:
    """One graph a player; others of the student's for its very first batch where later ones replay, and for echoes."""
    torch.manual_seed(0)
    teacher, student = TracedNetwork(6).eval().requires_grad_(requires_grad=False), TracedNetwork(4)
    eager, compiled = (build_game(recipe, teacher=teacher, student=copy.deepcopy(student)) for _ in range(2))
    torch.compiler.reset()
    counters.clear()
    compiled.compile(backend="aot_eager")
    assert (compiled.hints is not None) is (recipe == "auto")
    results: dict[str, list[StepLosses]] = {"eager": [], "compiled": []}
    distill(eager, 3, results["eager"].append)
    distill(compiled, 3, results["compiled"].append)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    for plain, traced in zip(results["eager"], results["compiled"], strict=True):
        assert float(traced.student_loss) == pytest.approx(float(plain.student_loss), rel=1e-4)
        assert float(traced.generator_loss) == pytest.approx(float(plain.generator_loss), rel=1e-4)
        for name, value in plain.terms.items():
            assert float(traced.terms[name]) == pytest.approx(float(value), rel=1e-4), name
    compiled.uncompile()
    assert compiled.student_loss == compiled._student_loss  # noqa: SLF001 -- the eager function
