"""Time of a step, and the share of it in which the GPU computes."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from record import Record

    from dfadc.distillation.distillation import Distillation

#: Kernels and host operations that are named.
_MOST = 8


def wait(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_step(run: Distillation) -> Callable[[], object]:
    """A step of a run as its loop makes it."""
    from dfadc.distillation.loop import distill  # noqa: PLC0415 -- keeps --help quick

    return lambda: distill(run, run.state.step + 1, lambda _: None)


def seconds_of(step: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds of a step: those of ``count`` in a row, after which the device is waited for, over their number."""
    wait(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return (time.perf_counter() - started) / count


def alternate(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, count: int
) -> dict[str, list[float]]:
    """Seconds of a step of each, round by round, so that a clock that drifts drifts under all of them."""
    durations: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            durations[name].append(seconds_of(step, device, count))
    return durations


def record_profile(record: Record, name: str, step: Callable[[], object], device: torch.device, *, count: int) -> None:
    """Records the share of a step's time in kernels, and the kernels and host operations that take most of it.

    The share is the kernels' time under the profiler over the time of a step without it, which the profiler would
    lengthen. Kernels of several streams could overlap; a run has one.
    """
    seconds = statistics.median(seconds_of(step, device, count) for _ in range(3))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        wait(device)
    events = profiler.key_averages()
    kernels = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    kernel_us = sum(each.self_device_time_total for each in kernels)
    on_host = [each for each in events if each.device_type == DeviceType.CPU]
    host_us = sum(each.self_cpu_time_total for each in on_host)
    record.row(
        "Share of a step in kernels",
        step=name,
        **{"step ms": 1e3 * seconds, "kernels ms": kernel_us / count / 1e3},
        share=f"{kernel_us / count / 1e6 / seconds:.0%}" if device.type == "cuda" else "no GPU",
        kernels=sum(each.count for each in kernels) // count,
    )
    for each in sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:_MOST]:
        share = f"{each.self_device_time_total / kernel_us:.0%}"
        record.row(f"Kernels of {name}", share=share, calls=each.count // count, kernel=each.key)
    for each in sorted(on_host, key=lambda operation: -operation.self_cpu_time_total)[:_MOST]:
        share = f"{each.self_cpu_time_total / host_us:.0%}"
        record.row(f"Host operations of {name}", share=share, calls=each.count // count, operation=each.key)
