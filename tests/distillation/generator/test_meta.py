"""The meta-generator against FastDFKD's algorithm, written down with plain optimizers."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dfadc.distillation.generator.meta import MetaGenerator

BETAS = (0.5, 0.999)
RATE, UPDATES, TURNS = 0.01, 4, 3


def inputs(turn: int, update: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * turn + update))


def play_the_paper(network: nn.Module, kind: str) -> None:
    """FastDFKD's algorithm 1: a fast copy of the meta-generator learns for a turn, then the meta-generator does."""
    outer = torch.optim.Adam(network.parameters(), lr=RATE * UPDATES, betas=BETAS)
    for turn in range(TURNS):
        fast = copy.deepcopy(network)
        inner = torch.optim.Adam(fast.parameters(), lr=RATE, betas=BETAS)
        totals = [torch.zeros_like(parameter) for parameter in fast.parameters()]
        for update in range(UPDATES):
            inner.zero_grad()
            torch.autograd.backward(fast(inputs(turn, update)).square().sum())
            for total, parameter in zip(totals, fast.parameters(), strict=True):
                assert parameter.grad is not None
                total.add_(parameter.grad)
            inner.step()
        for parameter, moved, total in zip(network.parameters(), fast.parameters(), totals, strict=True):
            parameter.grad = total if kind == "fomaml" else (parameter - moved).detach()
        outer.step()


def make(kind: Literal["fomaml", "reptile"]) -> tuple[nn.Module, MetaGenerator]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return network, MetaGenerator(list(network.parameters()), kind, betas=BETAS, updates=UPDATES)


def play(network: nn.Module, meta: MetaGenerator, turns: range) -> None:
    for turn in turns:
        meta.begin_turn()
        inner = torch.optim.Adam(network.parameters(), lr=RATE, betas=BETAS)
        for update in range(UPDATES):
            inner.zero_grad()
            torch.autograd.backward(network(inputs(turn, update)).square().sum())
            inner.step()
            meta.gather(torch.tensor(0.0))
        meta.end_turn(RATE)


@pytest.mark.parametrize("kind", ["fomaml", "reptile"])
def test_it_is_the_papers_algorithm(kind: Literal["fomaml", "reptile"]) -> None:
    network, meta = make(kind)
    reference = copy.deepcopy(network)
    play(network, meta, range(TURNS))
    play_the_paper(reference, kind)
    for weight, expected in zip(meta.weights, reference.parameters(), strict=True):
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["fomaml", "reptile"])
def test_a_turn_begins_from_the_meta_weights(kind: Literal["fomaml", "reptile"]) -> None:
    network, meta = make(kind)
    play(network, meta, range(1))
    moved = [parameter.detach().clone() for parameter in network.parameters()]
    meta.begin_turn()
    for parameter, weight, fast in zip(network.parameters(), meta.weights, moved, strict=True):
        assert torch.equal(parameter, weight)
        assert not torch.equal(parameter, fast)


@pytest.mark.parametrize("kind", ["fomaml", "reptile"])
def test_it_goes_on_from_its_state(kind: Literal["fomaml", "reptile"]) -> None:
    network, meta = make(kind)
    other_network, other = make(kind)
    play(network, meta, range(2))
    other.load_state_dict(copy.deepcopy(meta.state_dict()))
    play(network, meta, range(2, 3))
    play(other_network, other, range(2, 3))
    for weight, expected in zip(other.weights, meta.weights, strict=True):
        assert torch.equal(weight, expected)


def test_a_gradient_that_was_skipped_is_not_learned_from() -> None:
    network, meta = make("fomaml")
    meta.begin_turn()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    meta.gather(torch.tensor(1.0))
    meta.end_turn(RATE)
    assert all(weight.isfinite().all() for weight in meta.weights)
