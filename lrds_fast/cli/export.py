"""lrds-fast export: writes a trained student as files for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrds_fast.cli.command import OK, Subparsers, add_command, add_student


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "export",
        run,
        summary="write a trained student as safetensors with a model card, as a torch.export program and as ONNX",
        example="lrds-fast export runs/digits_kd_lr --out exported --license apache-2.0",
    )
    add_student(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=("pt2", "onnx"),
        help="programs to write beside the weights (default: pt2, and onnx where its packages are installed)",
    )
    for name, of in (("license", "the weights"), ("data-license", "the data"), ("teacher-license", "the teacher")):
        parser.add_argument(
            f"--{name}", default="unknown", metavar="ID", help=f"licence of {of}, for the card, such as apache-2.0"
        )
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in the folder")


def run(options: argparse.Namespace) -> int:
    """Writes the files and prints a line for each; returns the exit code."""
    from lrds_fast.models.export import ONNX, missing_for_onnx
    from lrds_fast.notes import note
    from lrds_fast.report.export import CARD, export_student

    formats = options.formats
    missing = missing_for_onnx() if formats is None or "onnx" in formats else ""
    if formats is None:
        formats = ["pt2"] if missing else ["pt2", "onnx"]
    elif missing:
        raise ImportError(missing)  # before any file is written
    differences = export_student(
        options.student,
        options.out,
        formats=formats,
        licences={"weights": options.license, "data": options.data_license, "teacher": options.teacher_license},
        overwrite=options.overwrite,
    )
    if missing:
        note(f"{ONNX} was left out: {missing}")
    for name, difference in differences.items():
        compared = f"logits differ by at most {difference:.1e} of the largest" if difference else "equal logits"
        print(f"{options.out / name}: {compared}")
    print(f"model card: {options.out / CARD}")
    return OK
