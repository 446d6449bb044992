"""Influence scores against the packages that compute them: process time of one CPU thread per sample.

    python -m benchmarks.bench_influence                    this machine's CPU; peers not installed are left out
    python -m benchmarks.bench_influence --quick            small cases
    python -m benchmarks.bench_influence --markdown results/influence_cpu.csv    a stored run as a table

Cases. self: EK-FAC self-influence of a linear head, d = 512 inputs, under kronfluence's own factors. pairs: products of
last-layer gradients, every query with every sample, as captum's TracInCPFast has them, here with the bias. pairs-ekfac:
the same under EK-FAC, against kronfluence. resnet20: EK-FAC self-influence over all convolutions and the head.

"ours" is the call a user makes, from a model and a dataset: forward pass, backward pass, score. "closed form" starts
from features and logits, as last_layer_scores and scoring in the training loop do. "plain" is the closed form in three
lines of PyTorch over all rows at once. Every contender is compared with the others before it is timed; they take turns
within a round, a row holds medians. Peers see fewer samples where they are slow: the numbers are per sample (or pair).
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.bench_kd_loss import Row, facts, write_csv
from benchmarks.peers import Kronfluence, captum_last_layer, has
from lrds_fast import influence, models
from lrds_fast.functional import kd_logit_gradient
from lrds_fast.influence.curvature import Eigenbasis, LayerRows
from lrds_fast.influence.last_layer import LastLayer
from lrds_fast.influence.objective import TrainingObjective
from lrds_fast.influence.scores import parse_score_names
from lrds_fast.nn import KDLoss

# A contender: what to run, over how many samples (or pairs), and what came of it.
Contender = tuple[Callable[[], Tensor], int]


def classes_and_inputs(rows: int, classes: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(rows + classes)
    return TensorDataset(torch.randn(rows, *shape, generator=generator), torch.arange(rows) % classes)


def first(data: TensorDataset, rows: int) -> TensorDataset:
    return TensorDataset(*(tensor[:rows] for tensor in data.tensors))


def basis_of(factors: influence.Factors, layer: str) -> Eigenbasis:
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
    found: dict[str, Contender] = {}
    if has("kronfluence"):
        peer = Kronfluence(model, ["0"], first(data, peer_rows), folder, batch=min(128, peer_rows))
        peer.fit()
        factors = peer.factors()
        found["kronfluence"] = (peer.self_influence, peer_rows)
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

    found["plain"] = (plain, rows)
    found["closed form"] = (closed_form, rows)
    found["ours"] = (lambda: influence.self_influence(model, data, factors=factors, progress=False), rows)
    return found


def pairs_of_head(classes: int, rows: int, queries: int) -> dict[str, Contender]:
    """Gradient products of the last layer; captum's lack the bias, so it is compared on a head without one."""
    width = 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(width, classes)).eval()
    data, asked = classes_and_inputs(rows, classes, width), classes_and_inputs(queries, classes, width)
    factors = influence.Factors.fit(model, data.tensors[0][:1024].split(256), curvature="identity")
    found: dict[str, Contender] = {}
    if has("captum"):
        peer = captum_last_layer(model, data, 256)
        found["captum"] = (lambda: peer.influence(asked.tensors), rows * queries)
    found["ours"] = (
        lambda: influence.pairwise(model, [asked.tensors], data, factors=factors, progress=False),
        rows * queries,
    )
    return found


def ekfac_pairs_of_head(classes: int, rows: int, queries: int, folder: Path) -> dict[str, Contender]:
    """EK-FAC influence of every sample on every query."""
    width = 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, classes)).eval()
    data, asked = classes_and_inputs(rows, classes, width), classes_and_inputs(queries, classes, width)
    found: dict[str, Contender] = {}
    if has("kronfluence"):
        peer = Kronfluence(model, ["0"], data, folder, batch=128)
        peer.fit()
        factors = peer.factors()
        found["kronfluence"] = (lambda: peer.pairwise(asked), rows * queries)
    else:
        factors = influence.Factors.fit(model, data.tensors[0].split(256))
    found["ours"] = (
        lambda: influence.pairwise(model, asked, data, factors=factors, progress=False),
        rows * queries,
    )
    return found


def self_of_resnet(rows: int, peer_rows: int, folder: Path) -> dict[str, Contender]:
    """EK-FAC self-influence over all convolutions and the head of a CIFAR network."""
    torch.manual_seed(0)
    model = models.create("resnet20", num_classes=100).eval()
    data = classes_and_inputs(rows, 100, 3, 32, 32)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    found: dict[str, Contender] = {}
    if has("kronfluence"):
        peer = Kronfluence(_plain_modules(model), layers, first(data, peer_rows), folder, batch=64)
        peer.fit()
        factors = peer.factors()
        found["kronfluence"] = (peer.self_influence, peer_rows)
    else:
        factors = influence.Factors.fit(model, data.tensors[0].split(64), layers=layers)
    factors.model = influence.factors.fingerprint(model, layers)
    found["ours"] = (
        lambda: influence.self_influence(model, data, factors=factors, batch_size=32, progress=False),
        rows,
    )
    return found


def _plain_modules(model: nn.Module) -> nn.Module:
    """The model without its check that the head is an nn.Linear, which a wrapped one is not."""

    class Plain(type(model)):  # type: ignore[misc]
        head = property(lambda self: getattr(self, self.head_name))

    model.__class__ = Plain
    return model


def check(name: str, contenders: dict[str, Contender]) -> None:
    """All contenders agree on the samples that all of them see. Raises ValueError where they do not."""
    results = {key: run().double() for key, (run, _) in contenders.items()}
    ours = results["ours"]
    for key, result in results.items():
        part = ours[..., : result.shape[-1]]
        if key == "captum":
            # Without the bias: our product has one more term, d_q . d_i, which correlation shrugs off.
            agreement = float(torch.corrcoef(torch.stack([part.flatten(), result.flatten()]))[0, 1])
            wrong = agreement < 0.99
        else:
            agreement = float((part - result).norm() / result.norm())
            wrong = agreement > 1e-4
        if wrong:
            raise ValueError(f"{name}: {key} and ours do not agree ({agreement:.2e})")


def run_case(name: str, contenders: dict[str, Contender], rounds: int) -> list[Row]:
    check(name, contenders)
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, (run, count) in contenders.items():
            start = time.process_time()
            run()
            seconds[key].append((time.process_time() - start) / count)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "case": name,
            "contender": key,
            "samples": contenders[key][1],
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
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        numbers = [float(row[name]) for name in ("microseconds", "min_microseconds", "max_microseconds", "times_ours")]
        closed = f"{float(row['times_closed_form']):.3g}x" if row["times_closed_form"] not in ("", None) else ""
        cells = [row["case"], row["contender"], f"{numbers[0]:.3g}", f"{numbers[1]:.3g} to {numbers[2]:.3g}"]
        lines.append("| " + " | ".join([*cells, f"{numbers[3]:.3g}x", closed]) + " |")
    found = rows[0]
    lines += ["", f"{found['device']}; torch {found['torch']}; commit {found['commit']}; `{found['command']}`."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (process time counts them all)")
    parser.add_argument("--quick", action="store_true", help="small cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print a stored run as a table and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        with arguments.markdown.open(newline="", encoding="utf-8") as file:
            sys.stdout.write(table(list(csv.DictReader(file))) + "\n")
        return 0
    if arguments.device == "cuda":
        parser.error("process time of a CPU is what this suite compares; run it with --device cpu")
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    quick = arguments.quick
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:

        def at(name: str) -> Path:
            return Path(folder) / name

        cases: list[tuple[str, Callable[[], dict[str, Contender]]]] = [
            ("self, C = 100", lambda: self_of_head(100, 1024 if quick else 16384, 64 if quick else 512, at("a"))),
            ("self, C = 1000", lambda: self_of_head(1000, 512 if quick else 8192, 16 if quick else 128, at("b"))),
            ("pairs, C = 100", lambda: pairs_of_head(100, 512 if quick else 8192, 16 if quick else 256)),
            (
                "pairs-ekfac, C = 100",
                lambda: ekfac_pairs_of_head(100, 256 if quick else 1024, 8 if quick else 64, at("c")),
            ),
            ("resnet20", lambda: self_of_resnet(16 if quick else 192, 16 if quick else 192, at("d"))),
        ]
        for name, make in cases:
            for row in run_case(name, make(), 1 if quick else arguments.rounds):
                rows.append(row | facts("cpu"))
                sys.stdout.write(f"{name}: {row['contender']} {row['microseconds']:.3g} us, {row['times_ours']:.3g}x\n")
                sys.stdout.flush()
            if arguments.csv is not None:
                write_csv(arguments.csv, rows)
    sys.stdout.write("\n" + table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
