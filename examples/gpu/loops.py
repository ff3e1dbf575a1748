"""Stage: recipe `dfad` beside the paper's loop written down plainly, as ``examples/benchmark/speed.py`` has both."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from clock import alternate, one_step, record_profile, wait

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmark"))
from speed import PAIRS, Pair, build_run, plain_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from record import Job, Record

PLAIN = "the paper's loop, fp32"
EAGER = {"dfad fp32": ["compute.precision=fp32"], "dfad bf16": ["compute.precision=bf16"]}
COMPILED = {"dfad bf16 compiled": ["compute.precision=bf16", "compute.compile=on"]}
#: Seconds that must be left for a pair to be compiled.
COMPILING_SECONDS = 40


def compare_loops(job: Job, record: Record) -> None:
    """Median step of each variant and its speed as a multiple of the plain loop's, all of them by rounds in turn.

    Compiling comes last: where it takes too long, the stage is ended and keeps what it has.
    """
    record.fact("torch.backends.cudnn.conv.fp32_precision", torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    record.fact("torch.backends.cuda.matmul.fp32_precision", torch.backends.cuda.matmul.fp32_precision)
    pairs = {"mnist": _shrunk(PAIRS["mnist"])} if job.tiny else PAIRS
    for name, pair in pairs.items():
        _compare(name, pair, EAGER, job, record, profiled=True)
    for name, pair in pairs.items():
        if job.tiny or job.seconds_left < COMPILING_SECONDS:
            record.note(f"{name}: no time was left to compile")
        else:
            _compare(name, pair, COMPILED, job, record, profiled=False)


def _shrunk(pair: Pair) -> Pair:
    return pair._replace(batch_size=4, latent_dim=8)


def _compare(
    name: str, pair: Pair, variants: dict[str, list[str]], job: Job, record: Record, *, profiled: bool
) -> None:
    with ExitStack() as runs:
        steps: dict[str, Callable[[], object]] = {PLAIN: plain_step(pair, job.device)}
        for variant, overrides in variants.items():
            steps[variant] = one_step(runs.enter_context(build_run(pair, overrides, job.device)))
        first: dict[str, float] = {}
        for variant, step in steps.items():
            started = time.perf_counter()
            for _ in range(1 if job.tiny else 3):
                step()
            wait(job.device)
            first[variant] = time.perf_counter() - started
        durations = alternate(steps, job.device, rounds=1 if job.tiny else 7, count=1 if job.tiny else 10)
        plain = durations[PLAIN]
        for variant, seconds in durations.items():
            ratios = [one / other for one, other in zip(plain, seconds, strict=True)]
            record.row(
                f"{name}: {pair.teacher} to {pair.student}, batch {pair.batch_size}",
                variant=variant,
                **{
                    "median step, ms": 1e3 * statistics.median(seconds),
                    "fastest, ms": 1e3 * min(seconds),
                    "slowest, ms": 1e3 * max(seconds),
                    "times as fast as the plain loop": f"{statistics.median(ratios):.2f}x",
                    "first steps, s": first[variant],
                },
            )
        for variant, step in steps.items() if profiled else ():
            record_profile(record, f"{name}, {variant}", step, job.device, count=1 if job.tiny else 3)
