"""The entry point of the command line: parses the arguments, runs the command, and reports its errors in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence

from lrds_fast import _build
from lrds_fast._version import __version__
from lrds_fast.cli import (
    bench,
    cache,
    demo,
    doctor,
    eval,
    export,
    models,
    predict,
    recipes,
    report,
    score,
    select,
    sweep,
    train,
)
from lrds_fast.cli.command import FAILED, INTERRUPTED, MISUSED, OK, Parser

__all__ = ["FAILED", "INTERRUPTED", "MISUSED", "OK", "main"]

#: The commands in the order of the help text.
COMMANDS = (
    demo,
    train,
    cache,
    sweep,
    score,
    select,
    report,
    eval,
    predict,
    export,
    recipes,
    models,
    bench,
    doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. An error is one line on stderr; --debug also shows the traceback."""
    from lrds_fast.train.stopping import Stopped

    open_closed_streams()
    options = argparse.Namespace(debug=False, interrupted_hint="")
    try:
        options = _parsed(list(sys.argv[1:] if argv is None else argv))
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        print(f"lrds-fast: {stopped}{options.interrupted_hint}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"lrds-fast: interrupted{options.interrupted_hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has closed the pipe (| head). The null device takes its place: Python flushes stdout
        # again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError, ImportError) as error:
        if options.debug:
            import traceback

            traceback.print_exc()
        print(f"lrds-fast: error: {_one_line(error)}", file=sys.stderr)
        misused = isinstance(error, (ValueError, TypeError, FileNotFoundError, FileExistsError))
        return MISUSED if misused else FAILED


def open_closed_streams() -> None:
    """Opens the null device for each of stdin, stdout and stderr that is closed, as in a daemon. Otherwise a file that
    a run writes could get the descriptor of stdout or stderr and receive printed text."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # open() returns the lowest free descriptor
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The parsed arguments. A wrong argument ends the program with one line that names the nearest valid one."""
    parser = Parser(
        prog="lrds-fast",
        description="Knowledge distillation with label revision (LR) and data selection (DS).",
        epilog="Start with: lrds-fast demo",
    )
    parser.add_argument("--version", action="version", version=f"lrds-fast {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    names = list(subparsers.choices)
    name = arguments[0] if arguments else ""
    if name and not name.startswith("-") and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        parser.error(f"there is no command {name!r}; {hint}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        subparser: argparse.ArgumentParser = options.parser
        subparser.error(_unknown_argument(unknown[0], subparser, takes_settings="settings" in options))
    return options


def _unknown_argument(argument: str, parser: argparse.ArgumentParser, *, takes_settings: bool) -> str:
    """The error for an unknown argument of a command: for --batch-size it names the recipe key data.batch_size, for
    --dryrun the option --dry-run."""
    from lrds_fast.recipe.keys import recipe_keys

    option = argument.partition("=")[0]
    name = option.lstrip("-").replace("-", "_")
    keys = [key.name for key in recipe_keys() if f".{key.name}".endswith(f".{name}")]
    if not takes_settings or not option.startswith("--") or not keys:
        known = re.findall(r"--[a-z-]+", parser.format_usage())
        near = difflib.get_close_matches(option, known, n=1) if option.startswith("--") else []
        return f"unknown argument {argument}" + (f"; did you mean {near[0]!r}?" if near else "")
    ways = " or ".join(f"--set {key}=..." for key in keys)
    return f"unknown argument {argument}; a recipe's values are set with --set KEY=VALUE: {ways}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the free space"
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return _build.problem() or str(error)
    text = " ".join(str(error).split())
    return text or f"{type(error).__name__} without a message; --debug shows where"
