"""The published power curve, against the gate itself: every outcome of few samples, and dice."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from command_line import run_script

from dfadc.verification.mcnemar import Pairs
from dfadc.verification.regression import BaselineComparison, baseline_checks

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "ci" / "power_curve.py"


def fails(n: int, lost: int, gained: int, max_drop: float) -> bool:
    """What the gate says."""
    comparison = BaselineComparison({"gated": Pairs(n, n - lost - gained, lost, gained)}, accuracy=None)
    return baseline_checks(comparison, max_drop)[0].verdict == "FAIL"


def table(samples: str, max_drop: str) -> dict[str, list[str]]:
    """The printed cells by their row's drop."""
    done = run_script(SCRIPT, "--samples", samples, "--max-drop", max_drop)
    assert done.code == 0, done.err
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines()]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    return table("40", "0.1")


@pytest.mark.parametrize(("column", "share"), [(4, 0.2), (6, 0.4)])
@pytest.mark.parametrize("drop", [0.0, 0.05])
def test_each_cell_sums_over_every_outcome(rows: dict[str, list[str]], column: int, share: float, drop: float) -> None:
    n = 40
    lost_rate, gained_rate = (share + drop) / 2, (share - drop) / 2
    expected = sum(
        math.comb(n, lost)
        * math.comb(n - lost, gained)
        * lost_rate**lost
        * gained_rate**gained
        * (1 - share) ** (n - lost - gained)
        for lost, gained in product(range(n + 1), repeat=2)
        if lost + gained <= n and fails(n, lost, gained, 0.1)
    )
    assert rows[f"{100 * drop:g}"][column] == f"{expected:.1%}"


def test_no_drop_beyond_the_discordant_share(rows: dict[str, list[str]]) -> None:
    assert rows["2"][0] == ""
    assert rows["2"][1] != ""


def test_the_gate_by_dice_at_the_published_setting() -> None:
    """1,024 samples, of which 6% were lost and 4% gained: the README's cell, by an independent simulation."""
    dice = np.random.default_rng(0)
    lost, gained, _ = dice.multinomial(1024, [0.06, 0.04, 0.9], size=2000).T
    failed = np.mean([fails(1024, int(a), int(b), 0.01) for a, b in zip(lost, gained, strict=True)])
    assert float(table("1024", "0.01")["2"][3].rstrip("%")) == pytest.approx(100 * failed, abs=3)
