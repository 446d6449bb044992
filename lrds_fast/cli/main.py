"""The command line: lrds-fast, also python -m lrds_fast."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lrds_fast import _build
from lrds_fast._version import __version__

#: Exit codes: done; could not be done (training diverged, disk full, ...); the request itself is wrong; interrupted.
#: Training that a signal stopped after its checkpoint ends with 128 + the signal's number, as shells have it.
OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

_RESUME = "; to resume from the last checkpoint, run the same command with --resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Mistakes are one line on stderr, with --debug also the traceback."""
    from lrds_fast.train.notes import open_streams
    from lrds_fast.train.stopping import Stopped

    open_streams()
    options = argparse.Namespace(debug=False, again="")
    try:
        options = _parsed(list(sys.argv[1:] if argv is None else argv))
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        print(f"lrds-fast: {stopped}{options.again}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"lrds-fast: interrupted{options.again}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough (| head); nothing more can be written there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError, ImportError) as error:
        if options.debug:
            import traceback

            traceback.print_exc()
        print(f"lrds-fast: error: {_one_line(error)}", file=sys.stderr)
        wrong_request = isinstance(error, (ValueError, TypeError, FileNotFoundError, FileExistsError))
        return MISUSED if wrong_request else FAILED


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"lrds-fast: error: {message} (see {self.prog} --help)\n")


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The parsed arguments. A wrong argument ends the program with one line that names the nearest valid one."""
    parser, commands = _parser()
    first = arguments[0] if arguments else ""
    if first and not first.startswith("-") and first not in commands:
        near = difflib.get_close_matches(first, commands, n=1)
        parser.error(f"there is no command {first!r}; {_instead(near, commands)}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        sub: argparse.ArgumentParser = options.parser
        sub.error(_unknown(unknown[0], has_settings="settings" in options))
    return options


def _instead(near: Sequence[str], all_of_them: Sequence[str]) -> str:
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(all_of_them)}"


def _unknown(argument: str, *, has_settings: bool) -> str:
    """The error for an unknown argument; for --epochs it names the recipe key schedule.epochs."""
    from lrds_fast.recipe.recipe import all_keys

    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    keys = [key for key in all_keys() if key == name or key.endswith(f".{name}")]
    if not has_settings or not argument.startswith("--") or not keys:
        return f"unknown argument {argument}"
    ways = " or ".join(f"--set {key}=..." for key in keys)
    return f"unknown argument {argument}; a recipe's values are set with --set KEY=VALUE: {ways}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the free space"
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return _build.problem() or str(error)
    text = " ".join(str(error).split())
    return text or f"{type(error).__name__} without a message; --debug shows where"


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser and the names of the commands."""
    parser = _Parser(
        prog="lrds-fast",
        description="Knowledge distillation with label revision (LR) and data selection (DS).",
        epilog="Start with: lrds-fast demo",
    )
    parser.add_argument("--version", action="version", version=f"lrds-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], summary: str, example: str, again: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command, parser=sub, again=again)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    def add_recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", metavar="RECIPE", help="a TOML file, or a name that `lrds-fast recipes` lists")
        add_settings(sub)

    def add_settings(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="settings",
            help="override a value of the recipe",
        )
        sub.add_argument("--quiet", action="store_true", help="no progress bar")

    sub = add(
        "demo",
        _demo,
        "few labels and a teacher that errs: the student alone, KD, KD+LR, KD+DS, KD+LR+DS: a table and a report",
        "lrds-fast demo --out runs/demo",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder to write to (default: %(default)s)",
    )
    sub.add_argument("--seeds", type=int, default=8, help="repetitions (default: %(default)s)")
    add_settings(sub)

    sub = add(
        "train",
        _train,
        "train a recipe",
        "lrds-fast train digits_alone --set schedule.epochs=20 --set seed=1",
        again=_RESUME,
    )
    add_recipe(sub)
    after = sub.add_mutually_exclusive_group()
    after.add_argument(
        "--resume",
        action="store_true",
        help="go on after the run's last checkpoint, if there is one",
    )
    after.add_argument("--overwrite", action="store_true", help="replace an older run in the same folder")

    sub = add(
        "cache",
        _cache,
        "run a recipe's teacher once and store its logits in teacher.cache, for training to read",
        "lrds-fast cache digits_kd --set teacher.cache=runs/soft_labels --set teacher.cache_views=4",
        again=_RESUME,
    )
    add_recipe(sub)
    sub.add_argument("--selected", action="store_true", help="only of the samples that selection.path keeps")
    after = sub.add_mutually_exclusive_group()
    after.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier command was stopped, and write again what is damaged",
    )
    after.add_argument("--overwrite", action="store_true", help="replace what is in the folder")

    sub = add(
        "sweep",
        _sweep,
        "train a list of recipes one after the other; finished runs are kept, interrupted ones resume",
        "lrds-fast sweep cifar100/resnet56-resnet20/kd cifar100/resnet56-resnet20/kd+lr --seeds 0 1 2\n"
        "  lrds-fast sweep cifar100/resnet56-resnet20/kd+lr+ds --ablation eta --list",
        again="; to continue, run the same command again",
    )
    sub.add_argument(
        "recipes", metavar="RECIPE", nargs="+", help="TOML files or names; @FILE is a file of them, a line each"
    )
    sub.add_argument(
        "--seeds", type=int, nargs="+", help="each recipe once per seed, in OUT/seedN (default: as it says)"
    )
    sub.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="each recipe once per value, as NAME@KEY=VALUE; given several times, once per combination",
    )
    sub.add_argument("--ablation", metavar="NAME", help="a ready grid: eta, weights, ratio, score")
    sub.add_argument("--list", action="store_true", help="name the runs and end")
    sub.add_argument("--baseline", help="name of the recipe to take differences to")
    sub.add_argument("--report", type=Path, help="also write an HTML report of all runs")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    add_settings(sub)

    sub = add(
        "score",
        _score,
        "score every training sample: should it keep its teacher?",
        "lrds-fast score digits_kd --set score.curvature=exact",
    )
    add_recipe(sub)
    sub.add_argument(
        "--out",
        type=Path,
        help="Parquet file to write (default: scores.parquet in the run's folder)",
    )

    sub = add(
        "select",
        _select,
        "choose the samples that keep their teacher from a file of scores",
        "lrds-fast select runs/digits_kd/scores.parquet --by kd_gain --confidence 2 --max-drop 0.1",
    )
    sub.add_argument("scores", metavar="SCORES", type=Path, help="a file that `lrds-fast score` has written")
    sub.add_argument("--by", default="kd_gain", help="the score to go by; lower = keep (default: %(default)s)")
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--confidence",
        type=float,
        metavar="Z",
        help="deny the teacher where the score is above Z of its standard errors",
    )
    how.add_argument(
        "--outliers",
        type=float,
        metavar="K",
        help="deny the teacher where the score is above the median by K robust standard deviations",
    )
    how.add_argument("--threshold", type=float, help="keep samples whose score is below")
    how.add_argument("--ratio", type=float, help="keep this share of the samples, in [0, 1]")
    sub.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="with --confidence or --outliers: of all samples deny at most this share, those with the highest score",
    )
    sub.add_argument("--per-class", action="store_true", help="the share of every class")
    sub.add_argument("--largest", action="store_true", help="keep high scores instead of low ones")
    sub.add_argument("--previous", type=Path, metavar="SELECTION", help="an earlier selection, for --leave")
    sub.add_argument(
        "--leave",
        type=float,
        help="what --previous kept stays until beyond this confidence, number of deviations, ratio or threshold",
    )
    sub.add_argument("--out", type=Path, help="Parquet file to write (default: selection.parquet beside SCORES)")
    sub.add_argument(
        "--report", type=Path, help="also write an HTML report; with pictures, where SCORES lies in its run's folder"
    )

    sub = add(
        "report",
        _report,
        "compare runs in one HTML file and a table; runs of one name are averaged over their seeds",
        "lrds-fast report runs/digits_kd runs/digits_kd_lr --baseline digits_kd --out report.html",
    )
    sub.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    sub.add_argument("--baseline", help="name of the runs to take differences to")
    sub.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")

    sub = add(
        "recipes",
        _recipes,
        "list the recipes that come with the library, or show one",
        "lrds-fast recipes show digits_kd",
    )
    actions = sub.add_subparsers(metavar="ACTION", dest="action")
    actions.add_parser("list", help="names and descriptions (default)")
    show = actions.add_parser("show", help="the TOML of one recipe, and every value once resolved")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("--resolved", action="store_true", help="every value with its default, as JSON")

    sub = add(
        "bench",
        _bench,
        "run the benchmarks of this machine: CSV, a table and a plot",
        "lrds-fast bench kd_loss --quick",
    )
    sub.add_argument("suites", metavar="SUITE", nargs="*", help="which (default: all); `lrds-fast bench --list`")
    sub.add_argument("--list", action="store_true", help="name the suites and end")
    sub.add_argument("--quick", action="store_true", help="a few small shapes")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    sub.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder to write to (default: %(default)s)")
    sub.add_argument("--pages", type=Path, help="folder of the tables and plots (default: that of the CSVs)")

    add(
        "doctor",
        _doctor,
        "what is installed and built, and how to get what is missing",
        "lrds-fast doctor",
    )
    return parser, list(commands.choices)


def _demo(options: argparse.Namespace) -> int:
    from lrds_fast.cli.demo import NOTE, demo

    result = demo(options.out, seeds=options.seeds, settings=options.settings, progress=_progress(options))
    print("\n".join(result.introduction), end="\n\n")
    print(f"{result.table}\n{NOTE}", end="\n\n")
    print("\n".join(result.conclusions))
    print(f"\nreport: {result.report}")
    return OK


def _train(options: argparse.Namespace) -> int:
    from lrds_fast.recipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.settings)  # before PyTorch is imported, so that its errors come fast

    from lrds_fast.train import run

    result = run.fit(
        recipe, resume=options.resume, overwrite=options.overwrite, progress=_progress(options), say=_say(options)
    )
    if int(os.environ.get("RANK", "0")):
        return OK
    last = result.records[-1]
    best = max(record["test_acc"] for record in result.records)
    print(
        f"{recipe.name}: test accuracy {last['test_acc']:.2%} after epoch {last['epoch']} (best epoch {best:.2%}),"
        f" test cross-entropy {last['test_ce']:.4f}; {recipe.out}"
    )
    return OK


def _cache(options: argparse.Namespace) -> int:
    from lrds_fast.recipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.settings)

    from lrds_fast.data.label_files import size_text
    from lrds_fast.train import run

    labels = run.cache(
        recipe,
        only_selected=options.selected,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=_progress(options),
    )
    count = sum(int(labels.cached(view).sum()) for view in range(labels.views))
    kept = f"the {labels.top_k} largest" if labels.top_k else "all"
    print(
        f"{count} soft labels, {kept} of {labels.classes} classes, {labels.views} views:"
        f" {size_text(labels.bytes)} in {labels.folder}"
    )
    return OK


def _sweep(options: argparse.Namespace) -> int:
    from lrds_fast.cli.sweep import check_writable, listed, sweep
    from lrds_fast.recipe.ablations import ablation, cells, parse_axis
    from lrds_fast.recipe.recipe import load_recipe

    recipes = [load_recipe(source, options.settings) for source in listed(options.recipes)]
    if options.ablation:
        recipes = [cell for recipe in recipes for cell in ablation(options.ablation, recipe)]
    axes = [parse_axis(text) for text in options.grid]
    recipes = [cell for recipe in recipes for cell in cells(recipe, axes)]
    if options.list:
        print("\n".join(recipe.name for recipe in recipes))
        return OK

    from lrds_fast.files import write_text
    from lrds_fast.pages import charts
    from lrds_fast.report.page import html_report
    from lrds_fast.report.runs import check_baseline, markdown_report, printed

    # Checked before training: these errors would otherwise appear after it.
    check_baseline(options.baseline, [recipe.name for recipe in recipes])
    if options.report:
        charts.require()
    for key, path in (("--report", options.report), ("--markdown", options.markdown)):
        if path is not None:
            check_writable(path, key, folder=False)
    runs, failures = sweep(
        recipes, seeds=options.seeds, progress=_progress(options), say=print, say_epoch=_say(options)
    )
    # If the baseline failed there is nothing to compare with.
    baseline = options.baseline if options.baseline in {run.recipe.name for run in runs} else None
    if runs:
        print(f"\n{printed(runs, baseline=baseline)}")
    if runs and options.report:
        write_text(options.report, html_report(runs, title="lrds-fast sweep", baseline=baseline))
        print(f"\nreport: {options.report}")
    if runs and options.markdown:
        write_text(options.markdown, markdown_report(runs, title="lrds-fast sweep", baseline=baseline))
    for where, reason in failures:
        print(f"lrds-fast: error: {where}: {reason}", file=sys.stderr)
    return FAILED if failures else OK


def _score(options: argparse.Namespace) -> int:
    from lrds_fast.recipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.settings)

    import lrds_fast
    from lrds_fast.train import run

    scores = run.score(recipe, progress=_progress(options))
    path = options.out or recipe.out / "scores.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of scores is a selection that leaves nobody out: the same columns, and labels and fingerprint travel along.
    lrds_fast.select(scores, by=next(iter(scores)), ratio=1.0).save(path)
    print(f"{len(scores.target)} samples, scores {', '.join(scores)}: {path}")
    return OK


def _select(options: argparse.Namespace) -> int:
    import lrds_fast
    from lrds_fast.influence import Scores
    from lrds_fast.influence.scores import split_errors
    from lrds_fast.pages import charts
    from lrds_fast.selection import Selection
    from lrds_fast.train import run

    if options.report:
        charts.require()
    if not options.scores.is_file():
        raise FileNotFoundError(f"there is no file {options.scores}; lrds-fast score writes one")
    if options.leave is not None and options.previous is None:
        raise ValueError("--leave says until when what an earlier selection kept stays; name that with --previous")
    table = Selection.load(options.scores)
    if table.labels is None or table.teacher_pred is None:
        raise ValueError(f"{options.scores} has no labels or teacher's predictions; lrds-fast score writes them")
    values, errors = split_errors(table.scores)
    scores = Scores(
        values, target=table.labels, teacher_pred=table.teacher_pred, meta=table.meta, standard_error=errors
    )
    selection = lrds_fast.select(
        scores,
        by=options.by,
        ratio=options.ratio,
        threshold=options.threshold,
        confidence=options.confidence,
        outliers=options.outliers,
        max_drop=options.max_drop,
        per_class=options.per_class,
        largest=options.largest,
        leave=options.leave,
        previous=None if options.previous is None else Selection.load(options.previous, dataset=table.fingerprint),
    )
    path = options.out or options.scores.with_name("selection.parquet")
    if path.resolve() == options.scores.resolve():
        raise ValueError(f"--out {path} would replace the scores; name another file")
    selection.save(path)
    if options.report:
        selection.report(options.report, **run.shown_beside(options.scores, selection))
    print(f"{int(selection.mask.sum())} of {len(selection)} samples keep the teacher: {path}")
    return OK


def _report(options: argparse.Namespace) -> int:
    from lrds_fast.files import write_text
    from lrds_fast.pages import charts
    from lrds_fast.report.page import html_report
    from lrds_fast.report.runs import markdown_report, printed, read_run, tabulate, verdicts

    charts.require()
    runs = [read_run(folder) for folder in options.runs]
    rows = tabulate(runs, baseline=options.baseline)
    conclusions = verdicts([(rows, options.baseline)]) if options.baseline else []
    page = html_report(runs, title="lrds-fast report", baseline=options.baseline)
    write_text(options.out, page)
    if options.markdown:
        write_text(options.markdown, markdown_report(runs, title="lrds-fast report", baseline=options.baseline))
    print(printed(runs, baseline=options.baseline))
    print("\n".join(conclusions), end="\n" if conclusions else "")
    print(f"\nreport: {options.out}")
    return OK


def _recipes(options: argparse.Namespace) -> int:
    from lrds_fast.recipe import names as grid
    from lrds_fast.recipe.recipe import builtin_recipes, load_recipe, recipe_text

    if options.action == "show":
        resolved = options.resolved or grid.is_name(options.recipe)  # those have no file
        print(
            load_recipe(options.recipe).to_json() if resolved else recipe_text(options.recipe),
            end="",
        )
        print(end="\n" if resolved else "")
        return OK
    names = builtin_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {load_recipe(name).description}")
    print("\nPROTOCOL/MODEL: a network alone. PROTOCOL/TEACHER-STUDENT/METHOD, and METHOD+lr, METHOD+ds, METHOD+lr+ds:")
    for prefix, protocol in grid.PROTOCOLS.items():
        print(f"\n{prefix}: as the recipe {protocol.base}")
        print(f"  pairs    {', '.join(protocol.pairs)}")
        print(f"  methods  {', '.join(protocol.methods)}")
    return OK


def _bench(options: argparse.Namespace) -> int:
    from lrds_fast.cli.bench import run_suites, suites

    if options.list:
        print("\n".join(suites()))
        return OK
    import lrds_fast.functional  # noqa: F401  what is not built is one line here, in the suites' processes a traceback

    pages = run_suites(
        options.suites or list(suites()),
        device=options.device,
        threads=options.threads,
        quick=options.quick,
        out=options.out,
        pages=options.pages or options.out,
    )
    print("\n".join(f"page: {page}" for page in pages))
    return OK


def _doctor(options: argparse.Namespace) -> int:
    from lrds_fast.cli.doctor import examine, healthy, text

    findings = examine()
    print(text(findings))
    return OK if healthy(findings) else FAILED


def _progress(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _say(options: argparse.Namespace) -> Callable[[str], object] | None:
    """Where there is no terminal for a bar, a line tells of each epoch."""
    if options.quiet or sys.stderr.isatty():
        return None
    return lambda line: print(line, file=sys.stderr, flush=True)
