"""Statistics of lab_features.py's runs: paired differences with t intervals, tables, forest plots, the page.

    python -m benchmarks.lab_statistics             docs/benchmarks/method.md's section and its plots
    python -m benchmarks.lab_statistics --print     the tables alone

Arms are compared within a seed. "tuned KD" is, in each seed, the plain KD whose cross-entropy weight has the lowest
NLL on the held-out slice.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.lab_features import REGIMES, STORED, baselines, tuned_ce
from benchmarks.lab_students import kd_name
from benchmarks.tables import markdown_table, stored_rows
from lrds_fast.pages import charts
from lrds_fast.report.statistics import LEVEL, Estimate, estimate, holm, paired

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "method.md"
BEGIN, END = "<!-- features:begin -->", "<!-- features:end -->"
#: Confirmation runs have seeds from FRESH on; nothing was chosen on them.
FRESH = 100
SEARCH, CONFIRM = range(FRESH), range(FRESH, 10 * FRESH)
#: Regimes in which part of the teacher's answers are foreign or corrupted; the others are mild.
BROKEN = ("foreign", "unseen", "overconfident", "noise")
#: What the plots and the page's tables show, of what has been run; all of it is in the CSV.
SHOWN = (
    "alone",
    "kd_ce0.3",
    "kd_ce1",
    "kd_ce3",
    "tuned",
    "rise",
    "rise0.5",
    "rise_from0.3",
    "fall",
    "lr1_0.8+rise",
    "z2cap+rise",
    "lr1+z2cap+rise",
    "z4harm+rise",
    "lr1+z4harm+rise",
    "match+rise",
    "robust_late+rise",
    "lrT_0.8",
    "lrT_0.95",
    "lr1_0.8",
    "lr1_0.95",
    "below0",
    "z2cap",
    "random_z2cap",
    "z2cap_harmful",
    "z4harm",
    "z2cap_u0.4",
    "ratio0.9",
    "random_ratio0.9",
    "teacher_loss0.9",
    "soft",
    "match",
    "outlier2",
    "outlier3",
    "outlier3_uce",
    "random_outlier3",
    "robust",
    "robust_late",
    "oracle",
    "lrT+below0",
    "lr1+z2cap",
    "lr1+z4harm",
    "lr1_0.95+match",
    "lr1_0.95+outlier3",
    "lr1_0.95+robust",
    "tuned+lr1_0.8",
    "tuned+lr1_0.95",
    "tuned+z2cap",
    "tuned+lr1+z2cap",
    "tuned+soft",
    "tuned+match",
    "tuned+outlier2",
    "tuned+outlier3",
    "tuned+random_outlier3",
    "tuned+robust",
    "tuned+robust_late",
    "tuned+lr1_0.95+outlier3",
    "tuned+oracle",
)


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
            baseline_rows = [self.of(regime, name) for name in names]
            for seed in set.intersection(*(set(by_seed) for by_seed in baseline_rows)):
                ce = tuned_ce(
                    {name: by_seed[seed]["val_nll"] for name, by_seed in zip(names, baseline_rows, strict=True)}
                )
                self._rows.setdefault((regime, "tuned"), {})[seed] = self.of(regime, kd_name(ce))[seed]

    def regimes(self) -> list[str]:
        """The regimes that have runs, in the order of REGIMES."""
        have = {regime for regime, _ in self._rows}
        return [name for name in REGIMES if name in have] + sorted(have - set(REGIMES))

    def arms(self, regime: str | None = None) -> list[str]:
        """The arms in the order of their first rows."""
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
        of_arm, of_baseline = self.of(regime, arm), self.of(regime, baseline)
        both = [seed for seed in sorted(of_arm.keys() & of_baseline.keys()) if seeds is None or seed in seeds]
        return paired([of_arm[seed][key] for seed in both], [of_baseline[seed][key] for seed in both])


#: Seeds that a cell has; one of fewer says how many it has.
FULL = 10


def signed(difference: Estimate, digits: int = 2, p_value: float | None = None) -> str:
    """ "+0.71 ± 0.16", the half-width of the 95% interval; in bold where it excludes 0; " (3)" of 3 seeds.

    p_value: in place of the estimate's own, once corrected for many comparisons.
    """
    if difference.n < 2:
        return "-"
    text = f"{difference.mean:+.{digits}f} ± {difference.half_width:.{digits}f}"
    significant = (difference.p_value if p_value is None else p_value) <= LEVEL
    text = f"**{text}**" if significant else text
    return text if difference.n >= FULL else f"{text} ({difference.n})"


def averaged(runs: Runs, arm: str, baseline: str, key: str, regimes: Sequence[str], seeds: range) -> Estimate:
    """arm - baseline, averaged over the regimes within each seed that has them all, then over the seeds."""
    pairs = [(runs.of(regime, arm), runs.of(regime, baseline)) for regime in regimes]
    if not pairs:
        return estimate([])
    both = set.intersection(*(set(of_arm) & set(of_baseline) for of_arm, of_baseline in pairs)) & set(seeds)
    return estimate(
        [
            sum(of_arm[seed][key] - of_baseline[seed][key] for of_arm, of_baseline in pairs) / len(pairs)
            for seed in sorted(both)
        ]
    )


def matrix(
    runs: Runs, arms: Sequence[str], baseline: str, key: str, seeds: range = SEARCH, corrected: bool = False
) -> str:
    """Markdown: a row an arm, a column a regime, with paired differences to the baseline.

    The first column has their mean over the broken regimes.

    corrected: bold marks the cells that are significant after Holm's correction for the whole table.
    """
    digits = 3 if key == "nll" else 2
    regimes = [regime for regime in runs.regimes() if runs.mean(regime, baseline, key, seeds).n]
    broken = [regime for regime in regimes if regime in BROKEN]
    level = [f"{runs.mean(regime, baseline, key, seeds).mean:.{digits}f}" for regime in regimes]
    body = [[f"{baseline} itself", "", *level]]
    table: dict[str, list[Estimate]] = {}
    for arm in arms:
        differences = [runs.difference(regime, arm, baseline, key, seeds) for regime in regimes]
        if arm != baseline and any(each.n > 1 for each in differences):
            table[arm] = [averaged(runs, arm, baseline, key, broken, seeds), *differences]
    p_values = [each.p_value if each.n > 1 else math.nan for cells in table.values() for each in cells]
    cell_p_values = iter(holm(p_values) if corrected else p_values)
    for arm, cells in table.items():
        body.append([arm, *(signed(each, digits, next(cell_p_values)) for each in cells)])
    return "\n".join(markdown_table(["", "broken regimes", *regimes], body))


#: Settings that a recipe could have by default.
CANDIDATES = (
    "kd",
    "kd_ce0.3",
    "kd_ce1",
    "rise",
    "rise0.5",
    "rise_from0.3",
    "z4harm",
    "lr1_0.8",
    "lr1+z4harm",
    "lr1_0.8+rise",
    "lr1+z4harm+rise",
    "lr1_0.8+rise0.5",
    "robust_late+rise",
    "robust_late+rise0.5",
    "lr1+robust_late+rise",
)


def candidates_table(runs: Runs, seeds: range = CONFIRM) -> str:
    """Markdown: for each of CANDIDATES, accuracy minus plain and tuned KD, and the regimes in which it is worse.

    A regime counts where the 95% interval is below 0.
    """
    header = ["arm"]
    for title in ("KD", "tuned KD"):
        header += [f"broken regimes - {title}", f"mild regimes - {title}", f"worse than {title} in"]
    regimes = runs.regimes()
    groups = [[regime for regime in regimes if (regime in BROKEN) == broken] for broken in (True, False)]
    body = []
    for arm in CANDIDATES:
        cells = [arm]
        for baseline in ("kd", "tuned"):
            if arm == baseline:
                cells += ["", "", ""]
                continue
            each = {regime: runs.difference(regime, arm, baseline, "acc", seeds) for regime in regimes}
            for group in groups:
                have = [regime for regime in group if each[regime].n]
                cells.append(signed(averaged(runs, arm, baseline, "acc", have, seeds)))
            worse = [f"{regime} ({found.mean:.2f})" for regime, found in each.items() if found.interval[1] < 0]
            cells.append(", ".join(worse) or "none")
        body.append(cells)
    return "\n".join(markdown_table(header, body))


# --- The page -------------------------------------------------------------------------------------------------------


#: Far away from the others, which they would flatten.
FAR = ("alone", "kd_ce3", "lrT_0.5")


def plot(runs: Runs, regime: str, path: Path, seeds: range = SEARCH) -> None:
    """A forest plot: each arm's paired differences to plain KD, in accuracy."""
    lines = []
    for arm in SHOWN:
        difference = runs.difference(regime, arm, "kd", "acc", seeds)
        if arm not in FAR and difference.n > 1:
            lines.append(charts.Interval(arm, difference.mean, *difference.interval))
    if not lines:
        raise ValueError(f"{regime} has no two seeds of any arm; a plot needs intervals")
    made = charts.forest_plot({regime: lines}, x_label="accuracy - kd, points")
    charts.save(made, path, f"Paired differences of accuracy to plain KD, {regime}")


def regime_table(runs: Runs, seeds: range = SEARCH) -> str:
    """Markdown: a row a regime, with its data, the share of wrong teacher rows, and accuracies of the baselines."""
    header = [
        "regime",
        "teacher and student",
        "samples",
        "held out",
        "epochs",
        "teacher wrong",
        "alone",
        "KD",
        "tuned KD",
    ]
    body: list[list[object]] = []
    for name in runs.regimes():
        regime = REGIMES[name]
        levels = [f"{runs.mean(name, arm, 'acc', seeds).mean:.2f}" for arm in ("alone", "kd", "tuned")]
        wrong = f"{100 * runs.mean(name, 'kd', 'teacher_wrong', seeds).mean:.0f}%"
        cells: list[object] = [
            name,
            regime.about,
            regime.rows,
            regime.held,
            regime.epochs,
            wrong,
            *levels,
            runs.mean(name, "kd", "acc", seeds).n,
        ]
        body.append(cells)
    return "\n".join(markdown_table([*header, "seeds"], body))


def section(runs: Runs) -> str:
    """The page's part on frozen features."""
    cells = sum(
        runs.difference(regime, arm, "kd", "acc", SEARCH).n > 1
        for regime in runs.regimes()
        for arm in runs.arms(regime)
    )
    count = sum(len(runs.of(regime, arm)) for regime in runs.regimes() for arm in runs.arms(regime) if arm != "tuned")
    parts = [INTRODUCTION.format(count=count, cells=cells), regime_table(runs)]
    for baseline, title in (("kd", "plain KD"), ("tuned", "tuned KD")):
        for key, measure in (("acc", "Accuracy, points"), ("nll", "NLL")):
            parts += [f"### {measure}, minus {title}", matrix(runs, SHOWN, baseline, key)]
    fresh = [arm for arm in runs.arms() if any(runs.mean(regime, arm, "acc", CONFIRM).n for regime in runs.regimes())]
    if fresh:
        parts.append(f"### Confirmation\n\n{CONFIRMATION}")
        for baseline, title in (("kd", "plain KD"), ("tuned", "tuned KD")):
            for key, measure in (("acc", "Accuracy, points"), ("nll", "NLL")):
                parts += [f"{measure}, minus {title}:", matrix(runs, fresh, baseline, key, CONFIRM, corrected=True)]
    parts.append(f"### Which setting is never worse\n\n{RULE}\n\n{candidates_table(runs)}")
    parts += ["### A plot for each regime", *(f"![{name}](method_features_{name}.svg)" for name in runs.regimes())]
    return "\n\n".join(parts)


INTRODUCTION = """## On frozen features

These are {count} paired trainings ([the runs](../../benchmarks/results/method_features.csv),
`benchmarks/lab_features.py`). The students are MLPs on frozen features of CIFAR-100; the teachers are larger MLPs on
richer features. All arms of a seed share the split, the teacher, the initial weights and the order of the samples, and
differences are paired over seeds. ± is the half-width of a 95% t interval, which is bold if it excludes 0; (n) is the
number of seeds where there are fewer than ten. {cells} differences have an interval, and by chance one in twenty
excludes 0. Therefore the arms chosen here were run again on seeds on which nothing was chosen (Confirmation). Such
runs rank ideas cheaply and prove nothing for deep networks.

| arm | what it is |
|---|---|
| kd | plain KD: T = 4, ce_weight 0.1, kd_weight 0.9; kd_ceX has ce_weight X; alone has no teacher |
| tuned, tuned+X | KD, and X, with the ce_weight of 0.1, 0.3, 1 and 3 with which KD has the lowest held-out NLL |
| lrT_E, lr1_E | label revision with eta E: as published, at the divergence's T; at T = 1 |
| swap | on wrong rows, the label and the top class exchange their logits |
| mft | the published form with eta 0.8, and on right rows the label's probability at T rises by 0.2 |
| zN, zNcap | deny the teacher where kd_gain exceeds N standard errors; zNcap to at most 10% of the samples |
| below0 | deny it where kd_gain >= 0 |
| ratioR | keep it for the share R with the lowest kd_gain |
| teacher_correct | keep it where the teacher is right |
| teacher_lossR | keep it for the share R with the lowest cross-entropy of the teacher |
| random_X | keep it for as many random samples as X does |
| X_uW, X_uce | X with ce_weight W for denied samples (instead of 1); with the same ce_weight for all samples |

The other arms are under Variants. Samples are scored after a third of the epochs, with EK-FAC of the last layer; the
standard errors come from 10 folds of the held-out samples."""
CONFIRMATION = """These are seeds from 100 on, on which nothing was chosen. The arms were fixed before these runs,
except robust_late, which was written after robust had also lost in few_short on these seeds. The planned arms that the
search dropped after one to three seeds were run on these seeds last. Here a difference is bold if it is significant at
5% after Holm's correction for all cells of the table."""
RULE = """The rule for a default is that it is in no regime less accurate than plain KD and tuned KD beyond noise, and
best on average in the broken regimes. Means are over the regimes of a seed, then over the fresh seeds; a regime is
listed where the 95% interval, not corrected, is below 0."""


def page_with(page: str, runs: Runs) -> str:
    """The page with its generated part replaced; ValueError where the marks are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} must have {BEGIN} and {END} once")
    return f"{before}{BEGIN}\n{section(runs)}\n{END}{after}"


def render(path: Path, out: Path) -> Path:
    """Writes the plots into `out` and the section into its method.md, a copy of docs/benchmarks/method.md elsewhere."""
    runs = Runs(stored_rows(path))
    for regime in runs.regimes():
        if len([seed for seed in runs.of(regime, "kd") if seed in SEARCH]) > 1:
            plot(runs, regime, out / f"method_features_{regime}.svg")
    page = out / PAGE.name
    page.write_text(page_with(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=STORED)
    parser.add_argument("--print", action="store_true", help="print the tables of all arms and write nothing")
    options = parser.parse_args()
    if not options.print:
        print(render(options.csv, PAGE.parent))
        return 0
    runs = Runs(stored_rows(options.csv))
    for seeds, title in ((SEARCH, "search"), (CONFIRM, "confirmation")):
        for baseline in ("kd", "tuned"):
            for key in ("acc", "nll"):
                print(f"\n{title}: {key} - {baseline}\n\n{matrix(runs, runs.arms(), baseline, key, seeds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
