"""Remarks on measured speeds: unreliable ratios, and INT8 artifacts that are slower than the fp32 one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from exporters.benchmark import Timing
    from exporters.manifest import ArtifactRecord

#: Fewer calls than this give no reliable median.
_FEW_CALLS = 20
#: Largest relative difference between the medians of a measurement's parts.
_SPREAD = 0.25
#: Share of a core that this process itself adds to the load average before it measures.
_OWN_LOAD = 0.5
#: Slowdown of INT8 against fp32 from which there is a remark: smaller differences are noise.
_SLOWER = 1.05


def load_average() -> float | None:
    """Average number of runnable processes over the last minute; None where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def doubts(timings: Mapping[str, Timing], *, threads: int, load: float | None) -> Iterator[str]:
    """Reasons why ratios of these timings are unreliable; the load average is that before the first measurement."""
    cores = os.cpu_count() or 1
    # The median of one thread on a busy core is stable: at a load of 5 on 2 cores a ratio was within 3 % in twelve of
    # twelve runs. Two threads wait for each other: the same teacher took 0.24 ms or 450 ms, steadily.
    if load is not None and threads > 1 and load - _OWN_LOAD + threads > cores:
        yield (
            f"the machine is busy: load average {load:.1f} on {cores} cores before {threads} threads were measured, "
            "which wait for each other: ratios are unreliable; use --threads 1 or an idle machine"
        )
    if short := [f"{name} ({timing.calls} calls)" for name, timing in timings.items() if timing.calls < _FEW_CALLS]:
        yield f"too few calls for a ratio: {', '.join(short)}; measure longer: --seconds"
    if unsteady := [f"{name} ({1 + t.spread:,.1f}x)" for name, t in timings.items() if t.spread > _SPREAD]:
        yield f"unsteady, the slowest part over the fastest: {', '.join(unsteady)}; measure longer, or when idle"


def slower_in_int8(records: Sequence[ArtifactRecord], timings: Mapping[str, Timing]) -> Iterator[str]:
    """Remarks on INT8 artifacts that are slower than the fp32 artifact of the same exporter."""
    reference = {record.exporter: _name(record) for record in records if record.effective_precision == "fp32"}
    for record in records:
        name, fp32 = _name(record), reference.get(record.exporter, "")
        if record.requested_precision != "int8" or name not in timings or fp32 not in timings:
            continue
        int8, whole = timings[name], timings[fp32]
        factors = {
            "one image": int8.latency_ms / whole.latency_ms,
            f"{int8.batch} images": whole.throughput / int8.throughput,
        }
        if slower := [f"{factor:.1f} times as long for {what}" for what, factor in factors.items() if factor > _SLOWER]:
            yield (
                f"INT8 is slower than fp32 here: {name} takes {' and '.join(slower)} as {fp32}; "
                "for small networks and CPUs without fast integer arithmetic INT8 saves size, not time"
            )


def _name(record: ArtifactRecord) -> str:
    return record.file.rpartition("/")[2]
