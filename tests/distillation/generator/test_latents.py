"""Sources of latents: how long they last, what is trained with the generator, and the classes they stand for."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.distillation.generator.latents import FreshLatents, NoisyLayers, balanced_targets, build_latents

SOURCES = ("fresh", "noisy")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(source: str, *, seed: int = 0, latent_dim: int = 6, batch_size: int = 8, num_classes: int = 3) -> FreshLatents:
    return build_latents(source, latent_dim, rng(seed), batch_size=batch_size, num_classes=num_classes)


@pytest.mark.parametrize("source", SOURCES)
def test_latents_last_as_long_as_their_source_says(source: str) -> None:
    latents = make(source)
    first, second = latents.draw(8).clone(), latents.draw(8).clone()
    latents.renew_()
    third = latents.draw(8)
    assert first.shape == third.shape == (8, 6)
    assert torch.equal(first, second) is (source != "fresh")
    assert not torch.equal(second, third)


@pytest.mark.parametrize("source", SOURCES)
def test_a_part_of_a_batch_is_its_beginning(source: str) -> None:
    latents = make(source)
    if source != "fresh":
        whole = latents.draw(8)
        for count in (1, 3, 5, 8):
            torch.testing.assert_close(latents.draw(count), whole[:count])
    assert latents.draw(5).shape == (5, 6)


@pytest.mark.parametrize("source", SOURCES)
def test_only_noisy_layers_are_parameters_with_a_gradient(source: str) -> None:
    latents = make(source)
    moves = source == "noisy"
    assert latents.are_trained is moves
    assert bool(list(latents.parameters())) is moves
    if moves:
        gradients = torch.autograd.grad(latents.draw(8).square().sum(), list(latents.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("source", SOURCES)
def test_latents_go_on_from_their_state(source: str) -> None:
    one, other = make(source), make(source, seed=5)
    one.renew_()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    other.rng.set_state(one.rng.get_state())
    for _ in range(2):
        assert torch.equal(one.draw(8), other.draw(8))
        if one.targets is not None:
            assert other.targets is not None
            assert torch.equal(one.targets, other.targets)
        for each in (one, other):
            each.renew_()


def test_parameters_keep_their_place_when_renewed() -> None:
    """An optimizer and a compiled function know parameters by their identity."""
    latents = make("noisy")
    before = [parameter.data_ptr() for parameter in latents.parameters()]
    latents.renew_()
    assert [parameter.data_ptr() for parameter in latents.parameters()] == before


@pytest.mark.parametrize("source", SOURCES)
def test_latents_have_about_unit_variance(source: str) -> None:
    """A generator of another source's latents finds what it expects."""
    latents = make(source, latent_dim=64, batch_size=400, num_classes=10).draw(400)
    assert latents.mean().item() == pytest.approx(0.0, abs=0.05)
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), num_classes=st.integers(2, 12), seed=st.integers(0, 99))
def test_targets_are_balanced(count: int, num_classes: int, seed: int) -> None:
    targets = balanced_targets(count, num_classes, rng(seed)).tolist()
    assert len(targets) == count
    counts = Counter(targets)
    times = [counts[each] for each in range(num_classes)]
    assert max(times) - min(times) <= 1
    for start in range(0, count - num_classes + 1, num_classes):
        assert sorted(targets[start : start + num_classes]) == list(range(num_classes))


def test_targets_are_those_of_the_step() -> None:
    assert make("fresh").targets is None
    latents = make("noisy", batch_size=30)
    assert latents.targets is not None
    before = latents.targets.clone()
    assert torch.equal(latents.targets, before)
    latents.renew_()
    assert not torch.equal(latents.targets, before)


@pytest.mark.parametrize(("batch_size", "num_classes"), [(8, 3), (9, 3), (2, 5)])
def test_a_noisy_layer_maps_the_embedding_of_the_class(batch_size: int, num_classes: int) -> None:
    latents: Any = make("noisy", batch_size=batch_size, num_classes=num_classes)
    assert isinstance(latents, NoisyLayers)
    with torch.no_grad():
        latents.biases.normal_(generator=rng(3))
    weights, biases = latents.weights.detach().numpy(), latents.biases.detach().numpy()
    embeddings, classes = latents.embeddings.numpy(), latents.classes.numpy()
    expected = [
        embeddings[classes[i]] @ weights[i // num_classes] + biases[i // num_classes, 0] for i in range(batch_size)
    ]
    np.testing.assert_allclose(latents.draw(batch_size).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    # Images of one class come from different layers.
    drawn = latents.draw(batch_size)
    assert len({tuple(row) for row in drawn.tolist()}) == batch_size


def test_embeddings_are_standardised_and_stay() -> None:
    latents: Any = make("noisy", num_classes=20)
    before = latents.embeddings.clone()
    latents.renew_()
    assert torch.equal(latents.embeddings, before)
    torch.testing.assert_close(before.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(before.std(dim=0), torch.ones(6))
