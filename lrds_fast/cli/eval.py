"""lrds-fast eval: evaluates a trained student."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from lrds_fast.cli.command import OK, Subparsers, add_command, add_settings, add_student

if TYPE_CHECKING:
    from lrds_fast.train.stored import Assessment


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        summary="evaluate a trained student: accuracy, negative log-likelihood, calibration error, accuracy by class",
        example="lrds-fast eval runs/digits_kd_lr",
    )
    add_student(parser)
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="samples to evaluate on (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_settings(parser, "device")


def run(options: argparse.Namespace) -> int:
    """Prints the numbers; returns the exit code."""
    from lrds_fast.train.stored import assess

    assessment = assess(options.student, split=options.split, settings=options.settings)
    if options.json:
        print(_json(assessment, split=options.split, source=str(options.student)))
    else:
        print(_text(assessment, split=options.split))
    return OK


def _json(assessment: Assessment, *, split: str, source: str) -> str:
    from lrds_fast.files import plain

    student, evaluation = assessment
    parts = evaluation.parts()
    names = student.class_names
    parts["classes"] = [
        {"class": name, "rows": rows, "right": right, "accuracy": right / rows if rows else None}
        for name, (rows, right) in zip(names, parts["classes"], strict=True)
    ]
    facts = {"student": source, "model": student.description.model, "weights": student.description.weights}
    rows = sum(entry["rows"] for entry in parts["classes"])
    return json.dumps(plain({**facts, "split": split, "rows": rows, **parts}), allow_nan=False, indent=2)


def _text(assessment: Assessment, *, split: str) -> str:
    from lrds_fast.report.tables import aligned

    student, evaluation = assessment
    lines = [("class", "samples", "right", "accuracy %")]
    total = 0
    for name, (rows, right) in zip(student.class_names, evaluation.parts()["classes"], strict=True):
        lines.append((name, str(rows), str(right), f"{100 * right / rows:.2f}" if rows else "-"))
        total += rows
    return (
        f"{aligned(lines)}\n\n{student.description.model}, {student.description.weights}, {total} {split} samples:"
        f" accuracy {evaluation.accuracy:.2%}, negative log-likelihood {evaluation.cross_entropy:.4f},"
        f" expected calibration error {evaluation.ece:.4f}"
    )
