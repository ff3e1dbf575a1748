"""Remarks on measured speeds: what makes a ratio doubtful, and an INT8 artifact that is slower than its fp32 one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from exporters.benchmark import Timing
    from exporters.manifest import ArtifactRecord

#: Fewer calls than this make no median that a ratio can rest on.
_FEW_CALLS = 20
#: Share by which the medians of a measurement's parts may differ.
_SPREAD = 0.25
#: Part of a core that this process itself adds to the load average before it measures.
_OWN_LOAD = 0.5
#: Times as slow as fp32 an INT8 artifact must be for a remark: smaller differences are noise.
_SLOWER = 1.05


def load_average() -> float | None:
    """Processes that wanted to run over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def doubts(timings: Mapping[str, Timing], *, threads: int, load: float | None) -> Iterator[str]:
    """Why a ratio of these timings may mean little.

    Args:
        timings: network -> its speed.
        threads: CPU threads of each network.
        load: the load average before the first measurement.
    """
    cores = os.cpu_count() or 1
    # One thread on a busy core keeps its median: at a load of 5 on 2 cores a ratio came out within 3 % twelve times of
    # twelve. Of two threads each waits for the other: the same teacher took 0.24 ms or 450 ms, steadily.
    if load is not None and threads > 1 and load - _OWN_LOAD + threads > cores:
        yield (
            f"the machine is busy: load average {load:.1f} on {cores} cores before {threads} threads were measured, "
            "which wait for each other: ratios mean little; take --threads 1 or an idle machine"
        )
    if short := [f"{name} ({timing.calls} calls)" for name, timing in timings.items() if timing.calls < _FEW_CALLS]:
        yield f"too short for a ratio: {', '.join(short)}; measure longer: --seconds"
    if unsteady := [f"{name} ({1 + t.spread:,.1f}x)" for name, t in timings.items() if t.spread > _SPREAD]:
        yield f"unsteady, the slowest part over the fastest: {', '.join(unsteady)}; measure longer, or when idle"


def slower_in_int8(records: Sequence[ArtifactRecord], timings: Mapping[str, Timing]) -> Iterator[str]:
    """INT8 artifacts that are slower than the fp32 artifact of the same exporter."""
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
                "small networks and CPUs without fast integer arithmetic gain size by it, not time"
            )


def _name(record: ArtifactRecord) -> str:
    return record.file.rpartition("/")[2]
