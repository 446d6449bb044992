"""Linear datamodeling score (LDS): do influence scores predict the outcome of retraining on half of the data?

    python -m benchmarks.bench_lds               100 halves x 5 seeds; packages not installed are left out
    python -m benchmarks.bench_lds --quick       20 halves x 1 seed, digits only
    python -m benchmarks.bench_lds --markdown results/lds_cpu.csv    a stored run as a table

Park et al. 2023 (arXiv:2303.14186). MLPs are retrained on random halves of the training set, with several
initialisations for each half. Every contender computes the influence of each training sample on each query from models
trained on all of the data; its prediction for a half is the sum of the influences of the half's samples. The LDS of a
query is the rank correlation, over the halves, of that prediction and the mean output of the half's models on the
query. A row holds the mean LDS of the queries and a 95% interval from resampling halves and queries. The output is
minus the loss of the query; TRAK's output, the margin log(p / (1 - p)), is a monotone function of it. All contenders
are compared with the same retrained models.

Cases. digits: scikit-learn's digits, MLP 64-64-10. cifar: ten classes of CIFAR-100 from LRDS_DATA, colour pictures
averaged to 16 x 16, MLP 768-128-10.

"5 models" is the mean of the scores of five models, for ours and for TRAK. "training's damping" is Problem.damping in
place of a tenth of the mean eigenvalue; "exact" solves with the Hessian of all layers together. "same label" is the
trivial baseline: the cosine of the inputs if the labels agree, minus the cosine if they do not.
"""

from __future__ import annotations

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

from benchmarks.peers import Kronfluence, captum_last_layer, dattri_ekfac, has, pairwise_scores, trak
from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, write_csv
from lrds_fast import influence

#: Models of the contenders that average over several.
MODELS = 5
MOMENTUM = 0.9


@dataclass(frozen=True)
class Problem:
    """A data set and how MLPs are trained on it.

    x (N, in) float32, y (N,) int64: the training set; queries, query_y: likewise. hidden: width of the one hidden
    layer. rate: the learning rate. decay: the weight decay.
    """

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
    def damping(self) -> float:
        """The weight decay + 1 / (sum of the learning rates / (1 - momentum)), of a training on all samples.

        Gradient descent that stops after steps of the rates r leaves a direction of curvature c short of its optimum,
        about as if c were larger by 1 / sum(r). Half the rate is the cosine schedule's mean.
        """
        steps = self.epochs * (len(self.x) // self.batch)
        return self.decay + (1 - MOMENTUM) / (self.rate / 2 * steps)

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
    """scikit-learn's digits, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    return Problem(
        pixels[:1200], labels[:1200], pixels[1200 : 1200 + queries], labels[1200 : 1200 + queries], 64, epochs=40
    )


def cifar(queries: int) -> Problem | None:
    """Ten classes of CIFAR-100 at 16 x 16; None if LRDS_DATA does not hold it."""
    folder = Path(os.environ.get("LRDS_DATA", "")) / "cifar100"
    if not (folder / "labels.npz").is_file():
        return None
    from PIL import Image

    labels = np.load(folder / "labels.npz")
    tensors = []
    for split, sheets in (("train", 20), ("test", 4)):
        keep = torch.from_numpy(labels[split].astype(np.int64)) < 10
        parts = []
        for number in range(sheets):
            sheet = np.asarray(Image.open(folder / f"{split}_{number:02d}.webp").convert("RGB"))
            parts.append(sheet.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(2500, 32, 32, 3))
        pictures = torch.from_numpy(np.concatenate(parts))[keep].permute(0, 3, 1, 2).float() / 255
        small = F.avg_pool2d((pictures - 0.48) / 0.26, 2).flatten(1)
        tensors += [small, torch.from_numpy(labels[split].astype(np.int64))[keep]]
    x, y, test_x, query_y = tensors
    return Problem(x, y, test_x[:queries], query_y[:queries], 128, epochs=12, decay=5e-3, rate=0.05)


def train(problem: Problem, subsets: Tensor, seed: int, together: int = 20) -> list[Tensor]:
    """Trains K MLPs, one on each row of subsets (K, m) int64; returns their weights, (K, in + 1, hidden) and
    (K, hidden + 1, classes), the bias in the last row.

    SGD with momentum 0.9, weight decay in the objective, a cosine schedule. `together` models share batched products;
    the k-th model depends on its subset, the seed and k alone.
    """
    parts = [
        _train(problem, part, seed * 1_000_003 + first)
        for first, part in zip(range(0, len(subsets), together), subsets.split(together), strict=True)
    ]
    return [torch.cat(side) for side in zip(*parts, strict=True)]


def _train(problem: Problem, subsets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """`train` with all models in one product; model k has the seed seed + k."""
    models, size = subsets.shape
    generators = [torch.Generator().manual_seed(seed + k) for k in range(models)]
    weights = []
    for inputs, outputs in ((problem.x.shape[1], problem.hidden), (problem.hidden, problem.classes)):
        weight = torch.stack([torch.randn(inputs, outputs, generator=g) for g in generators]) * (2 / inputs) ** 0.5
        weights.append(torch.cat([weight, weight.new_zeros(models, 1, outputs)], dim=1).requires_grad_())
    optimizer = torch.optim.SGD(weights, lr=problem.rate, momentum=MOMENTUM, weight_decay=problem.decay)
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
    """Logits (K, B, classes) of K models, each on its own batch; x (K, B, in)."""
    first, second = weights
    hidden = torch.baddbmm(first[:, -1:], x, first[:, :-1]).relu()
    return torch.baddbmm(second[:, -1:], hidden, second[:, :-1])


def module_of(weights: list[Tensor], k: int) -> nn.Sequential:
    """The k-th of the stacked models as an nn.Sequential."""
    layers = [nn.Linear(weight.shape[1] - 1, weight.shape[2]) for weight in weights]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight[k, :-1].T)
            layer.bias.copy_(weight[k, -1])
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


def retrained(problem: Problem, subsets: Tensor, seeds: int) -> Tensor:
    """(halves, queries) float64: the log-likelihood of each query after retraining, the mean over the seeds."""
    total = torch.zeros(len(subsets), len(problem.queries), dtype=torch.float64)
    for seed in range(seeds):
        weights = train(problem, subsets, seed)
        logits = outputs_of(weights, problem.queries.expand(len(subsets), -1, -1)).double()
        total += logits.log_softmax(-1).gather(-1, problem.query_y.expand(len(subsets), -1)[..., None])[..., 0]
    return total / seeds


def rank_correlations(predictions: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """(queries,) Spearman's correlation over the halves; both (halves, queries)."""
    a, b = (rankdata(values, axis=0) for values in (predictions, outputs))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    correlations: np.ndarray = (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return correlations


def lds(scores: Tensor, subsets: Tensor, outputs: Tensor, draws: int = 100) -> tuple[float, float, float]:
    """The mean LDS of the queries and its 95% interval from `draws` resamplings of halves and queries.

    scores (queries, N); subsets (halves, m) int64, the samples of each half; outputs (halves, queries).
    """
    predictions = torch.stack([scores[:, rows].sum(dim=1) for rows in subsets]).double().numpy()
    mean = float(rank_correlations(predictions, outputs.numpy()).mean())
    random = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        halves = random.integers(len(subsets), size=len(subsets))
        correlations = rank_correlations(predictions[halves], outputs.numpy()[halves])
        means.append(correlations[random.integers(len(correlations), size=len(correlations))].mean())
    # A half that is drawn twice makes ties, which shift the mean; only the width of the interval is used.
    low, high = np.quantile(np.array(means) - np.mean(means), [0.025, 0.975])
    return mean, mean + float(low), mean + float(high)


def influences(
    model: nn.Module, problem: Problem, curvature: str, layers: str = "all", damping: float | None = None
) -> Tensor:
    """(queries, N) by this library, factors included.

    curvature: of the factors, or "exact" for conjugate gradients over all layers together, which EK-FAC preconditions.
    layers: "all", or "last" for the last layer alone. damping: absolute; None: the factors' default.
    """
    exact = curvature == "exact"
    factors = influence.Factors.fit(
        model,
        problem.x.split(256),
        layers=["2"] if layers == "last" else layers,
        curvature="ekfac" if exact else curvature,
        labels="all",
        damping=damping,
    )
    keywords = {"exact": True, "tolerance": 0.1, "batch_size": 1024} if exact else {}
    return pairwise_scores(model, problem.query_set, problem.train_set, factors, **keywords)


def same_label(problem: Problem) -> Tensor:
    """(queries, N): the cosine of the inputs, negated where the labels differ."""
    cosine = F.normalize(problem.queries, dim=1) @ F.normalize(problem.x, dim=1).T
    return torch.where(problem.query_y[:, None] == problem.y, cosine, -cosine)


def contenders(problem: Problem, models: list[nn.Sequential], folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that returns scores (queries, N)."""
    model = models[0]
    functions: dict[str, Callable[[], Tensor]] = {
        "ours, ekfac": lambda: influences(model, problem, "ekfac"),
        "ours, ekfac, 5 models": lambda: torch.stack([influences(each, problem, "ekfac") for each in models]).mean(0),
        "ours, ekfac, training's damping": lambda: influences(model, problem, "ekfac", damping=problem.damping),
        "ours, exact": lambda: influences(model, problem, "exact"),
        "ours, exact, training's damping": lambda: influences(model, problem, "exact", damping=problem.damping),
        "ours, kfac": lambda: influences(model, problem, "kfac"),
        "ours, identity": lambda: influences(model, problem, "identity"),
        "ours, ekfac, last layer": lambda: influences(model, problem, "ekfac", "last"),
        "same label": lambda: same_label(problem),
    }
    if has("kronfluence"):
        peer = Kronfluence(model, ["0", "2"], problem.train_set, folder / "kronfluence", batch=64)

        def kronfluence() -> Tensor:
            peer.fit()
            return peer.pairwise(problem.query_set)

        functions["kronfluence, ekfac"] = kronfluence
        functions["ours, kronfluence's factors"] = lambda: pairwise_scores(
            model, problem.query_set, problem.train_set, peer.factors()
        )
    if has("captum"):
        captum = captum_last_layer(model, problem.train_set, 256)
        functions["captum, TracInCPFast"] = lambda: captum.influence(problem.query_set.tensors)
    if has("dattri"):
        functions["dattri, EK-FAC"] = lambda: dattri_ekfac(model, problem.train_set, problem.query_set)
    if has("trak"):
        functions["TRAK"] = lambda: trak([model], problem.train_set, problem.query_set, folder / "trak1")
        functions["TRAK, 5 models"] = lambda: trak(models, problem.train_set, problem.query_set, folder / "trak5")
    return functions


def run_case(name: str, problem: Problem, halves: int, seeds: int, folder: Path) -> list[Row]:
    """Retrains the models and computes the LDS of every contender; a row for each."""
    generator = torch.Generator().manual_seed(1)
    size = len(problem.x) // 2
    subsets = torch.stack([torch.randperm(len(problem.x), generator=generator)[:size] for _ in range(halves)])
    outputs = retrained(problem, subsets, seeds)
    weights = train(problem, torch.arange(len(problem.x)).expand(MODELS, -1), seeds)
    models = [module_of(weights, k) for k in range(MODELS)]
    rows: list[Row] = []
    for contender, run in contenders(problem, models, folder).items():
        start = time.process_time()
        scores = run().double()
        seconds = time.process_time() - start
        expected = (len(problem.queries), len(problem.x))
        if scores.shape != expected:
            raise ValueError(f"{name}: {contender} must return scores {expected}; got {tuple(scores.shape)}")
        if not scores.isfinite().all():
            raise ValueError(f"{name}: {contender} returned scores that are not finite")
        mean, low, high = lds(scores, subsets, outputs)
        row: Row = {"case": name, "contender": contender, "halves": halves, "seeds": seeds, "cpu_seconds": seconds}
        rows.append(row | {"lds": mean, "low": low, "high": high} | facts("cpu"))
        say(f"{name}: {contender} {mean:.3f} ({low:.3f} to {high:.3f}), {seconds:.2f} s")
    return rows


def table(rows: list[Row]) -> str:
    header = ["case", "contender", "LDS", "95% interval", "CPU seconds"]
    body = []
    for row in rows:
        mean, low, high, seconds = (float(row[key]) for key in ("lds", "low", "high", "cpu_seconds"))
        cost = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
        body.append([row["case"], row["contender"], f"{mean:.3f}", f"{low:.3f} to {high:.3f}", cost])
    return "\n".join([*markdown_table(header, body), "", origin(rows[0])])


def main() -> int:
    arguments = parse_suite(suite_parser(__doc__, quick="digits, 20 halves, one seed"), table, cpu_only=True)
    if arguments is None:
        return 0
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
                say(f"{name}: left out, LRDS_DATA does not hold CIFAR-100")
                continue
            rows += run_case(name, problem, halves, seeds, Path(folder) / name)
            if arguments.csv is not None:
                write_csv(arguments.csv, rows)
    say(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
