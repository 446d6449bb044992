"""lrds-fast sweep: trains many runs, one after the other.

Finished runs are kept, interrupted runs resume, and a failed run does not stop the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrds_fast.cli.command import FAILED, OK, Subparsers, add_command, add_settings, epoch_printer, shows_progress

if TYPE_CHECKING:
    from lrds_fast.recipe.recipe import Recipe
    from lrds_fast.report.runs import Run


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "sweep",
        run,
        summary="train a list of recipes one after the other; finished runs are kept, interrupted ones resume",
        example="lrds-fast sweep cifar100/resnet56-resnet20/kd cifar100/resnet56-resnet20/kd+lr --seeds 0 1 2\n"
        "  lrds-fast sweep cifar100/resnet56-resnet20/kd+lr+ds --ablation eta --list",
        interrupted_hint="; to continue, run the same command again",
    )
    parser.add_argument(
        "recipes",
        metavar="RECIPE",
        nargs="+",
        help="TOML files or names; @FILE names a file that has one of them per line",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="train each recipe once per seed, in OUT/seedN (default: its own seed)"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="train each recipe once per value, as NAME@KEY=VALUE; several --grid: once per combination",
    )
    parser.add_argument(
        "--ablation", metavar="NAME", help="train a grid of the library: eta, weights, lambdas, ratio or score"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the runs and exit")
    parser.add_argument("--baseline", help="name of the recipe to compare the others with")
    parser.add_argument("--report", type=Path, help="also write an HTML report of all runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    add_settings(parser, "epochs", "device", "out")


def run(options: argparse.Namespace) -> int:
    """Trains all runs, prints the tables and writes the reports; returns FAILED if a run failed."""
    recipes = _recipes(options)
    if options.list:
        print("\n".join(recipe.name for recipe in recipes))
        return OK
    from lrds_fast.pages import charts
    from lrds_fast.report.tables import check_baseline

    # Checked before training: these errors would otherwise appear after it.
    check_baseline(options.baseline, [recipe.name for recipe in recipes])
    if options.report:
        charts.require()
    for key, path in (("--report", options.report), ("--markdown", options.markdown)):
        if path is not None:
            check_writable(path, key, folder=False)
    runs, failures = sweep(
        recipes, seeds=options.seeds, progress=shows_progress(options), say=print, say_epoch=epoch_printer(options)
    )
    if runs:
        # A baseline whose runs all failed is left out.
        baseline = options.baseline if options.baseline in {run.recipe.name for run in runs} else None
        _print_and_write(runs, baseline, report=options.report, markdown=options.markdown)
    for name, reason in failures:
        print(f"lrds-fast: error: {name}: {reason}", file=sys.stderr)
    return FAILED if failures else OK


def _recipes(options: argparse.Namespace) -> list[Recipe]:
    """The recipes of the command line: of each the cells of --ablation, of these the cells of --grid."""
    from lrds_fast.recipe.ablations import ablation, cells, parse_axis
    from lrds_fast.recipe.recipe import load_recipe

    recipes = [load_recipe(source, options.settings) for source in listed(options.recipes)]
    if options.ablation:
        recipes = [cell for recipe in recipes for cell in ablation(options.ablation, recipe)]
    axes = [parse_axis(text) for text in options.grid]
    return [cell for recipe in recipes for cell in cells(recipe, axes)]


def _print_and_write(runs: Sequence[Run], baseline: str | None, *, report: Path | None, markdown: Path | None) -> None:
    from lrds_fast.files import write_text
    from lrds_fast.report.page import html_report
    from lrds_fast.report.tables import markdown_report, printed

    print(f"\n{printed(runs, baseline=baseline)}")
    if report:
        write_text(report, html_report(runs, title="lrds-fast sweep", baseline=baseline))
        print(f"\nreport: {report}")
    if markdown:
        write_text(markdown, markdown_report(runs, title="lrds-fast sweep", baseline=baseline))


def listed(sources: Sequence[str]) -> list[str]:
    """The sources, with @FILE replaced by the lines of that file. Empty lines and comments (#) are left out."""
    from lrds_fast.recipe.recipe import read_text

    expanded = []
    for source in sources:
        if not source.startswith("@"):
            expanded.append(source)
            continue
        lines = read_text(Path(source[1:]), "list").splitlines()
        expanded += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return expanded


def planned(recipes: Sequence[Recipe], seeds: Sequence[int] | None = None) -> list[Recipe]:
    """The runs of a sweep: each recipe as it is, or once per seed in OUT/seedN.

    Raises ValueError where two runs have the same name and seed or the same folder, and where a folder is not writable
    or contains another run, which cannot be resumed.
    """
    runs = (
        list(recipes)
        if seeds is None
        else [
            recipe.with_values(seed=seed, **{"run.out": str(recipe.out / f"seed{seed}")})
            for recipe in recipes
            for seed in seeds
        ]
    )
    titles: set[str] = set()
    folders: dict[Path, str] = {}
    for recipe in runs:
        title = _title(recipe)
        if title in titles:
            raise ValueError(f"{title} is given twice; give each recipe and each seed once")
        titles.add(title)
        folder = recipe.out.resolve()
        if folder in folders:
            raise ValueError(
                f"run.out must differ between runs; {folders[folder]} and {title} have {recipe.out}: leave it out to"
                " write to runs/NAME"
            )
        folders[folder] = title
        if not (recipe.out.is_dir() and _is_finished(recipe)):  # a finished run is only read
            check_writable(recipe.out, "run.out")
    for recipe in runs:
        _check_earlier_run(recipe)
    return runs


def check_writable(path: Path, key: str, *, folder: bool = True) -> None:
    """ValueError, naming `key`, unless `path` is or can become a writable folder, or with folder=False a file."""
    if path.exists() and path.is_dir() != folder:
        kind, other = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(f"{key}: {path} must be a {kind}; it is a {other}: choose another path")
    wanted = (path if folder else path.parent).absolute()
    existing = next(parent for parent in (wanted, *wanted.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{key}: {path} cannot be written: {existing} is not a writable folder")


def _check_earlier_run(recipe: Recipe) -> None:
    """ValueError where the recipe's folder has a checkpoint of another run, which cannot be resumed."""
    from lrds_fast.train.folder import CHECKPOINT, RECIPE, identity, read_recipe

    if not (recipe.out / RECIPE).is_file() or not (recipe.out / CHECKPOINT).is_file():
        return
    before = identity(read_recipe(recipe.out), "", None)
    for key, value in identity(recipe, "", None).items():
        if before[key] != value:
            raise ValueError(
                f"{recipe.out} contains another run, with {key} {before[key]}; {_title(recipe)} has {value}: set"
                " another run.out, or move the older run away"
            )


def _title(recipe: Recipe) -> str:
    return f"{recipe.name}, seed {recipe.seed}"


def sweep(
    recipes: Sequence[Recipe],
    *,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    say: Callable[[str], object] = print,
    say_epoch: Callable[[str], object] | None = None,
) -> tuple[list[Run], list[tuple[str, str]]]:
    """Trains planned(recipes, seeds) and returns (finished runs, (name, reason) of failed ones).

    Finished runs are kept; the others resume from their last checkpoint. say is called with a line per run, say_epoch
    with a line per epoch. Raises the errors of planned() before the first run. Errors of a single run are not raised:
    they are returned.
    """
    from lrds_fast.report.runs import read_run
    from lrds_fast.train.run import fit

    runs = planned(recipes, seeds)
    failures = []
    finished = []
    for number, recipe in enumerate(runs, start=1):
        title = _title(recipe)
        count = f"[{number}/{len(runs)}]"
        if _is_finished(recipe):
            say(f"{count} {title}: finished already, in {recipe.out}")
        else:
            try:
                prefixed = _prefixed(say_epoch, f"{count} seed {recipe.seed}, ")
                fit(recipe, resume=True, progress=progress, say=prefixed)
            except (ValueError, TypeError, ArithmeticError, OSError, ImportError, RuntimeError) as error:
                failures.append((title, " ".join(str(error).split())))
                say(f"{count} {title}: failed: {failures[-1][1]}")
                continue
            say(f"{count} {title}: test accuracy {read_run(recipe.out).last['test_acc']:.2%}, in {recipe.out}")
        finished.append(read_run(recipe.out))
    return finished, failures


def _prefixed(say: Callable[[str], object] | None, prefix: str) -> Callable[[str], object] | None:
    return None if say is None else lambda line: say(prefix + line)


def _is_finished(recipe: Recipe) -> bool:
    """Whether the recipe's folder contains its run with all epochs, of the teacher that teacher.checkpoint has now."""
    from lrds_fast.report.runs import read_run
    from lrds_fast.train.setup import resolved

    try:
        stored = read_run(recipe.out)
    except (FileNotFoundError, ValueError):
        return False
    same = resolved(stored.recipe.with_values(**{"run.out": recipe.run.out})) == resolved(recipe)
    return same and stored.last["epoch"] == recipe.schedule.epochs and _has_its_teacher(recipe)


def _has_its_teacher(recipe: Recipe) -> bool:
    """Whether teacher.checkpoint has the weights that taught the finished run; True where either cannot be read."""
    from lrds_fast import models
    from lrds_fast.models.student import Description
    from lrds_fast.models.weights import load_weights
    from lrds_fast.train.cache import weights_sha256
    from lrds_fast.train.checkpoint import teacher_sha256
    from lrds_fast.train.folder import CHECKPOINT

    options = recipe.teacher
    try:
        before = teacher_sha256(recipe.out / CHECKPOINT)
        if before is None:
            return True
        teacher = models.create(options.model, num_classes=len(Description.read(recipe.out).class_names))
        load_weights(
            teacher, Path(options.checkpoint), key="teacher.checkpoint", weights=options.weights, announce=False
        )
    except (OSError, ValueError, ImportError):
        return True
    return weights_sha256(teacher) == before
