"""Influence scores against other packages that compute them: process time of one CPU thread per sample.

    python -m benchmarks.bench_influence                    this machine's CPU; packages not installed are left out
    python -m benchmarks.bench_influence --quick            small cases
    python -m benchmarks.bench_influence --markdown results/influence_cpu.csv    a stored run as a table

Cases. self: EK-FAC self-influence of a linear head, d = 512 inputs, all contenders with kronfluence's factors. pairs:
products of last-layer gradients, every query with every sample, as captum's TracInCPFast computes them; ours have the
bias. pairs-ekfac: the same under EK-FAC, against kronfluence. resnet20: EK-FAC self-influence over all convolutions and
the head.

"ours" is the call that a user makes, from a model and a dataset: forward pass, backward pass, score. "closed form"
starts from features and logits, as last_layer_scores and scoring in the training loop do. "plain" is the closed form in
three lines of PyTorch over all rows at once. Before anything is timed the contenders' results are compared. Contenders
take turns within a round, and a row holds medians. Slow packages get fewer samples: the numbers are per sample (or
pair).
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.peers import Kronfluence, captum_last_layer, has, pairwise_scores
from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, write_csv
from lrds_fast import influence, models
from lrds_fast.functional import kd_logit_gradient
from lrds_fast.influence.curvature import Eigenbasis, LayerRows
from lrds_fast.influence.last_layer import LastLayer
from lrds_fast.influence.objective import TrainingObjective
from lrds_fast.influence.scores import parse_score_names
from lrds_fast.nn import KDLoss


@dataclass(frozen=True)
class Contender:
    """A function that returns scores, and the number of samples (or pairs) that it scores."""

    run: Callable[[], Tensor]
    count: int


def classes_and_inputs(rows: int, classes: int, *shape: int) -> TensorDataset:
    """Normal inputs (rows, *shape) and targets (rows,) int64."""
    generator = torch.Generator().manual_seed(rows + classes)
    return TensorDataset(torch.randn(rows, *shape, generator=generator), torch.arange(rows) % classes)


def first(data: TensorDataset, rows: int) -> TensorDataset:
    """The first rows of a dataset."""
    return TensorDataset(*(tensor[:rows] for tensor in data.tensors))


def basis_of(factors: influence.Factors, layer: str) -> Eigenbasis:
    """The layer's EK-FAC factors as the closed form takes them."""
    block = factors.blocks[layer]
    assert block.qg is not None
    assert block.qa is not None
    return Eigenbasis(block.eigenvalues[0], block.qg[0], block.qa[0], factors.damping[layer], torch.float32)


def self_of_head(classes: int, rows: int, peer_rows: int, folder: Path) -> dict[str, Contender]:
    """EK-FAC self-influence of a linear head."""
    width = 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, classes)).eval()
    data = classes_and_inputs(rows, classes, width)
    h, y = data.tensors
    with torch.no_grad():
        z = model(h)
    contenders: dict[str, Contender] = {}
    if has("kronfluence"):
        peer = Kronfluence(model, ["0"], first(data, peer_rows), folder, batch=min(128, peer_rows))
        peer.fit()
        factors = peer.factors()
        contenders["kronfluence"] = Contender(peer.self_influence, peer_rows)
    else:
        factors = influence.Factors.fit(model, h[:2048].split(256))
    basis = basis_of(factors, "0")
    layer = LastLayer(LayerRows(h, z, True), z, y, torch.float32, TrainingObjective(KDLoss(), "gt"))
    layer.use(basis)
    names = parse_score_names("self_influence")

    def closed_form() -> Tensor:
        return torch.cat([layer.scores(part, names)[0]["self_influence"] for part in layer.parts(names)])

    def plain() -> Tensor:
        delta = kd_logit_gradient(z, z, y, temperature=1.0, ce_weight=1.0, kd_weight=0.0, revise=None)
        inputs = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        return basis.quadratic(delta, basis.prepare(inputs, 1), 1)

    contenders["plain"] = Contender(plain, rows)
    contenders["closed form"] = Contender(closed_form, rows)
    contenders["ours"] = Contender(lambda: influence.self_influence(model, data, factors=factors, progress=False), rows)
    return contenders


def pairs_of_head(classes: int, rows: int, queries: int) -> dict[str, Contender]:
    """Products of last-layer gradients; captum's are those of the weight without the bias."""
    width = 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(width, classes)).eval()
    data, query_data = classes_and_inputs(rows, classes, width), classes_and_inputs(queries, classes, width)
    factors = influence.Factors.fit(model, data.tensors[0][:1024].split(256), curvature="identity")
    contenders: dict[str, Contender] = {}
    if has("captum"):
        peer = captum_last_layer(model, data, 256)
        contenders["captum"] = Contender(lambda: peer.influence(query_data.tensors), rows * queries)
    contenders["ours"] = Contender(lambda: pairwise_scores(model, query_data, data, factors), rows * queries)
    return contenders


def ekfac_pairs_of_head(classes: int, rows: int, queries: int, folder: Path) -> dict[str, Contender]:
    """EK-FAC influence of every sample on every query."""
    width = 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, classes)).eval()
    data, query_data = classes_and_inputs(rows, classes, width), classes_and_inputs(queries, classes, width)
    contenders: dict[str, Contender] = {}
    if has("kronfluence"):
        peer = Kronfluence(model, ["0"], data, folder, batch=128)
        peer.fit()
        factors = peer.factors()
        contenders["kronfluence"] = Contender(lambda: peer.pairwise(query_data), rows * queries)
    else:
        factors = influence.Factors.fit(model, data.tensors[0].split(256))
    contenders["ours"] = Contender(lambda: pairwise_scores(model, query_data, data, factors), rows * queries)
    return contenders


def self_of_resnet(rows: int, peer_rows: int, folder: Path) -> dict[str, Contender]:
    """EK-FAC self-influence over all convolutions and the head of a CIFAR network."""
    torch.manual_seed(0)
    model = models.create("resnet20", num_classes=100).eval()
    data = classes_and_inputs(rows, 100, 3, 32, 32)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    contenders: dict[str, Contender] = {}
    if has("kronfluence"):
        peer = Kronfluence(_plain_modules(model), layers, first(data, peer_rows), folder, batch=64)
        peer.fit()
        factors = peer.factors()
        contenders["kronfluence"] = Contender(peer.self_influence, peer_rows)
    else:
        factors = influence.Factors.fit(model, data.tensors[0].split(64), layers=layers)
    factors.model = influence.factors.fingerprint(model)
    contenders["ours"] = Contender(
        lambda: influence.self_influence(model, data, factors=factors, batch_size=32, progress=False),
        rows,
    )
    return contenders


def _plain_modules(model: nn.Module) -> nn.Module:
    """The model without its check that the head is an nn.Linear: kronfluence wraps the head in another module."""

    class Plain(type(model)):  # type: ignore[misc]
        head = property(lambda self: getattr(self, self.head_name))

    model.__class__ = Plain
    return model


def check(name: str, contenders: dict[str, Contender]) -> None:
    """Compares the contenders on the samples that all of them score. Raises ValueError where they differ."""
    results = {name: contender.run().double() for name, contender in contenders.items()}
    ours = results["ours"]
    for key, result in results.items():
        part = ours[..., : result.shape[-1]]
        if key == "captum":
            # Without the bias: our product has one more term, d_q . d_i, which hardly changes the correlation.
            agreement = float(torch.corrcoef(torch.stack([part.flatten(), result.flatten()]))[0, 1])
            wrong = agreement < 0.99
        else:
            agreement = float((part - result).norm() / result.norm())
            wrong = agreement > 1e-4
        if wrong:
            raise ValueError(f"{name}: {key} and ours do not agree ({agreement:.2e})")


def run_case(name: str, contenders: dict[str, Contender], rounds: int) -> list[Row]:
    """Checks and times the contenders of a case; a row for each."""
    check(name, contenders)
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, contender in contenders.items():
            start = time.process_time()
            contender.run()
            seconds[key].append((time.process_time() - start) / contender.count)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "case": name,
            "contender": key,
            "samples": contenders[key].count,
            "microseconds": value * 1e6,
            "min_microseconds": min(seconds[key]) * 1e6,
            "max_microseconds": max(seconds[key]) * 1e6,
            "times_ours": value / medians["ours"],
            "times_closed_form": value / medians["closed form"] if "closed form" in medians else "",
        }
        for key, value in medians.items()
    ]


def table(rows: list[Row]) -> str:
    header = ["case", "contender", "us", "min to max", "of ours", "of the closed form"]
    body = []
    for row in rows:
        median, low, high = (float(row[name]) for name in ("microseconds", "min_microseconds", "max_microseconds"))
        closed_form = f"{float(row['times_closed_form']):.3g}x" if row["times_closed_form"] not in ("", None) else ""
        cells = [row["case"], row["contender"], f"{median:.3g}", f"{low:.3g} to {high:.3g}"]
        body.append([*cells, f"{float(row['times_ours']):.3g}x", closed_form])
    return "\n".join([*markdown_table(header, body), "", origin(rows[0])])


def cases(quick: bool, folder: Path) -> dict[str, Callable[[], dict[str, Contender]]]:
    """Name of each case -> what makes its contenders. folder: where kronfluence keeps its factors."""
    sizes = {
        "self, C = 100": (1024, 64) if quick else (16384, 512),
        "self, C = 1000": (512, 16) if quick else (8192, 128),
        "pairs, C = 100": (512, 16) if quick else (8192, 256),
        "pairs-ekfac, C = 100": (256, 8) if quick else (1024, 64),
        "resnet20": (16, 16) if quick else (192, 192),
    }
    return {
        "self, C = 100": lambda: self_of_head(100, *sizes["self, C = 100"], folder / "a"),
        "self, C = 1000": lambda: self_of_head(1000, *sizes["self, C = 1000"], folder / "b"),
        "pairs, C = 100": lambda: pairs_of_head(100, *sizes["pairs, C = 100"]),
        "pairs-ekfac, C = 100": lambda: ekfac_pairs_of_head(100, *sizes["pairs-ekfac, C = 100"], folder / "c"),
        "resnet20": lambda: self_of_resnet(*sizes["resnet20"], folder / "d"),
    }


def main() -> int:
    parser = suite_parser(__doc__, quick="small cases")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parse_suite(parser, table, cpu_only=True)
    if arguments is None:
        return 0
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in cases(arguments.quick, Path(folder)).items():
            for row in run_case(name, make(), 1 if arguments.quick else arguments.rounds):
                rows.append(row | facts("cpu"))
                say(f"{name}: {row['contender']} {row['microseconds']:.3g} us, {row['times_ours']:.3g}x")
            if arguments.csv is not None:
                write_csv(arguments.csv, rows)
    say(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
