"""Speed of recipe `dfad` beside the paper's loop written down plainly.

    python examples/benchmark/speed.py mnist cifar

Both play the same game: the paper's networks, generator A, its batch and its five student updates to one of the
generator. The plain loop is what a careful reader of the paper writes: fp32, eager, NCHW, nearest upsampling and a
convolution one after the other, a frozen teacher. They take turns, each in a process of its own, so that a machine
whose speed drifts drifts under both; the ratio is that of each pair. ``--profile`` says instead which operations of
torch take the time of either.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dfadc import ImageContract, load_recipe
from dfadc.distillation.compute.allocator import kept_memory
from dfadc.distillation.compute.policy import choose_policy
from dfadc.distillation.distillation import Distillation
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.state import TrainingState
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.networks.names import build_architecture
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.load import Teacher
from dfadc.training.cost import time_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU = torch.device("cpu")


class Pair(NamedTuple):
    """The paper's setting: networks, images, batch and latents."""

    teacher: str
    student: str
    contract: ImageContract
    batch_size: int
    latent_dim: int


PAIRS = {
    "mnist": Pair("lenet5", "lenet5_half", ImageContract((1, 32, 32), 10, (0.1307,), (0.3081,)), 512, 100),
    "cifar": Pair("resnet34_8x", "resnet18_8x", ImageContract((3, 32, 32), 10, (0.5,) * 3, (0.5,) * 3), 256, 256),
}


def plain_generator(latent_dim: int, channels: int) -> nn.Module:
    """Generator A for 32x32 images (Fang et al. 2019), layer by layer."""
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, 128 * 8 * 8),
        nn.Unflatten(1, (128, 8, 8)),
        nn.BatchNorm2d(128),
    ]
    for wide, narrow in ((128, 128), (128, 64)):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1)]
        layers += [nn.BatchNorm2d(narrow), nn.LeakyReLU(0.2, inplace=True)]
    head = [nn.Conv2d(64, channels, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False)]
    return nn.Sequential(*layers, *head)


def plain_step(pair: Pair, device: torch.device = CPU) -> Callable[[], None]:
    """One step of the paper's algorithm 1, plainly."""
    teacher = build_architecture(pair.teacher, pair.contract).module.eval().requires_grad_(requires_grad=False)
    student = build_architecture(pair.student, pair.contract).module.train()
    generator = plain_generator(pair.latent_dim, pair.contract.channels).train()
    for network in (teacher, student, generator):
        network.to(device)
    move_student = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    move_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def step() -> None:
        for _ in range(5):
            with torch.no_grad():
                images = generator(torch.randn(pair.batch_size, pair.latent_dim, device=device))
                answers = teacher(images)
            move_student.zero_grad()
            functional.l1_loss(student(images), answers).backward()
            move_student.step()
        move_generator.zero_grad()
        images = generator(torch.randn(pair.batch_size, pair.latent_dim, device=device))
        (-functional.l1_loss(student(images), teacher(images))).backward()
        move_generator.step()

    return step


def time_plain(pair: Pair, rounds: int) -> float:
    """Seconds of a step of the plain loop: the best of some, after one that fills caches."""
    step = plain_step(pair)
    step()
    durations = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        durations.append(time.perf_counter() - started)
    return min(durations)


def time_recipe(pair: Pair, overrides: list[str]) -> float:
    """Seconds of a step of recipe `dfad` as `distill` plays it."""
    with kept_memory(CPU), build_run(pair, overrides) as run:
        return time_steps(run)


@contextmanager
def build_run(pair: Pair, overrides: list[str], device: torch.device = CPU) -> Iterator[Distillation]:
    """Recipe `dfad` in the paper's setting, about to start, and compiled where the overrides ask for that."""
    sizes = [f"batch_size={pair.batch_size}", f"generator.latent_dim={pair.latent_dim}"]
    recipe = load_recipe("dfad", [*sizes, *overrides])
    policy = choose_policy(recipe.compute, device)
    teacher = _as_teacher(pair).placed(policy.placement(0))
    student = build_architecture(pair.student, pair.contract).module
    generator = build_generator(recipe.generator, pair.contract)
    state = TrainingState(student, generator, recipe=recipe, contract=pair.contract, policy=policy)
    with Distillation(teacher, [], state, recipe=recipe, policy=policy) as run:
        if recipe.compute.compile == "on":
            run.compile()
        yield run


def _as_teacher(pair: Pair) -> Teacher:
    network = build_architecture(pair.teacher, pair.contract).module
    return as_teacher(network, pair.teacher, pair.contract)


def as_teacher(network: nn.Module, name: str, contract: ImageContract) -> Teacher:
    """A teacher that no file holds."""
    network.eval().requires_grad_(requires_grad=False)
    return Teacher(
        module=network,
        architecture=name,
        contract=contract,
        contract_sources={},
        sha256="",
        kind=FileKind.UNKNOWN,
        norm_layers=(),
        num_parameters=count_parameters(network),
        path=Path(),
    )


def operation_shares(play: Callable[[], object], most: int = 7) -> str:
    """The operations that take most of the time of ``play`` on the CPU, and their shares of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        play()
    operations = sorted(profiler.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in operations)
    return ", ".join(
        f"{each.key.removeprefix('aten::')} {each.self_cpu_time_total / total:.0%}" for each in operations[:most]
    )


def arithmetic_floor(pair: Pair) -> tuple[float, float]:
    """FLOPs of a step as the plain loop computes it, and the measured matmul rate of this machine in FLOP/s."""
    with FlopCounterMode(display=False) as counter:
        plain_generator(pair.latent_dim, pair.contract.channels).eval()(torch.zeros(1, pair.latent_dim))
    generator = counter.get_total_flops()
    teacher, student = (
        count_flops(build_architecture(name, pair.contract).module, pair.contract.input_size) or 0
        for name in (pair.teacher, pair.student)
    )
    # A backward pass costs twice its forward pass where weights move, and once where only images are asked for.
    update = generator + teacher + 3 * student
    turn = 3 * generator + 2 * teacher + 2 * student
    one, other = torch.randn(2, 2048, 2048)
    one @ other
    started = time.perf_counter()
    for _ in range(3):
        one @ other
    rate = 3 * 2 * 2048**3 / (time.perf_counter() - started)
    return pair.batch_size * (5 * update + turn), rate


def main() -> None:
    """Prints the seconds of both, pair by pair, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each of the two")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="recipe field, as for distill")
    parser.add_argument("--profile", action="store_true", help="say which operations take the time")
    parser.add_argument("--only", choices=("plain", "dfad"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        pair = PAIRS[arguments.pairs[0]]
        plays: dict[str, Callable[[], float]] = {
            "plain": lambda: time_plain(pair, 2),
            "dfad": lambda: time_recipe(pair, arguments.overrides),
        }
        play = plays[arguments.only]
        print(operation_shares(play) if arguments.profile else play())
        return
    for name in arguments.pairs:
        if arguments.profile:
            for which in ("plain", "dfad"):
                print(f"{name}, {which}: {_in_a_process(name, which, arguments.overrides, '--profile')}", flush=True)
            continue
        flops, rate = arithmetic_floor(PAIRS[name])
        print(f"{name}: {flops / 1e9:,.0f} GFLOP a step at {rate / 1e9:.0f} GFLOP/s of matmul: {flops / rate:.2f} s")
        ratios = []
        for _ in range(arguments.rounds):
            plain, ours = (float(_in_a_process(name, which, arguments.overrides)) for which in ("plain", "dfad"))
            ratios.append(plain / ours)
            print(f"  plain {plain:.2f} s, dfad {ours:.2f} s a step: {plain / ours:.2f}x", flush=True)
        print(f"  median {statistics.median(ratios):.2f}x")


def _in_a_process(name: str, which: str, overrides: list[str], *options: str) -> str:
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, __file__, name, "--only", which, *settings, *options]
    # As the `dfadc` command sets it for itself.
    environment = {**os.environ, **({"THP_MEM_ALLOC_ENABLE": "1"} if which == "dfad" else {})}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    return done.stdout.strip()


if __name__ == "__main__":
    main()
