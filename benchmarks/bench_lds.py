"""Linear datamodeling score (LDS): do influence scores foresee what retraining on half of the data does?

    python -m benchmarks.bench_lds               100 halves x 5 seeds; peers not installed are left out
    python -m benchmarks.bench_lds --quick       20 halves x 1 seed, digits only
    python -m benchmarks.bench_lds --markdown results/lds_cpu.csv    a stored run as a table

Park et al. 2023 (arXiv:2303.14186). An MLP is trained again on random halves of the training set, with several
initialisations each. Every contender scores each training sample's influence on each query from models trained on all
of the data, and foretells a half by the sum over its samples. Its LDS is the rank correlation, over the halves, of that
sum and the query's mean output among the half's models; a row holds the mean over the queries and a 95% interval from
resampling halves and queries. The output is minus the query's loss; TRAK's, the margin log(p / (1 - p)), is a
monotone function of it. The models of a half are the same for every contender.

Cases. digits: scikit-learn's digits, MLP 64-64-10. cifar: ten classes of CIFAR-100 from LRDS_DATA, colour pictures
averaged to 16 x 16, MLP 768-128-10.

"5 models" is the mean of the scores from five models, as TRAK does too; "same label" is the trivial baseline: the
cosine of the inputs where the labels agree, minus it where they do not.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.bench_kd_loss import Row, facts, write_csv
from benchmarks.peers import Kronfluence, captum_last_layer, dattri_ekfac, has, trak
from lrds_fast import influence

MODELS = 5  # of the contenders that take several


@dataclass(frozen=True)
class Problem:
    """A data set with the architecture and training that suit it."""

    x: Tensor
    y: Tensor
    queries: Tensor
    query_y: Tensor
    hidden: int
    epochs: int
    batch: int = 50
    rate: float = 0.1
    decay: float = 1e-3

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1

    @property
    def train_set(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    @property
    def query_set(self) -> TensorDataset:
        return TensorDataset(self.queries, self.query_y)


def digits(queries: int) -> Problem:
    from sklearn.datasets import load_digits

    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    return Problem(
        pixels[:1200], labels[:1200], pixels[1200 : 1200 + queries], labels[1200 : 1200 + queries], 64, epochs=40
    )


def cifar(queries: int) -> Problem | None:
    """Ten classes of CIFAR-100; None without LRDS_DATA."""
    folder = Path(os.environ.get("LRDS_DATA", "")) / "cifar100"
    if not (folder / "labels.npz").is_file():
        return None
    from PIL import Image

    labels = np.load(folder / "labels.npz")
    found = []
    for split, sheets in (("train", 20), ("test", 4)):
        keep = torch.from_numpy(labels[split].astype(np.int64)) < 10
        parts = []
        for number in range(sheets):
            sheet = np.asarray(Image.open(folder / f"{split}_{number:02d}.webp").convert("RGB"))
            parts.append(sheet.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(2500, 32, 32, 3))
        pictures = torch.from_numpy(np.concatenate(parts))[keep].permute(0, 3, 1, 2).float() / 255
        small = F.avg_pool2d((pictures - 0.48) / 0.26, 2).flatten(1)
        found += [small, torch.from_numpy(labels[split].astype(np.int64))[keep]]
    x, y, queried, query_y = found
    return Problem(x, y, queried[:queries], query_y[:queries], 128, epochs=12, decay=5e-3, rate=0.05)


def train(problem: Problem, subsets: Tensor, seed: int, together: int = 20) -> list[Tensor]:
    """MLPs (K models), one on each row of subsets (K, m): their weights (K, in + 1, hidden), (K, hidden + 1, classes).

    SGD with momentum 0.9, weight decay on the whole objective, a cosine schedule; many models at once by batched
    products. The k-th model depends on its subset, the seed and k, not on how many are trained together.
    """
    parts = [
        _train(problem, part, seed * 1_000_003 + first)
        for first, part in zip(range(0, len(subsets), together), subsets.split(together), strict=True)
    ]
    return [torch.cat(side) for side in zip(*parts, strict=True)]


def _train(problem: Problem, subsets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    models, size = subsets.shape
    generators = [torch.Generator().manual_seed(seed + k) for k in range(models)]
    weights = []
    for inputs, outputs in ((problem.x.shape[1], problem.hidden), (problem.hidden, problem.classes)):
        drawn = torch.stack([torch.randn(inputs, outputs, generator=g) for g in generators]) * (2 / inputs) ** 0.5
        weights.append(torch.cat([drawn, drawn.new_zeros(models, 1, outputs)], dim=1).requires_grad_())
    optimizer = torch.optim.SGD(weights, lr=problem.rate, momentum=0.9, weight_decay=problem.decay)
    steps = problem.epochs * (size // problem.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(problem.epochs):
        order = torch.stack([torch.randperm(size, generator=g) for g in generators])
        for place in order.split(problem.batch, dim=1):
            if place.shape[1] < problem.batch:
                continue
            rows = subsets.gather(1, place)
            logits = outputs_of(weights, problem.x[rows])
            loss = F.cross_entropy(logits.flatten(0, 1), problem.y[rows].flatten(), reduction="sum") / problem.batch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    first, second = (weight.detach() for weight in weights)
    return first, second


def outputs_of(weights: list[Tensor], x: Tensor) -> Tensor:
    """(K, B, classes), x (K, B, in)."""
    first, second = weights
    hidden = torch.baddbmm(first[:, -1:], x, first[:, :-1]).relu()
    return torch.baddbmm(second[:, -1:], hidden, second[:, :-1])


def module_of(weights: list[Tensor], k: int) -> nn.Sequential:
    """The k-th model as modules."""
    layers = [nn.Linear(weight.shape[1] - 1, weight.shape[2]) for weight in weights]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight[k, :-1].T)
            layer.bias.copy_(weight[k, -1])
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


def measured(problem: Problem, subsets: Tensor, seeds: int) -> Tensor:
    """(halves, queries) what retraining gave: log-likelihood of the query, the mean over the seeds."""
    total = torch.zeros(len(subsets), len(problem.queries), dtype=torch.float64)
    for seed in range(seeds):
        weights = train(problem, subsets, seed)
        logits = outputs_of(weights, problem.queries.expand(len(subsets), -1, -1)).double()
        total += logits.log_softmax(-1).gather(-1, problem.query_y.expand(len(subsets), -1)[..., None])[..., 0]
    return total / seeds


def lds(scores: Tensor, subsets: Tensor, outputs: Tensor, draws: int = 100) -> tuple[float, float, float]:
    """Mean rank correlation over queries, and its 95% interval; scores (queries, N), outputs (halves, queries)."""
    foretold = torch.stack([scores[:, rows].sum(dim=1) for rows in subsets]).double().numpy()
    seen = outputs.numpy()

    def correlations(halves: slice | np.ndarray) -> np.ndarray:
        a, b = (rankdata(values[halves], axis=0) for values in (foretold, seen))
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        found: np.ndarray = (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
        return found

    mean = float(correlations(slice(None)).mean())
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(draws):
        found = correlations(random.integers(len(subsets), size=len(subsets)))
        drawn.append(found[random.integers(len(found), size=len(found))].mean())
    # Halves drawn twice tie, which moves the mean: the interval's width is what resampling tells.
    low, high = np.quantile(np.array(drawn) - np.mean(drawn), [0.025, 0.975])
    return mean, mean + float(low), mean + float(high)


def influences(model: nn.Module, problem: Problem, curvature: str, layers: str | list[str]) -> Tensor:
    """(queries, N) ours, from a model and the data."""
    if layers == "last":
        layers = ["2"]
    batches = problem.x.split(256)
    factors = influence.Factors.fit(model, batches, layers=layers, curvature=curvature, labels="all")
    found = influence.pairwise(model, problem.query_set, problem.train_set, factors=factors, progress=False)
    assert isinstance(found, Tensor)
    return found


def same_label(problem: Problem) -> Tensor:
    """Cosine of the inputs, with the sign of whether the labels agree."""
    cosine = F.normalize(problem.queries, dim=1) @ F.normalize(problem.x, dim=1).T
    return torch.where(problem.query_y[:, None] == problem.y, cosine, -cosine)


def contenders(problem: Problem, models: list[nn.Sequential], folder: Path) -> dict[str, Callable[[], Tensor]]:
    """What gives (queries, N)."""
    model = models[0]
    found: dict[str, Callable[[], Tensor]] = {
        "ours, ekfac": lambda: influences(model, problem, "ekfac", "all"),
        "ours, ekfac, 5 models": lambda: torch.stack(
            [influences(each, problem, "ekfac", "all") for each in models]
        ).mean(dim=0),
        "ours, kfac": lambda: influences(model, problem, "kfac", "all"),
        "ours, identity": lambda: influences(model, problem, "identity", "all"),
        "ours, ekfac, last layer": lambda: influences(model, problem, "ekfac", "last"),
        "same label": lambda: same_label(problem),
    }
    if has("kronfluence"):
        peer = Kronfluence(model, ["0", "2"], problem.train_set, folder / "kronfluence", batch=64)

        def kronfluence() -> Tensor:
            peer.fit()
            return peer.pairwise(problem.query_set)

        found["kronfluence, ekfac"] = kronfluence
        found["ours, kronfluence's factors"] = lambda: influence.pairwise(
            model, problem.query_set, problem.train_set, factors=peer.factors(), progress=False
        )
    if has("captum"):
        captum = captum_last_layer(model, problem.train_set, 256)
        found["captum, TracInCPFast"] = lambda: captum.influence(problem.query_set.tensors)
    if has("dattri"):
        found["dattri, EK-FAC"] = lambda: dattri_ekfac(model, problem.train_set, problem.query_set)
    if has("trak"):
        found["TRAK"] = lambda: trak([model], problem.train_set, problem.query_set, folder / "trak1")
        found["TRAK, 5 models"] = lambda: trak(models, problem.train_set, problem.query_set, folder / "trak5")
    return found


def run_case(name: str, problem: Problem, halves: int, seeds: int, folder: Path) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    size = len(problem.x) // 2
    subsets = torch.stack([torch.randperm(len(problem.x), generator=generator)[:size] for _ in range(halves)])
    outputs = measured(problem, subsets, seeds)
    weights = train(problem, torch.arange(len(problem.x)).expand(MODELS, -1), seeds)
    models = [module_of(weights, k) for k in range(MODELS)]
    rows: list[Row] = []
    for contender, run in contenders(problem, models, folder).items():
        start = time.process_time()
        scores = run().double()
        seconds = time.process_time() - start
        if scores.shape != (len(problem.queries), len(problem.x)) or not scores.isfinite().all():
            raise ValueError(f"{name}: {contender} gave {tuple(scores.shape)}, or values that are not finite")
        mean, low, high = lds(scores, subsets, outputs)
        row: Row = {"case": name, "contender": contender, "halves": halves, "seeds": seeds, "cpu_seconds": seconds}
        rows.append(row | {"lds": mean, "low": low, "high": high} | facts("cpu"))
        sys.stdout.write(f"{name}: {contender} {mean:.3f} ({low:.3f} to {high:.3f}), {seconds:.2f} s\n")
        sys.stdout.flush()
    return rows


def table(rows: list[Row]) -> str:
    header = ["case", "contender", "LDS", "95% interval", "CPU seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        mean, low, high, seconds = (float(row[key]) for key in ("lds", "low", "high", "cpu_seconds"))
        cells = [row["case"], row["contender"], f"{mean:.3f}", f"{low:.3f} to {high:.3f}", f"{seconds:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    found = rows[0]
    lines += ["", f"{found['device']}; torch {found['torch']}; commit {found['commit']}; `{found['command']}`."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="digits, 20 halves, one seed")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print a stored run as a table and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        with arguments.markdown.open(newline="", encoding="utf-8") as file:
            sys.stdout.write(table(list(csv.DictReader(file))) + "\n")
        return 0
    if arguments.device == "cuda":
        parser.error("the peers' CPU seconds are what this suite compares; run it with --device cpu")
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    halves, seeds, queries = (20, 1, 100) if arguments.quick else (100, 5, 200)
    cases: list[tuple[str, Callable[[int], Problem | None]]] = [("digits", digits)]
    if not arguments.quick:
        cases.append(("cifar", cifar))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in cases:
            problem = make(queries)
            if problem is None:
                sys.stdout.write(f"{name}: left out, LRDS_DATA is not set\n")
                continue
            rows += run_case(name, problem, halves, seeds, Path(folder) / name)
            if arguments.csv is not None:
                write_csv(arguments.csv, rows)
    sys.stdout.write("\n" + table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
