"""Renders stored runs as pages: docs/benchmarks/<name>.md with a table, and an SVG plot beside it.

python -m benchmarks.render                                   every CSV of benchmarks/results
python -m benchmarks.render out/kd_loss_cuda.csv --out out    one run, elsewhere
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
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
from benchmarks.bench_kd_loss import Row, is_headline, table
from lrds_fast.pages import charts
from lrds_fast.pages.charts import INK, MUTED, SERIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"
COLOURS = dict(zip(("ours", "eager", "compile", "liger", "lean", "compile-autotune", "triton"), SERIES, strict=False))
PARTS = dict(zip(("teacher", "student", "backward", "optimizer", "loss", "loader"), SERIES, strict=False))
PARTS |= {"other": MUTED, "idle": charts.GRID}


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@charts.styled
def plot_kd_loss(rows: list[Row], path: Path) -> None:
    """Two panels over the shapes: how many times slower each contender is, and kd_loss's percent of the roofline."""
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
        found = {
            (int(r["rows"]), int(r["classes"])): float(r["speedup_of_ours"]) for r in headline if r["contender"] == name
        }
        ratios.plot(labels, [found.get(shape) for shape in shapes], marker="o", color=COLOURS[name], label=name)
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
    """A panel per case: milliseconds an image by arm, a bar in the parts where the time goes."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    counts = [sum(row["case"] == case for row in rows) for case in cases]
    figure, axes = charts.figure(640, 17 * sum(counts) + 60 * len(cases) + 24, len(cases), 1, height_ratios=counts)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        mine = [row for row in rows if row["case"] == case][::-1]
        labels = [row["arm"] + ("" if row["loader"] == "synthetic" else f", {row['loader']}") for row in mine]
        whole = [float(row["median_ms"]) / int(row["batch"]) for row in mine]
        left = [0.0] * len(mine)
        for name in PARTS:
            widths = [ms * float(row[f"share_{name}"]) for ms, row in zip(whole, mine, strict=True)]
            axis.barh(range(len(mine)), widths, left=left, color=PARTS[name], label=name, height=0.75)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(mine)), labels)
        axis.set_xlabel("ms an image")
        axis.set_title(f"{case}, batch {mine[0]['batch']}")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=len(names), loc="outside lower center")
    charts.save(figure, path, "milliseconds an image by arm, in parts")


def page_kd_loss(path: Path, out: Path) -> Path:
    rows = read(path)
    plot = out / f"{path.stem}.svg"
    plot_kd_loss(rows, plot)
    page = out / f"{path.stem}.md"
    title = f"kd_loss, forward + backward: {rows[0]['device']}"
    text = (
        f"# {title}\n\n"
        "Every row was checked against the float64 reference before it was timed; contenders took turns within each\n"
        "round, and a cell is a median over rounds. vs X: the median of X's time over kd_loss's in the same round.\n"
        "% of triad: the bytes that must move (read student, read teacher of selected rows, write gradient) against\n"
        "the bandwidth of a = b + s * c measured in the same run. Other divergences are compared with the same loss\n"
        "as PyTorch ops, lrds_fast.reference. Peak memory is what the allocator held beyond the inputs.\n\n"
        f"![speed-up and percent of the roofline by shape]({plot.name})\n\n{table(rows)}\n"
    )
    page.write_text(text, encoding="utf-8")
    return page


def page_linear_kd_loss(path: Path, out: Path) -> Path:
    rows = read(path)
    page = out / f"{path.stem}.md"
    page.write_text(
        f"# linear_kd_loss, forward + backward: {rows[0]['device']}\n\n"
        "Every contender was checked against the float64 reference before it was timed; they took turns within each\n"
        "round. Peak: memory above what was there before the call, the gradients included. Liger's losses revise no\n"
        f"label.\n\n{bench_linear_kd_loss.table(rows)}\n",
        encoding="utf-8",
    )
    return page


def page_bandwidth(path: Path, out: Path) -> Path:
    rows = read(path)
    page = out / f"{path.stem}.md"
    page.write_text(
        f"# kd_loss, forward + backward, against memory bandwidth: {rows[0]['device']}\n\n"
        "% of triad: the bytes that must move (read student, read teacher, write gradient) a second over those of\n"
        "a = b + s * c in the same round. memory: what becomes of a gradient that is dropped. Returned to the\n"
        "operating system, as glibc does with large blocks, the next one costs page faults; jemalloc, tcmalloc, or\n"
        "glibc with `MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647` keep it for the\n"
        "next step.\n\n"
        f"{bench_bandwidth.table(rows)}\n",
        encoding="utf-8",
    )
    return page


def page_influence(path: Path, out: Path) -> Path:
    rows = read(path)
    page = out / f"{path.stem}.md"
    page.write_text(
        f"# Influence scores: {rows[0]['device']}\n\n"
        "Process time of one thread per sample, per pair for the pairs; medians of interleaved rounds. self: EK-FAC\n"
        "self-influence of a linear head with 512 inputs, all with kronfluence's factors. ours: from a model\n"
        "and a dataset, forward and backward included, as kronfluence and captum run. closed form: from features and\n"
        "logits. plain: the same in three lines of PyTorch over all rows at once. pairs: products of last-layer\n"
        "gradients, 256 queries; captum's lack the bias. pairs-ekfac: 64 queries under EK-FAC. resnet20: EK-FAC\n"
        "self-influence over all convolutions and the head. Results were compared before anything was timed.\n\n"
        f"{bench_influence.table(rows)}\n",
        encoding="utf-8",
    )
    return page


def page_lds(path: Path, out: Path) -> Path:
    rows = read(path)
    page = out / f"{path.stem}.md"
    page.write_text(
        f"# Linear datamodeling score of influence scores: {rows[0]['device']}\n\n"
        f"An MLP is trained again on {rows[0]['halves']} random halves of the training set, {rows[0]['seeds']} seeds"
        " each. LDS:\n"
        "rank correlation over the halves between a query's loss and the sum of its influences from the half, mean\n"
        "over the queries. The interval resamples halves and queries. All contenders share them: differences\n"
        "between two are surer than their intervals. CPU seconds: from a model and the data to every pair's\n"
        "score, factors included.\n\n"
        "digits: scikit-learn's, MLP 64-64-10. cifar: ten classes of CIFAR-100 at 16 x 16, MLP 768-128-10. same\n"
        "label: the cosine of the inputs, negative across classes.\n\n"
        f"{bench_lds.table(rows)}\n",
        encoding="utf-8",
    )
    return page


def page_influence_scale(path: Path, out: Path) -> Path:
    rows = read(path)
    page = out / f"{path.stem}.md"
    page.write_text(
        f"# Scores at ImageNet's size: {rows[0]['device']}\n\n"
        "Six scores (kd_gain, self_influence, param_shift, conflict, el2n, ce) of every sample by one call of\n"
        "influence.score with out=: forward passes of student and teacher (linear heads on synthetic features, drawn\n"
        "as they are read), EK-FAC factors over all samples, held-out gradient, Parquet. Peak memory is the\n"
        "process's, its libraries included; disk is what the run holds there until it ends.\n\n"
        f"{bench_influence_scale.table(rows)}\n",
        encoding="utf-8",
    )
    return page


def page_cifar100(path: Path, out: Path) -> Path:
    page = out / f"{path.stem}.md"
    page.write_text(cifar100_runs.page(path.read_text(encoding="utf-8")), encoding="utf-8")
    return page


def page_train(path: Path, out: Path) -> Path:
    rows = read(path)
    steps = [row for row in rows if row["part"] == "step"]
    page = out / f"{path.stem}.md"
    picture = ""
    if steps:
        plot = out / f"{path.stem}.svg"
        plot_train(steps, plot)
        picture = f"![milliseconds an image by arm, in parts]({plot.name})\n\n"
    page.write_text(
        f"# A distillation step, teacher included: {rows[0]['device']}\n\n"
        "baseline: the step as mdistiller writes it, with label revision (float32, NCHW, eager losses, teacher on\n"
        "every row, torchvision's loaders). tuned: the same in bfloat16, channels_last and torch.compile. ours: the\n"
        "trainer's. checked: how far one step of ours in float32 moves the parameters from where the baseline's, with\n"
        "the same rows masked, takes them, over the length of its step; update error: the same, as the arm is timed\n"
        "(bfloat16 alone moves a network that has not learned anything as far, a deep one without shortcuts farther).\n"
        "vs baseline: the median over rounds of the baseline's time over the arm's, with its range; prepared batches\n"
        "against prepared, loaded against the published loader. of its ceiling: images/s over the same arm's on\n"
        "prepared batches. Shares are torch.profiler's. Weights are random: the numbers are of speed alone.\n\n"
        f"{picture}{bench_train.table(rows)}\n",
        encoding="utf-8",
    )
    return page


def page_plain(path: Path, out: Path) -> Path:
    """Any other run, as it is stored."""
    rows = read(path)
    hidden = {"device", "threads", "torch", "cuda", "lrds_fast", "commit", "isa", "command", "triad_gb_s", "copy_gb_s"}
    columns = [name for name in rows[0] if name not in hidden]
    lines = [f"# {path.stem}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[name] or "" for name in columns) + " |" for row in rows]
    facts = ", ".join(f"{name} {rows[0][name]}" for name in rows[0] if name in hidden and rows[0][name])
    page = out / f"{path.stem}.md"
    page.write_text("\n".join([*lines, "", facts, ""]), encoding="utf-8")
    return page


def render(path: Path, out: Path) -> Path:
    """Writes the page of one CSV into `out`; returns its path. ValueError for a file without rows."""
    if not read(path):
        raise ValueError(f"{path} holds no rows")
    out.mkdir(parents=True, exist_ok=True)
    if path.stem.startswith("kd_loss"):
        return page_kd_loss(path, out)
    if path.stem.startswith("linear_kd_loss"):
        return page_linear_kd_loss(path, out)
    if path.stem.startswith("bandwidth"):
        return page_bandwidth(path, out)
    if path.stem.startswith("lds"):
        return page_lds(path, out)
    if path.stem.startswith("influence_scale"):
        return page_influence_scale(path, out)
    if path.stem.startswith("cifar100"):
        return page_cifar100(path, out)
    if path.stem.startswith("method_features"):
        return lab_statistics.render(path, out)
    if path.stem.startswith("method_networks"):
        return lab_networks.render(path, out)
    if path.stem.startswith("train"):
        return page_train(path, out)
    if path.stem.startswith("influence"):
        return page_influence(path, out)
    return page_plain(path, out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="*", type=Path, help="stored runs (default: benchmarks/results/*.csv)")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the pages (default: docs/benchmarks)")
    arguments = parser.parse_args(argv)
    for path in arguments.csv or sorted(RESULTS.glob("*.csv")):
        sys.stdout.write(f"{render(path, arguments.out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
