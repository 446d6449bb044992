"""lrds-fast select: chooses the samples that keep their teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrds_fast.cli.command import OK, Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "select",
        run,
        summary="select the samples that keep their teacher, by their scores",
        example="lrds-fast select runs/digits_kd/scores.parquet --by teacher_harm --confidence 4 --max-drop 0.1",
    )
    parser.add_argument("scores", metavar="SCORES", type=Path, help="a file that `lrds-fast score` has written")
    parser.add_argument(
        "--by",
        help="score to select by; low scores keep the teacher (default: teacher_harm where it was computed, else"
        " kd_gain)",
    )
    _add_rule(parser)
    parser.add_argument("--per-class", action="store_true", help="apply --ratio or --max-drop within every class")
    parser.add_argument("--largest", action="store_true", help="keep high scores instead of low ones")
    parser.add_argument("--previous", type=Path, metavar="SELECTION", help="earlier selection, for --leave")
    parser.add_argument(
        "--leave",
        type=float,
        help="hysteresis: a sample that --previous keeps loses its teacher only beyond this confidence, number of"
        " deviations, ratio or threshold",
    )
    parser.add_argument("--out", type=Path, help="Parquet file to write (default: selection.parquet beside SCORES)")
    parser.add_argument(
        "--report",
        type=Path,
        help="also write an HTML report; it has pictures if SCORES is in the folder of its run",
    )


def _add_rule(parser: argparse.ArgumentParser) -> None:
    """The rules, of which one must be given, and the limit on how many samples a rule denies the teacher."""
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--confidence",
        type=float,
        metavar="Z",
        help="deny the teacher where the score is above 0 by more than Z of its standard errors",
    )
    rule.add_argument(
        "--outliers",
        type=float,
        metavar="K",
        help="deny the teacher where the score is above the median by more than K robust standard deviations",
    )
    rule.add_argument("--threshold", type=float, help="keep the teacher where the score is below this number")
    rule.add_argument("--ratio", type=float, help="keep the teacher for this share of the samples, in [0, 1]")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="with --confidence or --outliers: deny the teacher to at most this share of all samples, the highest"
        " scores first (default: %(default)s, no limit)",
    )


def run(options: argparse.Namespace) -> int:
    """Writes the selection as a Parquet file; returns the exit code."""
    import lrds_fast
    from lrds_fast.influence import Scores
    from lrds_fast.influence.scores import split_errors
    from lrds_fast.notes import note
    from lrds_fast.pages import charts
    from lrds_fast.selection import Selection
    from lrds_fast.selection.rule import weight_hint
    from lrds_fast.selection.table import read_selection
    from lrds_fast.train.run import pictures_of_run

    if options.report:
        charts.require()
    if not options.scores.is_file():
        raise FileNotFoundError(f"there is no file {options.scores}; lrds-fast score writes one")
    if options.leave is not None and options.previous is None:
        raise ValueError("--leave applies to the samples that an earlier selection keeps; name it with --previous")
    table = read_selection(options.scores, what="score file", otherwise="run lrds-fast score again")
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
    hint = weight_hint(str(selection.policy["by"]), scores)
    if hint:
        note(hint)
    path = options.out or options.scores.with_name("selection.parquet")
    if path.resolve() == options.scores.resolve():
        raise ValueError(f"--out {path} would replace the scores; name another file")
    selection.save(path)
    if options.report:
        selection.report(options.report, **pictures_of_run(options.scores, selection))
    print(f"{int(selection.mask.sum())} of {len(selection)} samples keep the teacher: {path}")
    return OK
