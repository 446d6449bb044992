"""What the laboratory's runs say: paired differences with t intervals, tables, a forest plot for each regime, the page.

    python benchmarks/lab_statistics.py             docs/benchmarks/method.md's section and its plots
    python benchmarks/lab_statistics.py --print     the tables alone

Arms are compared within a seed. "tuned KD" is, in each seed, the plain KD whose cross-entropy weight has the lowest
NLL on the held-out slice.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lab_features import REGIMES, STORED, baselines, read_rows, tuned_ce
from benchmarks.lab_students import kd_name
from lrds_fast.train.statistics import Estimate, estimate, paired, two_sided

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "method.md"
BEGIN, END = "<!-- features:begin -->", "<!-- features:end -->"
#: Confirmation runs have seeds from here on; nothing was chosen on them.
FRESH = 100


@functools.cache
def quantile(degrees: int, level: float = 0.05) -> float:
    """t with P(|T| > t) = level, T of Student's distribution; by bisection on two_sided."""
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > level else (low, middle)
    return high


def half_width(found: Estimate, level: float = 0.05) -> float:
    """Half the width of the t interval of this level; inf for one value."""
    return found.error * quantile(found.n - 1, level) if found.n > 1 else math.inf


class Runs:
    """The CSV's rows by regime, arm and seed."""

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self._rows: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for row in rows:
            numbers = {
                key: float(value) if value else math.nan
                for key, value in row.items()
                if key not in ("regime", "arm", "seed", "commit")
            }
            self._rows.setdefault((row["regime"], row["arm"]), {})[int(row["seed"])] = numbers
        names = [kd_name(arm.ce) for arm in baselines() if arm.ce is not None]
        for regime in self.regimes():
            have = [self.of(regime, name) for name in names]
            for seed in set.intersection(*(set(found) for found in have)):
                ce = tuned_ce({name: found[seed]["val_nll"] for name, found in zip(names, have, strict=True)})
                self._rows.setdefault((regime, "tuned"), {})[seed] = self.of(regime, kd_name(ce))[seed]

    def regimes(self) -> list[str]:
        """In the order of REGIMES, those with runs."""
        have = {regime for regime, _ in self._rows}
        return [name for name in REGIMES if name in have] + sorted(have - set(REGIMES))

    def arms(self, regime: str | None = None) -> list[str]:
        """In the order in which they first appear."""
        return list(dict.fromkeys(arm for where, arm in self._rows if regime in (None, where)))

    def of(self, regime: str, arm: str) -> dict[int, dict[str, float]]:
        """By seed; empty where the arm has no runs."""
        return self._rows.get((regime, arm), {})

    def mean(self, regime: str, arm: str, key: str, seeds: range | None = None) -> Estimate:
        return estimate(
            [row[key] for seed, row in sorted(self.of(regime, arm).items()) if seeds is None or seed in seeds]
        )

    def difference(self, regime: str, arm: str, baseline: str, key: str, seeds: range | None = None) -> Estimate:
        """arm - baseline, paired over the seeds that both have."""
        ours, theirs = self.of(regime, arm), self.of(regime, baseline)
        both = [seed for seed in sorted(ours.keys() & theirs.keys()) if seeds is None or seed in seeds]
        return paired([ours[seed][key] for seed in both], [theirs[seed][key] for seed in both])


def signed(found: Estimate, digits: int = 2) -> str:
    """ "+0.71 ± 0.16", the half-width of the 95% interval; in bold where the interval excludes 0."""
    if found.n == 0:
        return "-"
    text = f"{found.mean:+.{digits}f} ± {half_width(found):.{digits}f}"
    return f"**{text}**" if not found.within_noise and found.n > 1 else text


def matrix(
    runs: Runs, arms: Sequence[str], baseline: str, key: str, seeds: range | None = None, digits: int = 2
) -> str:
    """Markdown: a row an arm, a column a regime, paired differences to the baseline."""
    regimes = runs.regimes()
    lines = ["| arm | " + " | ".join(regimes) + " |", "|---" * (len(regimes) + 1) + "|"]
    level = [f"{runs.mean(regime, baseline, key, seeds).mean:.{digits}f}" for regime in regimes]
    lines.append(f"| {baseline} itself | " + " | ".join(level) + " |")
    for arm in arms:
        cells = [signed(runs.difference(regime, arm, baseline, key, seeds), digits) for regime in regimes]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=STORED)
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args()
    runs = Runs(read_rows(options.csv))
    arms = runs.arms()
    for baseline in ("kd", "tuned"):
        for key, digits in (("acc", 2), ("nll", 3)):
            print(f"\n{key} - {baseline}\n")
            print(matrix(runs, arms, baseline, key, digits=digits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
