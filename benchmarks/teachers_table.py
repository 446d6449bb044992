"""The table of teachers/README.md: what each file of weights is, and its sha256.

python -m benchmarks.teachers_table      after a file has been added or changed

Accuracies are those of the stored runs. A teacher that no finished run has used has none yet.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from benchmarks.lab_networks import HERE, STORED, TEACHER_EPOCHS, TEACHERS
from benchmarks.tables import markdown_table, stored_rows
from lrds_fast.files import write_text

README = TEACHERS / "README.md"
#: The runs among which the teacher of resnet20_60_epochs.safetensors is.
RECIPE_RUNS = HERE / "results" / "cifar100.csv"
RECIPE_TEACHER = "cifar100-short/resnet20"
BEGIN, END = "<!-- teachers:begin -->", "<!-- teachers:end -->"
HEADER = ("file", "regime", "number", "made by", "epochs", "test accuracy, %", "weights", "bytes", "sha256")
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
#: Training sets of the regimes, as docs/benchmarks/method.md defines them.
REGIMES = {
    "unseen": "*unseen*: 75 of the classes",
    "clean": "*clean*",
    "noise": "*noise*: 40% of the labels are wrong",
}


def dtype_of(path: Path) -> str:
    """The dtype of a file's floating-point tensors; several are joined by a comma."""
    with safe_open(str(path), "pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return ", ".join(DTYPES[name] for name in sorted(found & DTYPES.keys()))


def cells_of(path: Path, networks: list[dict[str, str]], recipes: list[dict[str, str]]) -> list[str]:
    """The cells of a file's row without those that are read from the file itself: regime, number, command, epochs and
    accuracy. networks, recipes: the rows of STORED and of RECIPE_RUNS. ValueError for a name of another form."""
    of_regime = re.fullmatch(r"resnet20_([a-z]+)_(\d+)", path.stem)
    if of_regime and of_regime[1] in REGIMES:
        regime, number = of_regime.groups()
        same = {row["teacher_test_acc"] for row in networks if (row["regime"], row["teacher"]) == (regime, number)}
        if len(same) > 1:
            raise ValueError(f"{STORED} has several accuracies of {path.name}: {', '.join(sorted(same))}")
        command = f"`python -m benchmarks.lab_networks run --cache DIR --regimes {regime}`"
        accuracy = f"{float(same.pop()):.2f}" if same else "-"
        return [REGIMES[regime], number, command, str(TEACHER_EPOCHS), accuracy]
    if path.stem == "resnet20_60_epochs":
        last = max((row for row in recipes if row["name"] == RECIPE_TEACHER), key=lambda row: int(row["epoch"]))
        about = "all 50,000 training pictures"
        return [about, "-", f"`{last['command']}`", last["epochs"], f"{100 * float(last['test_acc']):.2f}"]
    raise ValueError(f"{path} must be resnet20_REGIME_NUMBER or resnet20_60_epochs; REGIME: {', '.join(REGIMES)}")


def table(folder: Path = TEACHERS) -> str:
    """Markdown: a row a file."""
    networks, recipes = stored_rows(STORED), stored_rows(RECIPE_RUNS)
    body = []
    for path in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        own = [dtype_of(path), f"{path.stat().st_size}", f"`{digest}`"]
        body.append([path.name, *cells_of(path, networks, recipes), *own])
    return "\n".join(markdown_table(HEADER, body))


def listed(text: str) -> Mapping[str, str]:
    """sha256 by name of the files that a page lists."""
    rows = [line.strip("| ").split(" | ") for line in text.partition(BEGIN)[2].partition(END)[0].splitlines()]
    return {row[0]: row[-1].strip("`") for row in rows if row[0].endswith(".safetensors")}


def write(readme: Path = README) -> Path:
    """Writes the table of the folder's files into its page, between the marks. ValueError for a page without them."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} must have {BEGIN} and {END} once")
    write_text(readme, f"{before}{BEGIN}\n{table(readme.parent)}\n{END}{after}")
    return readme


if __name__ == "__main__":
    print(write())
