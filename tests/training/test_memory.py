"""Memory: what a run holds stays the same however long it is played, and an update keeps little besides its graph."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from miniature import RESERVOIR, SmallNetwork, build_run
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.loop import distill, update_generator, update_student
from dfadc.distillation.monitor import PROBE_SIZE, Monitor
from dfadc.networks.flops import count_flops
from dfadc.recipe.load import load_recipe
from dfadc.sampling.freeze import collect_calibration, freeze_samples
from dfadc.sampling.generators import train_adversary, train_prior
from dfadc.student.build import build_student
from dfadc.training.budget import Budget
from dfadc.training.cost import estimate
from dfadc.training.memory import ActivationBytes, peak_bytes, resident_tensors, untouched_bytes
from dfadc.training.plan import NetworkFlops

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation

STATM = Path("/proc/self/statm")
needs_proc = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
MEBIBYTE = 2**20
#: Everything that remembers: replay, reservoir, averages, momenta of priors.
REMEMBERING = (
    *("student.steps=1", "batch_size=4", "prior.batch_norm_momentum=0.9"),
    *("replay.balanced=true", "replay.repeats=2", "steps=100000"),
)


def resident_bytes_now() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    # By type: asking an object for its class wakes torch's deprecated ones.
    return sum(issubclass(type(candidate), Tensor) for candidate in gc.get_objects())


def growth(run: Distillation, *, warm_up: int, steps: int) -> tuple[int, int]:
    """Tensors and resident bytes that came to stay between two steps of the run."""
    distill(run, warm_up, lambda _: None)
    tensors, resident = live_tensors(), resident_bytes_now()
    distill(run, warm_up + steps, lambda _: None)
    return live_tensors() - tensors, resident_bytes_now() - resident


@needs_proc
def test_a_run_holds_the_same_after_many_steps() -> None:
    """An update keeps half a megabyte while it lasts: a fiftieth of that, left behind by each, would show."""
    wide = SmallNetwork(width=32)
    run = build_run("auto", *REMEMBERING, "batch_size=32", student=wide)
    activations = ActivationBytes(set())
    with torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor):
        update_student(run, run.student.draw_batch())
    assert activations.peak > 0.4 * MEBIBYTE
    for warm_up in (100, 150):  # what tests before have left behind may come or go meanwhile
        tensors, resident = growth(run, warm_up=warm_up, steps=50)
        if tensors <= 0 and resident < 50 * activations.peak / 50:
            return
    pytest.fail(f"50 steps left {tensors} tensors and {resident} bytes behind")


def test_nothing_holds_more_images_at_once_than_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a look at the run nor what finishes it: at 224 px the probe alone would take gigabytes."""
    monkeypatch.setattr("dfadc.distillation.compute.policy._FREE_VALUES", 0)  # these images are small
    run = build_run("auto", "batch_size=8", "compute.micro_batch=4", "verify.num_samples=64", "steps=40")
    networks = [run.teacher.module, run.state.student.average, run.state.student.module, run.state.generator.average]
    seen: list[int] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(len(inputs[0]))

    for network in networks:
        network.register_forward_pre_hook(count)
    Monitor(run).check(float("nan"))
    assert sum(seen) == 3 * PROBE_SIZE
    prior, adversary = train_prior(run), train_adversary(run)
    for state in (prior, adversary):
        state.generator.average.register_forward_pre_hook(count)
    samples = freeze_samples(run, prior=prior, adversary=adversary)
    collect_calibration(run, prior=prior, exclude=samples)
    assert max(seen) == run.teacher.placement.images_at_once == 4


@needs_proc
@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_steps() -> None:
    tensors, resident = growth(build_run("auto", *REMEMBERING), warm_up=500, steps=9_500)
    assert tensors <= 0  # what tests before have left behind may go meanwhile
    assert resident < 8 * MEBIBYTE


def print_need(recipe: str, teacher: str, student: str, side: str, *rules: str) -> None:
    """The bytes that two rounds of updates keep for their backward passes, and those by which the process grew."""
    torch.set_num_threads(1)
    contract = ImageContract((3, int(side), int(side)), 10, mean=(0.5,) * 3, std=(0.5,) * 3)
    networks = [build_student(name, contract).module for name in (teacher, student)]
    frozen = networks[0].eval().requires_grad_(requires_grad=False)
    run = build_run(recipe, *rules, teacher=frozen, student=networks[1], contract=contract)
    before = resident_bytes_now()
    activations = ActivationBytes({tensor.untyped_storage().data_ptr() for tensor in resident_tensors(run)})
    with torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor):
        for _ in range(2):
            update_student(run, run.student.draw_batch())
            update_generator(run)
    print(activations.peak, peak_bytes(torch.device("cpu")) - before)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        ("auto", "compact_resnet_48", "compact_resnet_20", "64", "batch_size=64"),
        ("dfad", "resnet34_8x", "resnet18_8x", "32", "batch_size=64", "generator.architecture=paper"),
    ],
    ids=["the default", "the paper's networks"],
)
def test_an_update_needs_little_more_than_what_its_graph_keeps(run: tuple[str, ...]) -> None:
    """In a process whose allocator gives back at once what is free: by default it holds half as much again."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])))
    program = "import sys\nfrom test_memory import print_need\nprint_need(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *run]
    environment = {**os.environ, **at_once, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    kept, grown = map(int, done.stdout.split())
    assert kept > 200 * MEBIBYTE, "large enough that libraries do not count"
    assert grown < 1.2 * kept


def test_a_graph_is_counted_once_and_released() -> None:
    activations = ActivationBytes(set())
    values = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor):
        first = (values.exp() * 2).sum()
        second = values.exp().sum()
    # exp keeps its result, 4,000 bytes; a product with a number and a sum keep nothing.
    assert activations.peak == 8000
    del first
    with torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor):
        third = values.exp().sum()
    assert activations.peak == 8000
    del second, third


def test_the_peak_is_the_process_and_the_room_that_fills_later() -> None:
    run = build_run("auto", "replay.capacity=5000")
    assert 5000 * 64 * 2 <= untouched_bytes(run) < 5100 * 64 * 2 + bytes_for_repeats(run)
    # Two steps of six updates, of eight images for the replay buffer, in half precision; the reservoir is full by then.
    twice = build_run("auto", "replay.capacity=5000", "replay.repeats=0")
    assert untouched_bytes(twice, 2) == (12 * 8 + RESERVOIR) * 64 * 2
    cost = estimate(run, Budget(run.recipe.steps))
    assert cost.peak_bytes >= peak_bytes(torch.device("cpu")) > cost.memory_bytes > 0


@pytest.mark.parametrize("recipe", ["dfad", "auto"])
def test_the_arithmetic_of_a_step_is_what_torch_counts(recipe: str) -> None:
    """Within a tenth: the first layer of a network that learns has no gradient to compute for its images."""
    contract = ImageContract((3, 16, 16), 10)
    teacher = WideNetwork().eval().requires_grad_(requires_grad=False)
    few = ("student.hints=0", "replay.repeats=3")
    run = build_run(recipe, *few, teacher=teacher, student=WideNetwork(), contract=contract)
    generator = run.state.generator.module
    counted = ((teacher, (3, 16, 16)), (run.state.student.module, (3, 16, 16)), (generator, (8,)))
    flops = NetworkFlops(*(count_flops(network, size) for network, size in counted))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        distill(run, 1, lambda _: None)
    assert flops.per_step(run.recipe) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_arithmetic_of_the_paper() -> None:
    flops = NetworkFlops(teacher=10, student=5, generator=20)
    # 5 student updates of 20 + 10 + 3 * 5, one generator update of 3 * 20 + 2 * 15, on 256 images.
    assert flops.per_step(load_recipe("dfad")) == 256 * (5 * 45 + 90)
    assert NetworkFlops(teacher=None, student=5, generator=20).per_step(load_recipe("dfad")) is None


def bytes_for_repeats(run: Distillation) -> int:
    return run.state.repeats.images.nbytes + run.state.repeats.logits.nbytes


class WideNetwork(nn.Module):
    """Enough layers that the first one is not all of it."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits
