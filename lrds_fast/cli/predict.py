"""lrds-fast predict: the classes that a trained student sees in picture files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lrds_fast.cli.command import FAILED, OK, Subparsers, add_command, add_student


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "predict",
        run,
        summary="print the most probable classes of pictures, by a trained student",
        example="lrds-fast predict runs/digits_kd_lr seven.png --top 3",
    )
    add_student(parser)
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="files that Pillow reads")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to print (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(options: argparse.Namespace) -> int:
    """Prints the classes; returns the exit code, FAILED where a picture could not be read."""
    from lrds_fast.models.predict import predict
    from lrds_fast.models.student import load

    student = load(options.student, device=options.device)
    found = []
    failed = False
    for prediction in predict(student, options.pictures, top=options.top):
        classes = list(zip(prediction.labels, prediction.names, prediction.probabilities, strict=True))
        if prediction.error:
            failed = True
            print(f"lrds-fast: error: {prediction.error}", file=sys.stderr)
        elif not options.json:
            ranked = ", ".join(f"{name} {probability:.2%}" for _, name, probability in classes)
            print(f"{prediction.picture}: {ranked}")
        found.append(
            {"picture": str(prediction.picture)}
            | ({"error": prediction.error} if prediction.error else {})
            | {"classes": [{"label": k, "class": name, "probability": p} for k, name, p in classes]}
        )
    if options.json:
        print(json.dumps(found, indent=2))
    return FAILED if failed else OK
