"""lrds-fast report: compares finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrds_fast.cli.command import OK, Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command's parser."""
    parser = add_command(
        subparsers,
        "report",
        run,
        summary="compare runs in one HTML file and a table; runs of one name are averaged over their seeds",
        example="lrds-fast report runs/digits_kd runs/digits_kd_lr --baseline digits_kd --out report.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--baseline", help="name of the runs to compare the others with")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")


def run(options: argparse.Namespace) -> int:
    """Writes the report and prints its tables; returns the exit code."""
    from lrds_fast.files import write_text
    from lrds_fast.pages import charts
    from lrds_fast.report.page import html_report
    from lrds_fast.report.runs import read_run
    from lrds_fast.report.tables import markdown_report, printed, tabulate
    from lrds_fast.report.verdicts import verdicts

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
