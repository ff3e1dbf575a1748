"""Objectives of student and generator: losses, their gradients, hooks, and the compiled functions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from miniature import SMALL_CONTRACT, SmallNetwork, build_run
from states import assert_same_state
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfadc.contract import ImageContract
from dfadc.distillation.images.batches import draw_student_batch
from dfadc.distillation.loop import StepLosses, distill, update_student
from dfadc.distillation.state import LEAST_STOCK, TrainingState

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation

#: Switches every term of the generator off but the discrepancy.
#: Latents of balanced classes, whose images reach the student through the replay buffer alone.
POOL = (
    *("replay.share=1", "replay.procedural_share=0", "replay.repeats=0"),
    *("student.start=0.2", "generator.latents=noisy"),
)
NO_PRIORS = ("prior.batch_norm=0", "prior.one_hot=0", "prior.balance=0", "generator.student_mode=eval")


def started(run: Distillation, steps: int = 1) -> Distillation:
    """After a first step the replay buffer holds images to replay."""
    distill(run, steps, lambda _: None)
    return run


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def array(logits: Tensor) -> Any:
    return logits.detach().double().numpy()


# ------------------------------------------------------------------------------------------------ student's side


def test_the_first_batch_is_all_fresh_and_later_ones_replay() -> None:
    run = build_run("auto", "batch_size=10", "replay.share=0.3", "replay.procedural_share=0")
    batch = run.student.draw_batch()
    assert (len(batch.latents), len(batch.replayed)) == (10, 0)
    batch = started(run).student.draw_batch()
    assert (len(batch.latents), len(batch.replayed)) == (7, 3)
    assert batch.replayed.shape[1:] == (1, 8, 8)


def test_procedural_images_are_shown_and_remembered_beside_the_generators() -> None:
    run = started(build_run("auto", "replay.procedural_share=0.25"))
    batch = run.student.draw_batch()
    assert (len(batch.latents), len(batch.procedural), len(batch.replayed)) == (2, 2, 4)
    step = run.student.loss(batch)
    torch.testing.assert_close(step.fresh[2:], batch.procedural)
    seen = run.state.replay.seen
    update_student(run, batch)
    assert run.state.replay.seen == seen + 4
    assert not torch.equal(batch.procedural, run.student.draw_batch().procedural)


def test_a_student_begins_on_procedural_images_alone() -> None:
    run = build_run("auto", "student.start=0.5", "replay.procedural_share=0.25", "steps=4")
    seen = []
    for _ in range(4):
        batch = run.student.draw_batch()
        seen.append((len(batch.latents), len(batch.procedural), len(batch.replayed)))
        distill(run, run.state.step + 1, lambda _: None)
    assert seen == [(0, 8, 0), (0, 8, 0), (2, 2, 4), (2, 2, 4)]
    assert run.recipe.first_update == 0
    assert build_run("auto", "student.start=0.5", "replay.procedural_share=0").recipe.first_update == 0.5


def test_procedural_images_come_from_the_stock_where_it_is_large_enough() -> None:
    stock = torch.full((LEAST_STOCK, 1, 8, 8), 0.25)
    run = build_run("auto", "replay.procedural_share=0.25")
    for images, is_used in ((stock, True), (stock[1:], False)):
        state = TrainingState(
            run.state.student.module,
            run.state.generator.module,
            recipe=run.recipe,
            contract=SMALL_CONTRACT,
            policy=run.policy,
            stock=images,
        )
        drawn = draw_student_batch(state, run.recipe, SMALL_CONTRACT).procedural
        assert len(drawn) == 2
        assert bool((drawn == 0.25).all()) is is_used


def test_a_student_of_replayed_images_alone_sees_nothing_else() -> None:
    run = started(build_run("auto", *POOL))
    assert len(run.state.replay) == 8
    batch = run.student.draw_batch()
    assert (len(batch.latents), len(batch.replayed)) == (0, 8)
    generator = copy.deepcopy(run.state.generator.module.state_dict())
    _, fresh, _, *_ = run.student.loss(batch)
    assert len(fresh) == 0
    # The generator was not even asked: its statistics saw nothing.
    assert_same_state(run.state.generator.module.state_dict(), generator)


def test_replayed_images_are_shifted_so_their_stored_logits_are_not_used() -> None:
    run = started(build_run("auto", "replay.balanced=true", "augmentation.mixup=0"))
    assert run.state.replay.keeps_logits
    batch = run.student.draw_batch()
    assert len(batch.stored_logits) == 0
    stored = run.state.replay.images[: len(run.state.replay)].float()
    is_stored = [(stored == image).flatten(1).all(dim=1).any().item() for image in batch.replayed]
    assert not all(is_stored)


def test_the_buffer_stores_the_classes_of_the_images_before_they_are_mixed() -> None:
    run = started(build_run("auto", "replay.balanced=true", "augmentation.mixup=1"))
    batch = run.student.draw_batch()
    assert float(batch.mixup) < 1
    _, fresh, answers, *_ = run.student.loss(batch)
    torch.testing.assert_close(answers, run.teacher.module(fresh))


@pytest.mark.parametrize(("batch_size", "share"), [(2, 0.9), (64, 0.999)])
def test_a_batch_always_holds_a_fresh_image(batch_size: int, share: float) -> None:
    run = started(build_run("auto", f"batch_size={batch_size}", f"replay.share={share}"))
    assert len(run.student.draw_batch().latents) == 1
    started(run, 2)


def test_without_replay_every_batch_is_fresh() -> None:
    batch = started(build_run("dfad")).student.draw_batch()
    assert (len(batch.latents), len(batch.replayed)) == (8, 0)
    assert float(batch.mixup) == 1.0


def test_the_students_loss_is_the_weighted_sum_of_l1_and_kl() -> None:
    weights = ("student.l1=0.5", "student.kl=2.0", "student.temperature=3.0", "student.hints=0")
    run = started(build_run("auto", *weights, "augmentation.mixup=0"))
    run.state.student.module.train()
    batch = run.student.draw_batch()
    loss, fresh, _, *_ = run.student.loss(batch)
    images = torch.cat([fresh, batch.replayed])
    student, teacher = array(run.state.student.module(images)), array(run.teacher.module(images))

    def log_softmax(logits: Any) -> Any:
        return logits / 3 - np.log(np.exp(logits / 3).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    kl = 9 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    assert loss.item() == pytest.approx(0.5 * np.abs(student - teacher).mean() + 2 * kl, rel=1e-4)


def test_the_scaled_l1_is_the_l1_in_units_of_the_teacher() -> None:
    weights = ("student.l1=0", "student.kl=0", "student.scaled_l1=2", "student.hints=0")
    run = build_run("auto", *weights, "augmentation.mixup=0")
    run.state.student.module.eval()
    loss, fresh, _, *_ = run.student.loss(run.student.draw_batch())
    student, teacher = array(run.state.student.module(fresh)), array(run.teacher.module(fresh))
    scale = np.abs(teacher - teacher.mean(axis=1, keepdims=True)).mean()
    assert loss.item() == pytest.approx(2 * np.abs(student - teacher).mean() / scale, rel=1e-4)


def test_a_mixed_batch_is_what_both_networks_see() -> None:
    run = started(build_run("auto", "student.kl=0", "student.hints=0", "augmentation.mixup=1"))
    run.state.student.module.train()
    batch = run.student.draw_batch()
    assert 0 <= float(batch.mixup) < 1
    loss, fresh, _, *_ = run.student.loss(batch)
    images = torch.cat([fresh, batch.replayed])
    images = batch.mixup * images + (1 - batch.mixup) * images.roll(4, dims=0)
    student, teacher = array(run.state.student.module(images)), array(run.teacher.module(images))
    assert loss.item() == pytest.approx(np.abs(student - teacher).mean(), rel=1e-4)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_no_graph_leads_from_the_students_loss_to_generator_or_teacher(recipe: str) -> None:
    run = started(build_run(recipe))
    run.teacher.module.requires_grad_()
    loss, fresh, _, *_ = run.student.loss(run.student.draw_batch())
    assert fresh.grad_fn is None
    assert not fresh.requires_grad
    assert all(gradient is None for gradient in gradients(loss, run.state.generator.module))
    assert all(gradient is None for gradient in gradients(loss, run.teacher.module))
    assert all(gradient is not None for gradient in gradients(loss, run.state.student.module))


# ---------------------------------------------------------------------------------------------- generator's side


def test_the_generators_loss_is_minus_the_discrepancy_plus_the_weighted_priors() -> None:
    weights = {"batch_norm": 0.5, "one_hot": 2.0, "balance": 3.0}
    overrides = [f"prior.{name}={weight}" for name, weight in weights.items()]
    run = started(build_run("auto", *overrides, adversarial=1.5))
    loss, terms = run.generator.loss(run.generator.draw_batch())
    expected = -1.5 * terms["discrepancy"] + sum(weight * terms[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert set(terms) == {"discrepancy", *weights}
    assert not any(term.requires_grad for term in terms.values())


def test_the_discrepancy_counts_from_its_start() -> None:
    run = build_run("auto", "steps=10", "generator.adversarial_start=0.25", adversarial=1.5)
    weights = []
    for step in range(5):
        run.state.step = step
        weights.append(float(run.generator.draw_batch().adversarial))
    assert weights == [0, 0, 0, 1.5, 1.5]
    run.state.step = 0
    run.state.student.module.eval()
    loss, terms = run.generator.loss(run.generator.draw_batch())
    assert loss.item() == pytest.approx(float(terms["batch_norm"] + terms["one_hot"] + 5 * terms["balance"]), rel=1e-5)


def test_without_a_discrepancy_the_student_does_not_run() -> None:
    run = build_run("auto", adversarial=0.0)
    calls: list[object] = []
    run.state.student.module.register_forward_pre_hook(lambda *call: calls.append(call))
    _, terms = run.generator.loss(run.generator.draw_batch())
    assert "discrepancy" not in terms
    assert calls == []


def test_given_targets_are_those_of_the_latents() -> None:
    run = build_run("auto", *NO_PRIORS, *POOL, "prior.one_hot=1", "batch_size=10", adversarial=0.0)
    batch = run.generator.draw_batch()
    assert batch.targets is not None
    assert sorted(batch.targets.tolist()) == list(range(10))
    loss, _ = run.generator.loss(batch)
    assert batch.latents is None
    logits = array(run.teacher.module(run.state.generator.module(run.state.draw_latents(10))))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_p[np.arange(10), batch.targets.numpy()].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert build_run("auto").generator.draw_batch().targets is None


@pytest.mark.parametrize("discrepancy", ["l1", "log_l1", "agree_kl"])
def test_the_generator_maximises_the_discrepancy_that_the_recipe_names(discrepancy: str) -> None:
    run = build_run("auto", *NO_PRIORS, f"generator.discrepancy={discrepancy}")
    run.state.student.module.eval()
    batch = run.generator.draw_batch()
    assert batch.latents is not None
    loss, terms = run.generator.loss(batch)
    images = run.state.generator.module(batch.latents)
    student, teacher = array(run.state.student.module(images)), array(run.teacher.module(images))
    l1 = np.abs(student - teacher).mean()
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (teacher, student))
    agrees = student.argmax(axis=1) == teacher.argmax(axis=1)
    agree_kl = ((np.exp(log_p) * (log_p - log_q)).sum(axis=1) * agrees).mean()
    expected = {"l1": l1, "log_l1": np.log1p(l1), "agree_kl": agree_kl}[discrepancy]
    assert terms["discrepancy"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(-expected, rel=1e-4)


def test_a_term_of_weight_zero_is_not_computed() -> None:
    run = build_run("auto", *NO_PRIORS)
    _, terms = run.generator.loss(run.generator.draw_batch())
    assert set(terms) == {"discrepancy"}
    assert run.generator.matching is None


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_generator_has_a_gradient(recipe: str) -> None:
    run = build_run(recipe)
    loss, _ = run.generator.loss(run.generator.draw_batch())
    found = [gradient for gradient in gradients(loss, run.state.generator.module) if gradient is not None]
    assert len(found) == len(list(run.state.generator.module.parameters()))
    assert all(gradient.isfinite().all() for gradient in found)
    assert sum(float(gradient.abs().sum()) for gradient in found) > 0


@pytest.mark.parametrize("discrepancy", ["l1", "log_l1", "agree_kl"])
def test_the_generator_has_no_gradient_when_the_student_is_the_teacher(discrepancy: str) -> None:
    torch.manual_seed(3)
    teacher, student = SmallNetwork(), SmallNetwork()
    student.load_state_dict(teacher.state_dict())
    teacher.eval().requires_grad_(requires_grad=False)
    overrides = (*NO_PRIORS, f"generator.discrepancy={discrepancy}")
    run = build_run("dfad", *overrides, teacher=teacher, student=student)
    run.state.student.module.eval()
    loss, _ = run.generator.loss(run.generator.draw_batch())
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    for gradient in gradients(loss, run.state.generator.module):
        assert gradient is not None
        assert float(gradient.abs().max()) < 1e-6


def test_each_prior_alone_moves_the_generator() -> None:
    for prior in ("batch_norm", "one_hot", "balance"):
        run = build_run("auto", *NO_PRIORS, f"prior.{prior}=1", adversarial=0.0)
        loss, _ = run.generator.loss(run.generator.draw_batch())
        found = [gradient for gradient in gradients(loss, run.state.generator.module) if gradient is not None]
        assert sum(float(gradient.abs().sum()) for gradient in found) > 0, prior


def test_the_averages_of_batch_norm_statistics_are_part_of_the_state() -> None:
    whole, again = (build_run("auto", "prior.batch_norm_momentum=0.9") for _ in range(2))
    started(whole, 3)
    state = copy.deepcopy(whole.state.state_dict())
    assert set(state["registered"]) == {"batch_norm"}
    assert all(float(average[1].min()) > 0 for average in state["registered"]["batch_norm"]["averages"])
    started(whole, 6)
    again.state.load_state_dict(state)
    started(again, 6)
    assert_same_state(again.state.state_dict(), whole.state.state_dict())


def hooks_of(module: nn.Module) -> int:
    """Hooks on all layers."""
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in module.modules())  # noqa: SLF001


def test_hooks_are_on_the_networks_within_the_context_alone_also_after_an_error() -> None:
    run = build_run("auto")
    networks = (run.teacher.module, run.state.student.module)
    assert all(map(hooks_of, networks))
    run.__exit__()
    assert not any(map(hooks_of, networks))
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert not any(map(hooks_of, networks))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_an_update_that_fails_leaves_no_values_for_the_next_one(who: str) -> None:
    """The next loss is that of a run in which nothing failed."""
    run = started(build_run("auto"))
    students, generators = run.student.draw_batch(), run.generator.draw_batch()
    run.state.student.module.eval()
    expected = [each.loss.item() for each in (run.student.loss(students), run.generator.loss(generators))]

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    network = run.teacher.module if who == "teacher" else run.state.student.module
    layer = network.get_submodule("features.5")  # behind the layers that hooks look at
    handle = layer.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run.student.loss(students)
    with pytest.raises(ZeroDivisionError):
        run.generator.loss(generators)
    handle.remove()
    assert [each.loss.item() for each in (run.student.loss(students), run.generator.loss(generators))] == expected


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


def test_dense_outputs_are_distilled_too() -> None:
    contract = ImageContract((1, 8, 8), 5, task="segmentation")
    torch.manual_seed(0)
    teacher = DenseNetwork(num_classes=5, width=6).eval().requires_grad_(requires_grad=False)
    student = DenseNetwork(num_classes=5, width=3)
    run = build_run("auto", "generator.discrepancy=log_l1", teacher=teacher, student=student, contract=contract)
    losses: list[StepLosses] = []
    distill(run, 2, losses.append)
    assert all(each.student_loss.isfinite() and each.generator_loss.isfinite() for each in losses)
    assert float(run.state.student.skipped) == float(run.state.generator.skipped) == 0
    repeated = run.student.draw_repeated_batch()
    assert repeated.stored_logits.shape == (len(repeated.replayed), 5, 8, 8)
    torch.testing.assert_close(
        repeated.stored_logits, teacher(repeated.replayed).detach(), rtol=0.02, atol=0.02
    )  # stored in fp16


# ------------------------------------------------------------------------------- precision, layout and compiling


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_under_bf16_networks_compute_in_bf16_and_losses_in_fp32(recipe: str) -> None:
    run = started(build_run(recipe, "compute.precision=bf16"))
    seen: list[torch.dtype] = []
    run.state.student.module.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    run.teacher.module.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    student_loss, fresh, _, *_ = run.student.loss(run.student.draw_batch())
    generator_loss, terms = run.generator.loss(run.generator.draw_batch())
    assert seen == [torch.bfloat16] * 4
    assert fresh.dtype == torch.float32
    assert {value.dtype for value in (student_loss, generator_loss, *terms.values())} == {torch.float32}
    assert {parameter.dtype for parameter in run.state.student.parameters} == {torch.float32}


@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_and_images_have_the_memory_format_asked_for(channels_last: bool) -> None:
    contract = ImageContract((3, 8, 8), 10)
    run = build_run("auto", contract=contract, channels_last=channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    seen: list[Tensor] = []
    run.state.student.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run.student.loss(run.student.draw_batch())
    run.generator.loss(run.generator.draw_batch())
    weights = [parameter for parameter in run.state.student.parameters if parameter.dim() == 4]
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
    """One graph a network; more of the student's for its first batch, where later ones replay, and for repeats."""
    torch.manual_seed(0)
    teacher, student = TracedNetwork(6).eval().requires_grad_(requires_grad=False), TracedNetwork(4)
    eager, compiled = (build_run(recipe, teacher=teacher, student=copy.deepcopy(student)) for _ in range(2))
    torch.compiler.reset()
    counters.clear()
    compiled.compile(backend="aot_eager")
    assert (compiled.student.hints is not None) is (recipe == "auto")
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
    assert compiled.student.loss == compiled.student._loss  # noqa: SLF001 -- the eager function
