"""Renders stored runs as pages: docs/benchmarks/<name>.md with tables, and an SVG plot beside it where there is one.

python -m benchmarks.render                                   every CSV of benchmarks/results
python -m benchmarks.render out/kd_loss_cuda.csv --out out    one run, elsewhere
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    bench_bandwidth,
    bench_influence,
    bench_influence_scale,
    bench_lds,
    bench_linear_kd_loss,
    bench_train,
    cifar100_runs,
    lab_networks,
    lab_statistics,
)
from benchmarks.bench_kd_loss import is_headline, table
from benchmarks.tables import Row, markdown_table, read_csv
from lrds_fast.files import write_text
from lrds_fast.pages import charts
from lrds_fast.pages.charts import INK, MUTED, SERIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"
COLOURS = dict(zip(("ours", "eager", "compile", "liger", "lean", "compile-autotune", "triton"), SERIES, strict=False))
PARTS = dict(zip(("teacher", "student", "backward", "optimizer", "loss", "loader"), SERIES, strict=False))
PARTS |= {"other": MUTED, "idle": charts.GRID}


@charts.styled
def plot_kd_loss(rows: list[Row], path: Path) -> None:
    """Two panels over the shapes: each contender's time over kd_loss's, and kd_loss's percent of the triad."""
    headline = [row for row in rows if is_headline(row) or (int(row["classes"]) < 100 and row["divergence"] == "kl")]
    headline = [row for row in headline if row["dtype"] == "float32" and float(row["temperature"]) == 4]
    shapes = list(dict.fromkeys((int(row["rows"]), int(row["classes"])) for row in headline))
    shapes.sort(key=lambda shape: (shape[1], shape[0]))
    labels = [f"{n} x {c}" for n, c in shapes]
    figure, axes = charts.figure(640, 500, 2, 1, sharex=True, height_ratios=(3, 2))
    ratios, roof = axes[:, 0]
    for name in dict.fromkeys(row["contender"] for row in headline):
        if name == "ours":
            continue
        by_shape = {
            (int(r["rows"]), int(r["classes"])): float(r["speedup_of_ours"]) for r in headline if r["contender"] == name
        }
        ratios.plot(labels, [by_shape.get(shape) for shape in shapes], marker="o", color=COLOURS[name], label=name)
    ratios.axhline(1.0, color=COLOURS["ours"], label="kd_loss")
    ratios.set_yscale("log")
    ratios.yaxis.set_major_formatter("{x:g}")
    ratios.set_ylabel("time / time of kd_loss")
    ratios.legend(ncols=4)
    ours = {(int(r["rows"]), int(r["classes"])): r for r in headline if r["contender"] == "ours"}
    percent = [
        12e-9 * n * c / (float(ours[n, c]["median_ms"]) / 1e3) / float(ours[n, c]["triad_gb_s"]) * 100
        for n, c in shapes
    ]
    roof.bar(labels, percent, color=COLOURS["ours"])
    roof.axhline(100.0, color=INK, linewidth=0.8)
    roof.set_ylabel("% of triad\n(read, read, write)")
    roof.tick_params(axis="x", rotation=60)
    figure.suptitle(f"forward + backward, float32, T = 4: {rows[0]['device']}", fontsize=10)
    charts.save(figure, path, "time over that of kd_loss, and percent of the roofline, by shape")


@charts.styled
def plot_train(rows: list[Row], path: Path) -> None:
    """A panel per case: milliseconds an image of each arm, as a bar of parts."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    counts = [sum(row["case"] == case for row in rows) for case in cases]
    figure, axes = charts.figure(640, 17 * sum(counts) + 60 * len(cases) + 24, len(cases), 1, height_ratios=counts)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        of_case = [row for row in rows if row["case"] == case][::-1]
        labels = [row["arm"] + ("" if row["loader"] == "synthetic" else f", {row['loader']}") for row in of_case]
        whole = [float(row["median_ms"]) / int(row["batch"]) for row in of_case]
        left = [0.0] * len(of_case)
        for name in PARTS:
            widths = [ms * float(row[f"share_{name}"]) for ms, row in zip(whole, of_case, strict=True)]
            axis.barh(range(len(of_case)), widths, left=left, color=PARTS[name], label=name, height=0.75)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(of_case)), labels)
        axis.set_xlabel("ms an image")
        axis.set_title(f"{case}, batch {of_case[0]['batch']}")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=len(names), loc="outside lower center")
    charts.save(figure, path, "milliseconds an image by arm, in parts")


def page_kd_loss(rows: list[Row], stem: str, out: Path) -> str:
    plot = out / f"{stem}.svg"
    plot_kd_loss(rows, plot)
    return (
        f"# kd_loss, forward + backward: {rows[0]['device']}\n\n"
        "Every contender was checked against the float64 reference before it was timed. In each round, the contenders\n"
        "run in turns; a cell is a median over rounds.\n\n"
        "- vs X: the time of X divided by the time of kd_loss in the same round. eager: the loss as the field writes\n"
        "  it in PyTorch; lean: with as few PyTorch ops as possible; compile: eager under torch.compile.\n"
        "- % of triad: the bytes that kd_loss must move (read the student and the teacher of selected rows, write\n"
        "  the gradient), divided by its time and by the bandwidth of the triad a = b + s * c in the same run.\n"
        "- peak MiB: the most memory that the allocator held beyond the inputs; in parentheses that of eager.\n\n"
        "For divergences other than KL, eager and compile are lrds_fast.reference.\n\n"
        f"![speed-up and percent of the triad's bandwidth by shape]({plot.name})\n\n{table(rows)}\n"
    )


def page_linear_kd_loss(rows: list[Row], stem: str, out: Path) -> str:
    return (
        f"# linear_kd_loss, forward + backward: {rows[0]['device']}\n\n"
        "Every contender was checked against the float64 reference before it was timed. In each round, the contenders\n"
        "run in turns. chunk: the rows whose logits are in memory at the same time. peak MiB: memory beyond what was\n"
        "in use before the call; it includes the gradients. Liger's and TRL's losses do not revise labels.\n\n"
        f"{bench_linear_kd_loss.table(rows)}\n"
    )


def page_bandwidth(rows: list[Row], stem: str, out: Path) -> str:
    return (
        f"# kd_loss, forward + backward, against memory bandwidth: {rows[0]['device']}\n\n"
        "GB/s: the bytes that kd_loss must move (read student and teacher, write the gradient), divided by its\n"
        "time. % of triad: these GB/s, divided by those of the triad a = b + s * c in the same round.\n\n"
        "memory: what the allocator does with the gradient that the previous step freed. `returned`: it returns\n"
        "large blocks to the operating system, as glibc does by default, and the next gradient costs page faults.\n"
        "`kept`: it keeps them for the next step, as jemalloc and tcmalloc do, and glibc with\n"
        "`MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647`.\n\n"
        f"{bench_bandwidth.table(rows)}\n"
    )


def page_influence(rows: list[Row], stem: str, out: Path) -> str:
    return (
        f"# Influence scores: {rows[0]['device']}\n\n"
        "Times are the CPU time of one thread per sample, in the cases with pairs per pair: medians over rounds in\n"
        "which the contenders run in turns. The results of all contenders were compared before they were timed.\n\n"
        "| case | what is computed |\n"
        "|---|---|\n"
        "| self | EK-FAC self-influence of a linear head with 512 inputs; all contenders use kronfluence's factors |\n"
        "| pairs | products of last-layer gradients with those of 256 queries; captum leaves out the bias |\n"
        "| pairs-ekfac | the same products under EK-FAC, 64 queries |\n"
        "| resnet20 | EK-FAC self-influence over all convolutions and the head |\n\n"
        "ours, kronfluence and captum start from a model and a dataset, so their times include the forward and the\n"
        "backward pass. closed form starts from features and logits. plain is the closed form in three lines of\n"
        "PyTorch over all rows at once.\n\n"
        f"{bench_influence.table(rows)}\n"
    )


def page_lds(rows: list[Row], stem: str, out: Path) -> str:
    return (
        f"# Linear datamodeling score of influence scores: {rows[0]['device']}\n\n"
        f"MLPs are retrained on {rows[0]['halves']} random halves of the training set, with {rows[0]['seeds']} seeds\n"
        "for each half. For one query, the linear datamodeling score (LDS) is the rank correlation, over the halves,\n"
        "between the query's output after retraining and the sum of the influences of the half's samples on it; the\n"
        "table shows the mean over the queries. The intervals come from resampling halves and queries. All contenders\n"
        "are compared on the same retrained models, so the difference of two contenders is more certain than their\n"
        "intervals suggest. CPU seconds is the time from a model and the data to the scores of all pairs, factors\n"
        "included.\n\n"
        "The case digits is an MLP 64-64-10 on scikit-learn's digits, the case cifar an MLP 768-128-10 on ten classes\n"
        "of CIFAR-100 at 16 x 16 pixels. The baseline `same label` is the cosine of the inputs, negated if the\n"
        "labels differ. `training's damping` is the weight decay + 1 / (sum of the learning rates / (1 - momentum))\n"
        "in place of a tenth of each layer's mean eigenvalue. `exact` solves with the Hessian of all layers together,\n"
        "to a relative residual of 0.1.\n\n"
        f"{bench_lds.table(rows)}\n"
    )


def page_influence_scale(rows: list[Row], stem: str, out: Path) -> str:
    return (
        f"# Scores at ImageNet's size: {rows[0]['device']}\n\n"
        "One call of influence.score(out=...) computes six scores (kd_gain, self_influence, param_shift, conflict,\n"
        "el2n, ce) of every sample. It runs student and teacher, fits EK-FAC factors to all samples, computes the\n"
        "held-out gradient and writes Parquet files. Student and teacher are linear heads on synthetic features,\n"
        "which are generated while they are read. Peak memory includes the interpreter and its libraries. `disk\n"
        "meanwhile` is the largest size that temporary files and scores had together during the run.\n\n"
        f"{bench_influence_scale.table(rows)}\n"
    )


def page_train(rows: list[Row], stem: str, out: Path) -> str:
    steps = [row for row in rows if row["part"] == "step"]
    picture = ""
    if steps:
        plot = out / f"{stem}.svg"
        plot_train(steps, plot)
        picture = f"![milliseconds an image by arm, in parts]({plot.name})\n\n"
    return (
        f"# A distillation step, teacher included: {rows[0]['device']}\n\n"
        "There are three kinds of arms:\n\n"
        "- baseline: the step as mdistiller writes it, with label revision (float32, NCHW, eager losses, teacher on\n"
        "  every row, torchvision's loaders);\n"
        "- tuned: the same step in bfloat16 with channels_last and, if the settings say so, torch.compile;\n"
        "- ours: the trainer's step.\n\n"
        "The columns:\n\n"
        "- vs baseline: the time of the baseline divided by the time of the arm, median and range over rounds. Arms\n"
        "  on synthetic batches are compared with the baseline on synthetic batches, arms that load pictures with\n"
        "  the baseline on the published loader.\n"
        "- of its ceiling: images/s, divided by those of the same arm on synthetic batches.\n"
        "- checked: the relative distance between the weight update of one float32 step of the arm and that of the\n"
        "  baseline with the same rows masked.\n"
        "- update error: the same distance for the arm as it is timed. bfloat16 alone causes an error of this size in\n"
        "  an untrained network, and a larger one in a deep network without shortcuts.\n\n"
        "The shares come from torch.profiler. All weights are random, so the numbers say nothing about accuracy.\n\n"
        f"{picture}{bench_train.table(rows)}\n"
    )


def page_plain(rows: list[Row], stem: str, out: Path) -> str:
    """A run of which only the columns are known."""
    about_run = {"device", "threads", "torch", "cuda", "lrds_fast", "commit", "isa", "command"}
    about_run |= {"triad_gb_s", "copy_gb_s"}
    columns = [name for name in rows[0] if name not in about_run]
    lines = markdown_table(columns, [[row[name] or "" for name in columns] for row in rows])
    facts = ", ".join(f"{name} {rows[0][name]}" for name in rows[0] if name in about_run and rows[0][name])
    return "\n".join([f"# {stem}", "", *lines, "", facts, ""])


#: The beginning of a file's name -> its page's text; the first that fits.
PAGE_TEXTS: dict[str, Callable[[list[Row], str, Path], str]] = {
    "kd_loss": page_kd_loss,
    "linear_kd_loss": page_linear_kd_loss,
    "bandwidth": page_bandwidth,
    "lds": page_lds,
    "influence_scale": page_influence_scale,
    "influence": page_influence,
    "train": page_train,
    "": page_plain,
}


def render_gains(path: Path, out: Path) -> Path:
    """The page of the networks, from the rows of their trainings beside this file."""
    return lab_networks.render(path.with_name(lab_networks.STORED.name), out)


#: Files whose programs write their pages themselves.
RENDERERS = {
    "method_features": lab_statistics.render,
    "method_networks": lab_networks.render,
    "method_gains": render_gains,
}


def render(path: Path, out: Path) -> Path:
    """Writes the page of one CSV file and its plots into `out`; returns the page's path. ValueError for a file without
    rows."""
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path} has no rows; run the benchmark with --csv {path} first")
    out.mkdir(parents=True, exist_ok=True)
    for prefix, write in RENDERERS.items():
        if path.stem.startswith(prefix):
            return write(path, out)
    page = out / f"{path.stem}.md"
    if path.stem.startswith("cifar100"):
        write_text(page, cifar100_runs.page(path.read_text(encoding="utf-8"), path.stem))
        return page
    make = next(make for prefix, make in PAGE_TEXTS.items() if path.stem.startswith(prefix))
    write_text(page, make(rows, path.stem, out))
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="*", type=Path, help="stored runs (default: benchmarks/results/*.csv)")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder for the pages (default: docs/benchmarks)")
    arguments = parser.parse_args(argv)
    for path in arguments.csv or sorted(RESULTS.glob("*.csv")):
        sys.stdout.write(f"{render(path, arguments.out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
