"""A student that inherits is fitted to its teacher before the first step; with no steps it stays so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from miniature import MINIATURE

from dfadc import load_teacher, plan_distillation, run_distillation
from dfadc.distillation.images.procedural import draw_procedural
from dfadc.errors import DfadcError
from dfadc.networks.network_file import load_network
from dfadc.recipe.load import load_recipe
from dfadc.training import stock
from dfadc.training.build import prepare
from dfadc.training.plan import NetworkFlops
from dfadc.training.stock import LEAST_IMAGES, MOST_FLOPS, MOST_IMAGES, num_images

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dfadc.recipe.schema import Recipe
    from dfadc.teacher.load import Teacher

FEW_SAMPLES = ("verify.num_samples=40", "calibration.num_images=80")
FASHION_MNIST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


@pytest.fixture(scope="module")
def lenet() -> Teacher:
    return load_teacher(FASHION_MNIST / "teacher_lenet5.safetensors")


def short(steps: int) -> Recipe:
    return load_recipe("auto", [*MINIATURE, *FEW_SAMPLES, f"steps={steps}"])


def unseen_images(teacher: Teacher) -> Tensor:
    return draw_procedural(512, teacher.contract, torch.Generator().manual_seed(99))


@torch.no_grad()
def agreement(student: nn.Module, teacher: Teacher) -> float:
    images = unseen_images(teacher)
    agreed = student.eval()(images).argmax(1) == teacher.logits(images, in_fp32=True).argmax(1)
    return float(agreed.float().mean())


def test_fitted_layers_agree_with_the_teacher_far_more_often(lenet: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "MOST_IMAGES", 1000)
    monkeypatch.setattr(stock, "MOST_FLOPS", MOST_FLOPS)
    recipe = short(2)
    fitted = prepare(lenet, "lenet5_half", recipe=recipe, device="cpu")
    assert any("the student's 5 layers are fitted to the teacher's on" in note for note in fitted.notes)
    monkeypatch.setattr("dfadc.training.build.fit_student_", lambda *_: None)
    inherited = prepare(lenet, "lenet5_half", recipe=recipe, device="cpu")
    with_fit, without = (agreement(each.run.state.student.module, lenet) for each in (fitted, inherited))
    assert with_fit > without + 0.15, (with_fit, without)
    average = fitted.run.state.student.average.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in fitted.student.module.state_dict().items())


def test_a_plan_tells_of_the_fit_and_fits_nothing(lenet: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = short(2)
    (note,) = (each for each in prepare(lenet, "lenet5_half", recipe=recipe, device="cpu").notes if "fitted" in each)
    monkeypatch.setattr("dfadc.training.build.fit_student_", lambda *_: pytest.fail("a plan was to be made"))
    assert note in plan_distillation(lenet, "lenet5_half", recipe=recipe, device="cpu").notes


def test_no_steps_leave_the_fitted_student(lenet: Teacher, tmp_path: Path) -> None:
    recipe = short(0)
    run = run_distillation(lenet, "lenet5_half", out=tmp_path / "run", recipe=recipe)
    expected = prepare(lenet, "lenet5_half", recipe=recipe, device="cpu").student.module.state_dict()
    network, *_ = load_network(run.student)
    found = network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert run.record()["status"] == "finished"


def test_no_steps_are_refused_for_a_student_with_nothing_to_start_from(lenet: Teacher, tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="0 steps, and compact_resnet_8 has nothing to start from") as caught:
        run_distillation(lenet, "compact_resnet_8", out=tmp_path / "run", recipe=short(0))
    assert "--steps 100" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flops", "expected"),
    [
        (NetworkFlops(10**6, 10**6, 1), MOST_IMAGES),
        (NetworkFlops(10**8, 10**8, 1), 400),
        (NetworkFlops(10**12, 10**12, 1), LEAST_IMAGES),
        (NetworkFlops(None, None, 1), MOST_IMAGES),
    ],
)
def test_larger_networks_are_fitted_on_fewer_images(
    flops: NetworkFlops, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "MOST_IMAGES", MOST_IMAGES)
    monkeypatch.setattr(stock, "MOST_FLOPS", MOST_FLOPS)
    assert num_images(flops, num_layers=10) == expected
