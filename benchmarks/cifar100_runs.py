"""Stores CIFAR-100 runs in results/cifar100.csv and writes their page and README.md's table from that file.

    python -m benchmarks.cifar100_runs collect RUN... --command "lrds-fast sweep ..."
    python -m benchmarks.cifar100_runs collect RUN... --command "..." --csv benchmarks/results/cifar100_6_epochs.csv
    python -m benchmarks.cifar100_runs page

A row of the CSV has the log of one epoch of a run, so the tables can be computed again from the file. A run replaces
the stored one of its name and seed. README.md has the settings with at least SEEDS seeds. Another CSV has a page of its
own and no table in README.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import csv_text
from lrds_fast.files import write_text
from lrds_fast.provenance import commit as checkout_commit
from lrds_fast.provenance import cpu_name
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.report import paper
from lrds_fast.report.runs import Run, read_run
from lrds_fast.report.tables import markdown_report

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "cifar100.csv"
PAGE = ROOT / "docs" / "benchmarks" / "cifar100.md"
#: Seeds that a setting in README.md has.
SEEDS = 3
BEGIN, END = "<!-- cifar100:begin -->", "<!-- cifar100:end -->"
#: Columns: facts about a run, and values of an epoch from its log. A cell is empty where a run has no such value.
FACTS = ("name", "seed", "epochs", "device", "torch", "commit", "command")
LOGGED = (
    "epoch",
    "step",
    "lr",
    "seconds",
    "rows",
    "train_loss",
    "train_ce",
    "train_kd",
    "n_selected",
    "n_revised",
    "teacher_rows",
    "val_acc",
    "val_ce",
    "test_acc",
    "test_ce",
)


def rows_of(runs: list[Run], commit: str, command: str) -> list[dict[str, Any]]:
    """A row per epoch. ValueError for a run that lacks epochs."""
    rows = []
    for run in runs:
        epochs = run.recipe.schedule.epochs
        if run.last["epoch"] != epochs:
            raise ValueError(f"{run.folder} has {run.last['epoch']} of {epochs} epochs; finish it first")
        facts = {
            "name": run.recipe.name,
            "seed": run.recipe.seed,
            "epochs": epochs,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
            "torch": torch.__version__,
            "commit": commit,
            "command": command,
        }
        rows += [facts | {key: record.get(key, "") for key in LOGGED} for record in run.records]
    return rows


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV, with a header."""
    return csv_text([*FACTS, *LOGGED], rows)


def runs_of(text: str) -> list[Run]:
    """The runs of a stored CSV, in its order."""
    runs: dict[tuple[str, int], Run] = {}
    for row in csv.DictReader(io.StringIO(text)):
        name, seed = row["name"], int(row["seed"])
        recipe = Recipe(name=name, seed=seed).with_values(**{"schedule.epochs": int(row["epochs"])})
        run = runs.setdefault((name, seed), Run(Path(name), recipe, []))
        run.records.append({key: float(row[key]) for key in LOGGED if row[key] != ""})
    return list(runs.values())


def origin(text: str) -> str:
    """One line that says where and how the runs of a stored CSV were made."""
    rows = list(csv.DictReader(io.StringIO(text)))
    lengths = {(row["epochs"], "student" if row["name"].count("/") == 2 else "alone") for row in rows}
    taught = " or ".join(sorted(epochs for epochs, kind in lengths if kind == "student"))
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    first = rows[0]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    place = f"{first['device']}, torch {first['torch']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"Students had {taught} epochs. {place}; {commands}."


def page(text: str, stem: str = "cifar100") -> str:
    """All tables of a stored CSV; differences are to plain KD. stem: of the CSV's name."""
    runs = runs_of(text)
    baseline = next((run.recipe.name for run in runs if run.recipe.name.endswith("/kd")), None)
    body = markdown_report(runs, title="CIFAR-100 distillation runs", baseline=baseline)
    return f"{body}\n{origin(text)} Every epoch: [{stem}.csv](../../benchmarks/results/{stem}.csv).\n"


def with_stored(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows of a stored CSV, without those of the same name and seed, and `rows`."""
    new = {(row["name"], row["seed"]) for row in rows}
    stored = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))) if path.is_file() else []
    return [row for row in stored if (row["name"], int(row["seed"])) not in new] + rows


def readme_with(readme: str, text: str) -> str:
    """README.md with the table in the layout of papers between its marks: networks alone and methods of SEEDS seeds."""
    rows = list(csv.DictReader(io.StringIO(text)))
    seeds = Counter(name for name, _ in {(row["name"], row["seed"]) for row in rows})
    shown = as_csv([row for row in rows if seeds[row["name"]] >= SEEDS or row["name"].count("/") < 2])
    tables = "\n".join(paper.markdown(table) for table in paper.paper_tables(runs_of(shown)))
    block = f"{BEGIN}\n{tables}\n{origin(shown)}\n{END}"
    replaced, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md must have {BEGIN} and {END} once")
    return replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    collect = actions.add_parser("collect", help="run folders into results/cifar100.csv")
    collect.add_argument("runs", type=Path, nargs="+")
    collect.add_argument("--command", required=True, help="the command that made the runs")
    collect.add_argument("--commit", help="the commit that made the runs (default: that of this checkout)")
    for action in (collect, actions.add_parser("page", help="the page and README.md's section, from the CSV")):
        action.add_argument("--csv", type=Path, default=STORED, help="default: results/cifar100.csv")
    options = parser.parse_args()
    if options.action == "collect":
        made_by = options.commit or checkout_commit()
        rows = rows_of([read_run(folder) for folder in options.runs], made_by, options.command)
        write_text(options.csv, as_csv(with_stored(rows, options.csv)))
        print(options.csv)
    text = options.csv.read_text(encoding="utf-8")
    path = PAGE.with_name(f"{options.csv.stem}.md")
    write_text(path, page(text, options.csv.stem))
    if options.csv.stem == STORED.stem:
        readme = ROOT / "README.md"
        write_text(readme, readme_with(readme.read_text(encoding="utf-8"), text))
    print(path)


if __name__ == "__main__":
    main()
