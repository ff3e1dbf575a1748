"""Power of `dfadc verify --baseline --max-drop` against a true drop: exact, nothing is simulated.

    python examples/ci/power_curve.py --samples 1024 --plot power.png

A network that truly lost `drop` against its baseline, and whose correctness changed for a share of the samples
(*discordant*: lost or gained), fails with the probability in the table: if it lost more than `--max-drop` on the
samples at hand, and the one-sided exact McNemar test finds p < .05. The first row, no true drop, is the false alarm.

The number of discordant samples is binomial, and of these the number lost is: so the table is a sum over both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from scipy.stats import binom

from dfadc.verification.mcnemar import SIGNIFICANCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

DROPS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05)
DISCORDANT_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)


def fewest_lost(changed: NDArray[np.int64], num_samples: int, max_drop: float) -> NDArray[np.int64]:
    """The fewest lost samples that fail the gate, for each number of discordant ones; more than those: it never fails.

    Args:
        changed: (M,) numbers of discordant samples.
        num_samples: compared.
        max_drop: the gate's limit, in [0, 1].
    """
    # lost - gained > max_drop n, which with gained = changed - lost bounds lost from below; the epsilon is for 0.07 n.
    dropped = np.floor((max_drop * num_samples + changed) / 2 + 1e-9).astype(np.int64) + 1
    # p = P(Binomial(changed, 1/2) <= gained) < .05: the largest such `gained` is one below the lower quantile, or it.
    gained = binom.ppf(SIGNIFICANCE, changed, 0.5).astype(np.int64)
    gained = np.where(binom.cdf(gained, changed, 0.5) < SIGNIFICANCE, gained, gained - 1)
    return np.asarray(np.maximum(dropped, changed - gained))


def power(num_samples: int, drop: float, discordant_share: float, max_drop: float) -> float:
    """Probability that the gate fails; NaN where so few discordant samples cannot make such a drop.

    Args:
        num_samples: compared.
        drop: the true one, in [0, 1].
        discordant_share: probability that a sample is correct on one side alone.
        max_drop: the gate's limit.
    """
    if drop > discordant_share:
        return float("nan")
    changed = np.arange(num_samples + 1)
    share_lost = (1 + drop / discordant_share) / 2
    fails = binom.sf(fewest_lost(changed, num_samples, max_drop) - 1, changed, share_lost)
    return float((binom.pmf(changed, num_samples, discordant_share) * fails).sum())


def draw(num_samples: int, max_drop: float, path: Path) -> None:
    """The probability against the drop, a curve a share of discordant samples."""
    figure, axis = plt.subplots(figsize=(6, 4))
    drops = np.linspace(0, DROPS[-1], 101)
    for share in DISCORDANT_SHARES:
        values = [power(num_samples, drop, share, max_drop) for drop in drops]
        axis.plot(100 * drops, values, label=f"{share:.0%} discordant")
    axis.axvline(100 * max_drop, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("true drop, points")
    axis.set_ylabel("probability that the gate fails")
    axis.set_title(f"{num_samples:,} samples, --max-drop {max_drop:g}", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="compared: those of source prior")
    parser.add_argument("--max-drop", type=float, default=0.01, help="the gate's limit")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    arguments = parser.parse_args()
    mpl.use("Agg")
    print("| true drop, points | " + " | ".join(f"{share:.0%} discordant" for share in DISCORDANT_SHARES) + " |")
    print("|---" * (1 + len(DISCORDANT_SHARES)) + "|")
    for drop in DROPS:
        row = [power(arguments.samples, drop, share, arguments.max_drop) for share in DISCORDANT_SHARES]
        print(f"| {100 * drop:g} | " + " | ".join("" if np.isnan(value) else f"{value:.1%}" for value in row) + " |")
    if arguments.plot is not None:
        draw(arguments.samples, arguments.max_drop, arguments.plot)


if __name__ == "__main__":
    main()
