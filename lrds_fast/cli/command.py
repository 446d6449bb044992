"""What the commands share: exit codes, arguments that several commands take, and how progress is shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

#: Exit codes: success; the work failed (training diverged, disk full, ...); the command line or a recipe is wrong;
#: interrupted. Training that a signal stops exits with 128 + the signal's number once its checkpoint is written.
OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. details: text at the end of --help, made only where it is shown."""

    details: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"lrds-fast: error: {message} (see {self.prog} --help)\n")

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{self.details()}\n" if self.details else text


#: What Parser.add_subparsers returns.
Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"

#: The hint after an interruption, for commands with --resume.
RESUME_HINT = "; to resume from the last checkpoint, run the same command with --resume"


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    example: str,
    interrupted_hint: str = "",
) -> Parser:
    """Adds the parser of one command.

    run: does the command's work and returns the exit code. summary: one line for both help texts. interrupted_hint: is
    printed after "interrupted", and says how to continue.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser, interrupted_hint=interrupted_hint)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Shorthand(argparse.Action):
    """An option that stands for --set KEY=VALUE; of several settings of one key the last one counts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        # JSON's strings are TOML's too: without quotes a folder named 1 would be a number.
        setting = f"{self.const}={json.dumps(values, ensure_ascii=False)}"
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), setting])


#: Options that stand for a recipe's key: name -> (key, metavar, type, help).
SHORTHANDS: dict[str, tuple[str, str, type, str]] = {
    "seed": ("seed", "N", int, "seed of initial weights, order of samples and augmentation"),
    "epochs": ("schedule.epochs", "N", int, "length of training, in epochs"),
    "device": ("run.device", "D", str, "auto, cpu, cuda or cuda:N"),
    "out": ("run.out", "FOLDER", str, "folder of the run"),
}


def add_recipe(parser: argparse.ArgumentParser, *shorthands: str) -> None:
    """The argument RECIPE, and add_settings."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or a name that `lrds-fast recipes` lists")
    add_settings(parser, *shorthands)


def add_student(parser: argparse.ArgumentParser) -> None:
    """The argument RUN_OR_CHECKPOINT, as options.student."""
    parser.add_argument(
        "student",
        metavar="RUN_OR_CHECKPOINT",
        type=Path,
        help="folder of a run or of lrds-fast export, or a file of weights in it, such as RUN/best.safetensors",
    )


def add_settings(parser: argparse.ArgumentParser, *shorthands: str) -> None:
    """--set and --quiet. shorthands: the names in SHORTHANDS that the command takes."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="override a value of the recipe; may be repeated",
    )
    for name in shorthands:
        key, metavar, kind, about = SHORTHANDS[name]
        parser.add_argument(
            f"--{name}",
            action=_Shorthand,
            const=key,
            dest="settings",
            default=[],
            metavar=metavar,
            type=kind,
            help=f"{about}; short for --set {key}={metavar}",
        )
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def add_resume_or_overwrite(parser: argparse.ArgumentParser, *, resume: str, overwrite: str) -> None:
    """--resume and --overwrite, which exclude each other, with these help texts."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=resume)
    group.add_argument("--overwrite", action="store_true", help=overwrite)


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether progress bars are drawn: on a terminal, unless --quiet is given."""
    return not options.quiet and sys.stderr.isatty()


def epoch_printer(options: argparse.Namespace) -> Callable[[str], object] | None:
    """Prints one line per epoch to stderr where no progress bar can be drawn; None on a terminal and with --quiet."""
    if options.quiet or sys.stderr.isatty():
        return None
    return lambda line: print(line, file=sys.stderr, flush=True)
