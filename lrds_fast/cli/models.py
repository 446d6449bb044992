"""lrds-fast models: lists the networks that a recipe can name."""

from __future__ import annotations

import argparse
import json

from lrds_fast.cli.command import OK, Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "models",
        run,
        summary="list the networks that a recipe can name, with their parameters and input sizes",
        example="lrds-fast models\n  lrds-fast models 'torchvision:resnet*' 'timm:mobilenetv4*' --classes 1000",
    )
    parser.add_argument(
        "patterns",
        metavar="PATTERN",
        nargs="*",
        help="NAME, torchvision:NAME or timm:NAME, where * stands for any text (default: this library's networks)",
    )
    parser.add_argument("--classes", type=int, default=100, metavar="N", help="number of logits (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Prints the networks; returns the exit code."""
    from lrds_fast.models.catalogue import networks
    from lrds_fast.report.tables import aligned

    found = list(networks(options.patterns, num_classes=options.classes))
    if options.json:
        print(json.dumps([network._asdict() for network in found], indent=2))
        return OK
    lines = [("name", "parameters", "input", "library")]
    for network in found:
        size = "-" if network.input_size is None else " x ".join(map(str, network.input_size))
        lines.append((network.name, f"{network.parameters:,}", size, network.library))
    print(aligned(lines))
    if not options.patterns:
        print("\nAlso torchvision:NAME and timm:NAME; `lrds-fast models 'timm:*'` lists those of timm.")
    return OK
