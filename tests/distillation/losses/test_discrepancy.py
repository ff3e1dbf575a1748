"""Discrepancies against independent NumPy formulas, and their properties."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from dfadc.distillation.losses.discrepancy import (
    DISCREPANCIES,
    Discrepancy,
    agree_kl,
    as_pairs,
    compute_discrepancy,
    kl,
    l1,
    log_l1,
    logit_scale,
    scaled_l1,
)

Logits = npt.NDArray[np.float64]
#: Temperatures below 1 sharpen, above 1 soften; 20 is what pool methods use.
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
SHAPES = ((7, 5), (2, 3), (3, 4, 2, 5))

shapes = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(2, 7)),
    st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
)


def draw(shape: tuple[int, ...], seed: int, scale: float = 4.0) -> Logits:
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def numpy_kl(student: Logits, teacher: Logits, temperature: float) -> float:
    """T² · mean over samples and pixels of Σ_k p_t (log p_t - log p_s), each pixel on its own."""
    student, teacher = (np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]) / temperature for x in (student, teacher))
    pairs = zip(student, teacher, strict=True)
    rows = [special.rel_entr(special.softmax(t), special.softmax(s)).sum() for s, t in pairs]
    return float(np.mean(rows)) * temperature**2


@pytest.mark.parametrize("shape", SHAPES)
def test_l1_is_numpys(shape: tuple[int, ...]) -> None:
    student, teacher = draw(shape, 0), draw(shape, 1)
    expected = np.abs(student - teacher).sum() / student.size
    assert l1(torch.from_numpy(student), torch.from_numpy(teacher)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_l1_is_numpys(shape: tuple[int, ...]) -> None:
    student, teacher = draw(shape, 2), draw(shape, 3)
    expected = np.log(1 + np.abs(student - teacher).mean())
    assert log_l1(torch.from_numpy(student), torch.from_numpy(teacher)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_numpys(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = draw(shape, 4), draw(shape, 5)
    measured = kl(torch.from_numpy(student), torch.from_numpy(teacher), temperature=temperature).item()
    assert measured == pytest.approx(numpy_kl(student, teacher, temperature), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_agree_kl_counts_only_where_both_predict_the_same(shape: tuple[int, ...]) -> None:
    student, teacher = draw(shape, 14), draw(shape, 15)
    flat = [np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]) for x in (student, teacher)]
    # Half of the images, or pixels, agree.
    flat[0][::2, 0] = flat[1][::2, 0] = 20
    rows = [
        special.rel_entr(special.softmax(t), special.softmax(s)).sum() if s.argmax() == t.argmax() else 0.0
        for s, t in zip(*flat, strict=True)
    ]
    assert np.count_nonzero(rows)
    measured = agree_kl(*(torch.from_numpy(x) for x in flat)).item()
    assert measured == pytest.approx(np.mean(rows), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_l1_is_l1_in_units_of_the_teachers_scale(shape: tuple[int, ...]) -> None:
    student, teacher = draw(shape, 16), 100 * draw(shape, 17) + 7
    expected = np.abs(student - teacher).mean() / np.abs(teacher - teacher.mean(axis=1, keepdims=True)).mean()
    assert scaled_l1(torch.from_numpy(student), torch.from_numpy(teacher)).item() == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(shape=shapes, seed=st.integers(0, 999), factor=st.sampled_from([1e-3, 0.1, 50.0, 1e4]))
def test_scaled_l1_does_not_know_the_unit_of_the_logits(shape: tuple[int, ...], seed: int, factor: float) -> None:
    student, teacher = (torch.from_numpy(draw(shape, seed + i)) for i in range(2))
    plain = scaled_l1(student, teacher).item()
    assert scaled_l1(factor * student, factor * teacher).item() == pytest.approx(plain, rel=1e-4)


def test_scaled_l1_does_not_gain_from_faint_logits() -> None:
    """The scale carries no gradient: with the student at 0, shrinking the teacher's logits would raise a ratio."""
    teacher = torch.from_numpy(draw((4, 5), 18)).float().requires_grad_()
    student = torch.zeros(4, 5)
    (gradient,) = torch.autograd.grad(scaled_l1(student, teacher), teacher)
    (plain,) = torch.autograd.grad(l1(student, teacher), teacher)
    torch.testing.assert_close(gradient, plain / logit_scale(teacher.detach()))


def test_kl_looks_from_the_teacher() -> None:
    """The other direction is another number: KL is not symmetric."""
    student, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl(student, teacher).item() == pytest.approx(numpy_kl(student.numpy(), teacher.numpy(), 1.0), rel=1e-6)
    assert kl(student, teacher).item() != pytest.approx(kl(teacher, student).item(), rel=0.1)


def test_kl_gradient_keeps_its_scale_over_temperatures() -> None:
    """For large T the gradient is (s - t) / (N K) whatever T is, once the logits are centred (Hinton et al. 2015)."""
    student, teacher = (torch.from_numpy(draw((6, 5), seed, scale=1.0)).float() for seed in (6, 7))
    student, teacher = (x - x.mean(dim=1, keepdim=True) for x in (student, teacher))
    expected = (student - teacher) / student.numel()
    for temperature in (100.0, 400.0):
        moving = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kl(moving, teacher, temperature=temperature), moving)
        torch.testing.assert_close(gradient, expected, rtol=0.1, atol=2e-3)


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes, seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), scale=st.sampled_from([0.01, 1.0, 30.0])
)
def test_discrepancies_are_zero_for_equals_and_never_negative(
    shape: tuple[int, ...], seeds: tuple[int, int], scale: float
) -> None:
    student, teacher = (torch.from_numpy(draw(shape, seed, scale)).float() for seed in seeds)
    discrepancies: list[Discrepancy] = [
        *DISCREPANCIES.values(),
        partial(kl, temperature=20.0),
    ]
    for discrepancy in discrepancies:
        value = discrepancy(student, teacher).item()
        assert np.isfinite(value)
        # Rounding, times the T² of 400.
        assert value >= -1e-4
        assert discrepancy(teacher, teacher.clone()).item() == pytest.approx(0.0, abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(shape=shapes, seed=st.integers(0, 999), shift=st.floats(-50, 50))
def test_kl_ignores_what_softmax_ignores(shape: tuple[int, ...], seed: int, shift: float) -> None:
    student, teacher = (torch.from_numpy(draw(shape, seed + i)).float() for i in range(2))
    assert kl(student + shift, teacher).item() == pytest.approx(kl(student, teacher).item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", DISCREPANCIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.from_numpy(draw((64, 10), seed)).to(dtype) for seed in (8, 9))
    value = DISCREPANCIES[name](student, teacher)
    assert value.dtype == torch.float32
    expected = DISCREPANCIES[name](student.double().float(), teacher.double().float())
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_kl_of_extreme_logits_is_finite_with_a_finite_gradient() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = kl(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(2e4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("discrepancy", DISCREPANCIES.values())
def test_a_discrepancy_gives_gradients_to_both_players(discrepancy: Discrepancy) -> None:
    """The generator climbs through student and teacher alike."""
    student, teacher = (torch.from_numpy(draw((4, 5), seed)).float() for seed in (10, 11))
    student[0], teacher[0] = (torch.tensor([9.0, float(i), 0, 0, 0]) for i in range(2))  # one image they agree on
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    gradients = torch.autograd.grad(discrepancy(student, teacher), (student, teacher))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_losses_of_labels_are_binary_ones() -> None:
    student, teacher = draw((6, 5), 0), draw((6, 5), 1)
    pairs = [as_pairs(torch.from_numpy(logits)) for logits in (student, teacher)]
    p, q = special.expit(teacher / 2), special.expit(student / 2)
    of_each = special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)
    assert kl(*pairs, temperature=2.0).item() == pytest.approx(4 * of_each.mean(), rel=1e-5)
    expected = np.abs(student - teacher).mean() / np.abs(teacher).mean()
    assert scaled_l1(*pairs).item() == pytest.approx(expected, rel=1e-5)
    same = (student > 0) == (teacher > 0)
    p, q = special.expit(teacher), special.expit(student)
    of_each = special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)
    logits = [torch.from_numpy(logits) for logits in (student, teacher)]
    found = compute_discrepancy("agree_kl", logits[0], logits[1], "multilabel")
    assert found.item() == pytest.approx((of_each * same).mean(), rel=1e-5)
    assert compute_discrepancy("l1", logits[0], logits[1], "multilabel").item() == pytest.approx(l1(*logits).item())
