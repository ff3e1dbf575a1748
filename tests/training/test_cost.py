"""The estimate: it costs nothing but time, and what it says has the right size."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import SmallNetwork, build_run
from states import assert_same_state
from torch import Tensor, nn

from dfadc.distillation.loop import distill
from dfadc.errors import DfadcError
from dfadc.recipe.load import change_recipe
from dfadc.training import cost as module_under_test
from dfadc.training.budget import Budget
from dfadc.training.cost import Estimate, estimate, time_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.objectives import GeneratorBatch, GeneratorStep


def estimate_of(run: Distillation, compiles: str, minutes: float | None = None) -> Estimate:
    run.recipe = change_recipe(run.recipe, {"compute.compile": compiles})
    return estimate(run, Budget(run.recipe.steps, minutes))


class Untraceable(nn.Module):
    """A teacher that no compiler takes as one graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # noqa: SLF001
        logits: Tensor = self.network(images)
        return logits


@pytest.fixture
def untraceable() -> nn.Module:
    return Untraceable(SmallNetwork()).eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_an_estimate_leaves_the_state_as_it_was(recipe: str) -> None:
    """Bit by bit, random streams and momentum included: the run after it is the run without it."""
    students = [SmallNetwork(dropout=0.2) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    run, twin = (build_run(recipe, student=student) for student in students)
    for each in (run, twin):
        torch.manual_seed(0)
        distill(each, 1, lambda _: None)
        torch.manual_seed(1)
        if each is run:
            before = copy.deepcopy(run.state.state_dict())
            teacher = copy.deepcopy(run.teacher.module.state_dict())
            estimate_of(run, "off")
            assert_same_state(run.state.state_dict(), before)
            assert_same_state(run.teacher.module.state_dict(), teacher)
        distill(each, 3, lambda _: None)
    assert_same_state(run.state.state_dict(), twin.state.state_dict())


def test_an_estimate_of_a_new_run_leaves_it_new() -> None:
    run = build_run("auto")
    before = copy.deepcopy(run.state.state_dict())
    estimate_of(run, "off")
    assert_same_state(run.state.state_dict(), before)
    assert run.state.step == 0
    assert len(run.state.replay) == len(run.state.reservoir) == 0


def test_a_step_that_fails_is_undone_too() -> None:
    run = build_run("auto")
    before = copy.deepcopy(run.state.state_dict())
    calls = []

    def stumble(batch: GeneratorBatch) -> GeneratorStep:
        calls.append(batch)
        raise RuntimeError("no memory left")

    run.generator.loss = stumble
    with pytest.raises(RuntimeError, match="no memory left"):
        time_steps(run)
    assert len(calls) == 1
    assert_same_state(run.state.state_dict(), before)


def test_memory_grows_with_the_batch_and_covers_the_networks() -> None:
    small, large = (estimate_of(build_run("auto", f"batch_size={size}"), "off") for size in (8, 64))
    run = build_run("auto")
    modules = (run.teacher.module, run.state.student.module, run.state.generator.module)
    resident = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    assert resident < small.memory_bytes < large.memory_bytes
    # The activations grow eightfold; the generator's first layer alone keeps 64 maps of 4 x 4 for each image.
    assert large.memory_bytes - small.memory_bytes > 56 * 64 * 16 * 4


def test_memory_counts_the_replay_buffer() -> None:
    one, many = (estimate_of(build_run("auto", f"replay.capacity={images}"), "off") for images in (100, 10_100))
    assert many.memory_bytes - one.memory_bytes == pytest.approx(10_000 * 64 * 2, rel=0.05)


def test_seconds_are_those_of_a_step() -> None:
    few, many = (estimate_of(build_run("auto", f"student.steps={steps}"), "off") for steps in (1, 30))
    assert 0 < few.seconds_per_step < many.seconds_per_step < 5


def test_a_warm_up_counts_for_the_average_step() -> None:
    """A student that is trained in half of the steps: half of its updates count, the buffer is filled before."""
    alone = ("replay.share=1", "replay.procedural_share=0", "replay.repeats=0")
    rules = (*alone, "generator.latents=noisy", "student.steps=200", "steps=100")
    early, late = (estimate_of(build_run("auto", *rules, f"student.start={start}"), "off") for start in (0.01, 0.9))
    assert 3 * late.seconds_per_step < early.seconds_per_step


def test_what_is_not_worth_compiling_stays_eager_and_says_why() -> None:
    off, auto = (estimate_of(build_run("auto"), wanted) for wanted in ("off", "auto"))
    assert not off.compiled
    assert off.compile_reason == "as asked"
    assert not auto.compiled
    assert "compiling is tried from" in auto.compile_reason


def test_a_time_budget_decides_whether_compiling_is_tried(
    untraceable: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the recipe's steps, which the budget replaces."""
    monkeypatch.setitem(module_under_test.WORTH_COMPILING_SECONDS, "cpu", 120.0)
    long_recipe = build_run("auto", "steps=1000000000")
    assert "compiling is tried from" in estimate_of(long_recipe, "auto", minutes=1).compile_reason
    short_recipe = build_run("auto", "steps=2", "prior.batch_norm=0", teacher=untraceable)
    assert "cannot be compiled" in estimate_of(short_recipe, "auto", minutes=10).compile_reason


def test_training_that_cannot_be_compiled_stays_eager_where_compiling_was_our_choice(
    untraceable: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module_under_test.WORTH_COMPILING_SECONDS, "cpu", 0.0)
    run = build_run("dfad", teacher=untraceable)
    before = copy.deepcopy(run.state.state_dict())
    cost = estimate_of(run, "auto")
    assert not cost.compiled
    assert "cannot be compiled" in cost.compile_reason
    assert cost.seconds_per_step > 0
    assert_same_state(run.state.state_dict(), before)
    distill(run, 1, lambda _: None)


def test_training_that_cannot_be_compiled_is_refused_where_compiling_was_asked_for(untraceable: nn.Module) -> None:
    with pytest.raises(DfadcError, match="cannot be compiled") as caught:
        estimate_of(build_run("dfad", teacher=untraceable), "on")
    assert "--no-compile" in caught.value.hint


def slow_backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiler whose code is slower than none."""

    def run(*inputs: Any) -> Any:
        time.sleep(0.2)
        return graph.forward(*inputs)

    return run


@pytest.mark.parametrize(("wanted", "backend"), [("on", "eager"), ("auto", slow_backend)], ids=["on", "auto"])
def test_a_compiled_step_is_measured_without_the_compilation(
    wanted: str, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is all that is timed here, as of a large run: the first one compiles, and must not be taken for it."""
    monkeypatch.setattr(module_under_test, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setitem(module_under_test.WORTH_COMPILING_SECONDS, "cpu", 0.0)
    run = build_run("dfad", "student.steps=1")
    before = copy.deepcopy(run.state.state_dict())
    # Tracing without generating code is compilation enough, and takes a second instead of a minute.
    monkeypatch.setattr(run, "compile", partial(run.compile, backend))
    torch.compiler.reset()
    started = time.perf_counter()
    cost = estimate_of(run, wanted)
    assert cost.seconds_per_step < (time.perf_counter() - started) / 4
    assert "s a step compiled" in cost.compile_reason
    # Where it was asked for it stays compiled; else only where that is faster.
    assert cost.compiled is (wanted == "on")
    assert (run.student.loss != run.student._loss) is cost.compiled  # noqa: SLF001 -- the eager function
    assert_same_state(run.state.state_dict(), before)


def test_an_estimate_is_plain_values() -> None:
    """It is written into run.json and read back on resume."""
    kinds = {type(value) for value in vars(Estimate(0.5, 100, compiled=False, compile_reason="as asked")).values()}
    assert kinds <= {float, int, bool, str}
