"""Benchmark of a session: latency at batch 1 and throughput at a larger batch. Needs numpy only.

``Session.run`` returns the logits in host memory, so every timing ends when the work has ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from exporters.sessions.session import Session

#: Least calls of the warm-up, and its share of the time: caches fill, clocks rise, kernels are chosen.
_WARM_UP_CALLS = 3
_WARM_UP_SHARE = 0.2
#: Least calls, however short the time: fewer give no meaningful median.
_MIN_CALLS = 5
#: Parts of a measurement that are compared; at most ``_MIN_CALLS``.
_PARTS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """Speed of one session.

    Args:
        latency_ms: median over ``calls`` calls with one image.
        latency_p95_ms: 95th percentile of the same.
        calls: number of calls behind the two.
        throughput: images per second at ``batch``, from the median call.
        batch: images per call of the throughput.
        device: the device that computed, as the backend reports it.
        spread: relative difference between the medians of equal parts of a measurement, the larger of latency's and
            throughput's.
    """

    latency_ms: float
    latency_p95_ms: float
    calls: int
    throughput: float
    batch: int
    device: str
    spread: float


def benchmark(session: Session, images: NDArray[np.float32], *, seconds: float) -> Timing:
    """Times a session after warming it up, for ``seconds`` each for latency and throughput.

    images: (N, C, H, W) as the network takes them; N is the batch of the throughput.

    Raises:
        DfadcError: there are no images, the time is not positive, or the logits are not finite.
    """
    if not len(images) or not seconds > 0:
        raise DfadcError(f"nothing to measure: {len(images)} images, {seconds} seconds")
    if not np.isfinite(session.run(images)).all():
        raise DfadcError("the network returns NaN or infinity: its speed means nothing", "dfadc verify shows more")
    single = time_calls(lambda: session.run(images[:1]), seconds)
    whole = time_calls(lambda: session.run(images), seconds)
    return Timing(
        latency_ms=1e3 * float(np.median(single)),
        latency_p95_ms=1e3 * float(np.percentile(single, 95)),
        calls=len(single),
        throughput=len(images) / float(np.median(whole)),
        batch=len(images),
        device=session.device,
        spread=max(spread_of(single), spread_of(whole)),
    )


def spread_of(durations: Sequence[float]) -> float:
    """Largest over smallest median of equal parts of consecutive calls, minus 1; about 0 on a steady machine."""
    medians = [float(np.median(part)) for part in np.array_split(durations, _PARTS)]
    return max(medians) / min(medians) - 1


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Durations in seconds of calls for about ``seconds``, at least five, after a warm-up."""
    started = time.perf_counter()
    warm_up = 0
    while warm_up < _WARM_UP_CALLS or time.perf_counter() - started < _WARM_UP_SHARE * seconds:
        call()
        warm_up += 1
    durations: list[float] = []
    started = time.perf_counter()
    while len(durations) < _MIN_CALLS or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        call()
        durations.append(time.perf_counter() - before)
    return durations
