"""Depthwise convolutions in fp32: which ones, that their answers stay what they were, and that nothing is left."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from miniature import SMALL_CONTRACT, build_run
from torch import nn

from dfadc.distillation.compute.cpu_workarounds import Fp32Layers, slow_in_bf16
from dfadc.distillation.compute.policy import choose_policy
from dfadc.distillation.loop import update_generator, update_student
from dfadc.recipe.schema import ComputeSettings

BF16 = choose_policy(ComputeSettings(precision="bf16"), torch.device("cpu"))
STRIDED = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)


def depthwise_network() -> nn.Sequential:
    """Strides like a MobileNet."""
    channels, *_ = SMALL_CONTRACT.input_size
    first = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    last = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(first, copy.deepcopy(STRIDED), last, nn.Linear(8, SMALL_CONTRACT.num_classes))


@pytest.mark.parametrize(
    ("layer", "is_slow"),
    [
        (STRIDED, True),
        (nn.Conv2d(8, 8, 3, dilation=2, groups=8), True),
        (nn.Conv2d(8, 8, 5, groups=8), True),
        (nn.Conv2d(8, 8, (1, 7), groups=8), True),
        (nn.Conv2d(8, 16, 3, groups=8), True),
        (nn.Conv2d(8, 8, 3, groups=8), False),
        (nn.Conv2d(8, 8, 3, stride=2, groups=4), False),
        (nn.Conv2d(1, 8, 3, stride=2), False),
        (nn.Linear(8, 8), False),
    ],
)
def test_depthwise_convolutions_are_slow_but_for_plain_3x3(layer: nn.Module, is_slow: bool) -> None:
    assert len(list(slow_in_bf16(nn.Sequential(nn.ReLU(), layer)))) == is_slow


def test_such_a_layer_computes_in_fp32_and_answers_as_it_is_asked() -> None:
    network = nn.Sequential(copy.deepcopy(STRIDED))
    images = torch.randn(2, 8, 6, 6).bfloat16()
    exact = network(images.float())
    layers = Fp32Layers(network, policy=BF16).__enter__()
    duplicate = copy.deepcopy(network)
    with BF16.autocast():
        answers, of_duplicate = network(images), duplicate(images)
        nn.init.zeros_(duplicate[0].weight)  # type: ignore[arg-type]
        of_changed = duplicate(images)
    assert answers.dtype == torch.bfloat16
    assert torch.equal(answers, exact.bfloat16()), "rounded once, at the end"
    assert torch.equal(of_duplicate, answers)
    assert not torch.equal(of_changed, answers), "a copy has weights of its own"
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    assert len(layers.notes) == 1
    with Fp32Layers(network, policy=BF16):
        pass
    assert "forward" in vars(network[0]), "of a run within a run"
    layers.__exit__()
    assert "forward" not in vars(network[0])
    with BF16.autocast():
        assert network(images.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("policy", [replace(BF16, autocast_dtype=None), replace(BF16, device=torch.device("cuda"))])
def test_nothing_is_done_where_bf16_is_not_slow(policy: object) -> None:
    network = nn.Sequential(copy.deepcopy(STRIDED))
    with Fp32Layers(network, policy=policy) as layers:  # type: ignore[arg-type]
        assert layers.notes == ()
        assert "forward" not in vars(network[0])


def test_a_run_computes_both_networks_so_and_leaves_them_as_they_were() -> None:
    teacher, student = depthwise_network(), depthwise_network()
    teacher.eval().requires_grad_(requires_grad=False)
    run = build_run("auto", "batch_size=4", "compute.precision=bf16", teacher=teacher, student=student)
    changed = [layer for network in (teacher, student) for layer in network.modules() if "forward" in vars(layer)]
    assert changed == [teacher[1], student[1]]
    run.compile(backend="eager")
    assert update_student(run, run.student.draw_batch()).isfinite()
    assert update_generator(run)[0].isfinite()
    run.__exit__()
    assert not any("forward" in vars(layer) for network in (teacher, student) for layer in network.modules())


@pytest.mark.slow  # beside other processes a speed says nothing
@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="the CPU has no bf16 units: runs are in fp32"
)
def test_that_is_faster() -> None:
    network = nn.Sequential(nn.Conv2d(96, 96, 3, stride=2, padding=1, groups=96)).to(memory_format=BF16.memory_format)
    images = torch.randn(32, 96, 28, 28).bfloat16().contiguous(memory_format=BF16.memory_format).requires_grad_()

    def seconds() -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            with BF16.autocast():
                answers = network(images)
            answers.float().sum().backward()
            times.append(time.perf_counter() - started)
        return min(times)

    seconds()
    slow = seconds()
    with Fp32Layers(network, policy=BF16):
        assert 2 * seconds() < slow, "oneDNN has become faster: this module can go"
