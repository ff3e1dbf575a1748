"""How fast a session is: latency at batch 1 and throughput at a batch. numpy only; the sessions are given.

``Session.run`` hands back the logits in host memory, so every timing ends when the work has.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from exporters.sessions.session import Session

#: Calls before the clock counts, and how long they go on at least: caches fill, clocks rise, kernels are chosen.
_WARM_UP_CALLS = 3
_WARM_UP_SHARE = 0.2
#: However short the time: fewer calls say nothing about a median.
_MIN_CALLS = 5
#: Parts of a measurement that are compared; at most the fewest calls.
_PARTS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """One session's speed.

    Args:
        latency_ms: median over ``calls`` calls with one image.
        latency_p95_ms: 95th percentile of the same.
        calls: how many calls the two are taken over.
        throughput: images a second at ``batch``, from the median call.
        batch: images a call of the throughput.
        device: what computed, as the backend says.
        spread: share by which the medians of equal parts of a measurement differ, of latency or throughput: the larger.
    """

    latency_ms: float
    latency_p95_ms: float
    calls: int
    throughput: float
    batch: int
    device: str
    spread: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def benchmark(session: Session, images: NDArray[np.float32], *, seconds: float) -> Timing:
    """Times a session after warming it up.

    Args:
        session: the network; its ``batch_size`` is what it takes at once.
        images: (N, C, H, W) as the network takes them; N is the batch of the throughput.
        seconds: for each of latency and throughput, warm-up aside.

    Raises:
        DfadcError: there are no images, the time is not positive, or a NaN comes out: that is no network at work.
    """
    if not len(images) or not seconds > 0:
        raise DfadcError(f"nothing to measure: {len(images)} images, {seconds} seconds")
    if not np.isfinite(session.run(images)).all():
        raise DfadcError("the network answers NaN or infinity: its speed means nothing", "dfadc verify says more")
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
    """Largest over smallest median of equal parts of consecutive calls, less 1; on a steady machine about 0."""
    medians = [float(np.median(part)) for part in np.array_split(durations, _PARTS)]
    return max(medians) / min(medians) - 1


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, warmed up first, for about ``seconds`` and at least five calls."""
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
