"""Experiments on frozen features: when do label revision and data selection help a student, and how much?

    python -m benchmarks.lab_features --cache /tmp/lab --suite first --seeds 0-9
    python -m benchmarks.lab_features --cache /tmp/lab --suite first --regimes other foreign --arms kd lr1_0.8
    python -m benchmarks.lab_features --list

CIFAR-100 (LRDS_DATA, or what lrds_fast.data.cifar downloads) as fixed features: distances of whitened 6 x 6 patches to
k-means centres, pooled over quadrants (Coates, Lee and Ng, "An analysis of single-layer networks in unsupervised
feature learning", 2011), then principal components. Teachers get features of a large dictionary, students of a small
one. A student is an MLP that trains in a fraction of a second, which allows paired comparisons: all arms of a seed
share the split, the teacher, the initial weights and the order of the samples (lab_students.py defines the arms).

Every finished run is appended to the CSV file at once, and runs that are in it are not repeated. Features and teachers
are stored in the folder --cache. `python -m benchmarks.lab_statistics` writes the page.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lab_students import CE_WEIGHTS, Arm, Problem, Revision, Selection, Training, kd_name, run
from benchmarks.tables import append_csv, stored_rows
from lrds_fast.data.cifar import cifar
from lrds_fast.provenance import commit as checkout_commit

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "method_features.csv"


# --- Features -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Frozen features of both splits, students' and teachers', (size, dims) float32; labels (size,) int64."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    test_student: Tensor
    test_teacher: Tensor
    test_labels: Tensor
    classes: int


PATCH, STRIDE = 6, 2
#: Centres and principal components: the student's dictionary and the teacher's.
STUDENT_DICTIONARY, TEACHER_DICTIONARY = (100, 128), (800, 512)


def patches_of(images: Tensor) -> Tensor:
    """(size, positions, 108) patches of uint8 pictures, each with its mean subtracted and its contrast normalised."""
    patches = F.unfold(images.float(), PATCH, stride=STRIDE).transpose(1, 2)
    patches = patches - patches.mean(dim=2, keepdim=True)
    return patches / (patches.square().mean(dim=2, keepdim=True) + 10.0).sqrt()


class Dictionary:
    """k-means centres of whitened patches; `pooled` gives a picture's (4 * centres,) triangle activations."""

    def __init__(self, images: Tensor, centres: int, generator: torch.Generator, rounds: int = 10) -> None:
        sample = images[torch.randperm(len(images), generator=generator)[:4000]]
        drawn = torch.stack([p[torch.randperm(len(p), generator=generator)[:25]] for p in patches_of(sample)]).flatten(
            0, 1
        )
        self.mean = drawn.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov(drawn.T))
        self.whiten = vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T
        drawn = (drawn - self.mean) @ self.whiten
        self.centres = drawn[torch.randperm(len(drawn), generator=generator)[:centres]].clone()
        for _ in range(rounds):
            nearest = (drawn @ self.centres.T - self.centres.square().sum(dim=1) / 2).argmax(dim=1)
            counts = torch.bincount(nearest, minlength=centres)
            sums = torch.zeros_like(self.centres).index_add_(0, nearest, drawn)
            self.centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], self.centres)

    def pooled(self, images: Tensor) -> Tensor:
        """(size, 4 * centres): max(0, mean distance - distance), summed over each quadrant of positions."""
        patches = (patches_of(images) - self.mean) @ self.whiten
        size, positions, _ = patches.shape
        side = round(positions**0.5)
        squares = patches.square().sum(dim=2, keepdim=True) + self.centres.square().sum(dim=1)
        distance = (squares - 2 * patches @ self.centres.T).clamp_(min=0).sqrt_()
        active = (distance.mean(dim=2, keepdim=True) - distance).clamp_(min=0)
        half = -(-side // 2)
        grid = active.reshape(size, side, side, -1)
        quadrants = [
            grid[:, a, b].sum(dim=(1, 2))
            for a in (slice(half), slice(half, None))
            for b in (slice(half), slice(half, None))
        ]
        return torch.cat(quadrants, dim=1)


def components(train: Tensor, test: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The first principal components of standardised features, half whitened: variance lambda becomes sqrt(lambda)."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    values, vectors = torch.linalg.eigh(train.T @ train / len(train))
    axes = vectors[:, -dims:] * (values[-dims:].clamp(min=1e-6) ** -0.25)
    train, test = train @ axes, test @ axes
    scale = train.square().mean().sqrt()
    return train / scale, test / scale


def load_pictures(cache: Path) -> Pictures:
    """CIFAR-100's features, from the cache or computed into it (minutes on one core)."""
    path = cache / "features.pt"
    if not path.exists():
        data = cifar(100)
        generator = torch.Generator().manual_seed(0)
        sides = []
        for centres, dims in (STUDENT_DICTIONARY, TEACHER_DICTIONARY):
            dictionary = Dictionary(data.train_images, centres, generator)
            raw = [
                torch.cat([dictionary.pooled(part) for part in images.split(100)])
                for images in (data.train_images, data.test_images)
            ]
            sides.append(components(raw[0], raw[1], dims))
        (student, test_student), (teacher, test_teacher) = sides
        cache.mkdir(parents=True, exist_ok=True)
        stored = (student, teacher, data.train_labels, test_student, test_teacher, data.test_labels)
        temporary = path.with_suffix(".tmp")
        torch.save(stored, temporary)
        os.replace(temporary, path)
    student, teacher, labels, test_student, test_teacher, test_labels = torch.load(path)
    return Pictures(student, teacher, labels, test_student, test_teacher, test_labels, 100)


# --- Teachers and regimes -------------------------------------------------------------------------------------------

HELD_OUT = 400
#: Where a seed's permutation of the training split is cut: held out, then students; teachers of other samples.
STUDENTS = slice(HELD_OUT, HELD_OUT + 6000)
TEACHERS = {"own": slice(HELD_OUT, 20000 + HELD_OUT), "other": slice(20000, 40000), "good": slice(HELD_OUT, None)}
TEACHERS |= {"noise": TEACHERS["other"], "unseen": TEACHERS["other"]}
NOISE, LEFT_OUT = 0.3, 25


@dataclass(frozen=True)
class Regime:
    """A teacher (a key of TEACHERS) and a student's data: `rows` samples, `held` others that are held out."""

    about: str
    teacher: str
    rows: int = 6000
    held: int = 400
    epochs: int = 12
    scale: float = 1.0
    foreign: float = 0.0


FEW: dict[str, Any] = {"rows": 2700, "held": 300, "epochs": 24}
REGIMES = {
    "foreign": Regime(
        "few samples, teacher trained on others, a quarter of its answers exchanged between samples",
        "other",
        foreign=0.25,
        **FEW,
    ),
    "unseen": Regime("teacher trained on other samples without 25 of the classes", "unseen"),
    "overconfident": Regime("teacher trained on other samples, its logits times 3", "other", scale=3.0),
    "noise": Regime("teacher trained on other samples with 30% wrong labels", "noise"),
    "few": Regime("few samples, teacher trained on others", "other", **FEW),
    "few_short": Regime("few, with a third of the epochs", "other", **FEW | {"epochs": 8}),
    "other": Regime("teacher trained on other samples", "other"),
    "other_long": Regime("other, with three times the epochs", "other", epochs=36),
    "own": Regime("teacher trained on the student's and other samples", "own"),
    "good": Regime("few samples, teacher trained on all samples", "good", **FEW),
}


def split_of(seed: int, size: int) -> Tensor:
    """The seed's permutation of the training split."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 7919))


def train_teacher(
    x: Tensor, y: Tensor, classes: int, generator: torch.Generator, *, hidden: int = 384, epochs: int = 10
) -> list[Tensor]:
    """A ReLU MLP with one hidden layer; SGD, momentum 0.9, dropout 0.3 on the hidden layer."""
    sizes = ((x.shape[1], hidden), (hidden, classes))
    weights = [torch.randn(a, b, generator=generator).mul_((2 / a) ** 0.5).requires_grad_() for a, b in sizes]
    biases = [torch.zeros(b, requires_grad=True) for _, b in sizes]
    optimizer = torch.optim.SGD(weights + biases, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    batch = 128
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(y) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(batch):
            h = torch.addmm(biases[0], x[rows], weights[0]).relu()
            h = h * (torch.rand(h.shape, generator=generator) > 0.3) / 0.7
            loss = F.cross_entropy(torch.addmm(biases[1], h, weights[1]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [tensor.detach() for tensor in (weights[0], biases[0], weights[1], biases[1])]


def teacher_logits(pictures: Pictures, kind: str, seed: int, cache: Path) -> Tensor:
    """(students, C) logits of the seed's teacher of this kind on the students' samples; stored in the cache."""
    path = cache / "teachers" / f"{kind}-{seed}.pt"
    if not path.exists():
        order = split_of(seed, len(pictures.labels))
        rows = order[TEACHERS[kind]]
        generator = torch.Generator().manual_seed(seed * 7919 + sum(map(ord, kind)))
        y = pictures.labels[rows].clone()
        if kind == "noise":
            wrong = torch.rand(len(y), generator=generator) < NOISE
            shift = torch.randint(1, pictures.classes, y.shape, generator=generator)
            y = torch.where(wrong, (y + shift) % pictures.classes, y)
        if kind == "unseen":
            left_out = torch.randperm(pictures.classes, generator=generator)[:LEFT_OUT]
            keep = ~torch.isin(y, left_out)
            rows, y = rows[keep], y[keep]
        w1, b1, w2, b2 = train_teacher(pictures.teacher[rows], y, pictures.classes, generator)
        seen = pictures.teacher[order[STUDENTS]]
        logits = torch.addmm(b2, torch.addmm(b1, seen, w1).relu(), w2)
        right = (
            (
                torch.addmm(b2, torch.addmm(b1, pictures.test_teacher, w1).relu(), w2).argmax(dim=1)
                == pictures.test_labels
            )
            .float()
            .mean()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save((logits, float(right)), temporary)
        os.replace(temporary, path)
    stored: Tensor = torch.load(path)[0]
    return stored


def problem_of(pictures: Pictures, regime: Regime, seed: int, cache: Path) -> Problem:
    order = split_of(seed, len(pictures.labels))
    held, rows = order[: regime.held], order[STUDENTS][: regime.rows]
    v = teacher_logits(pictures, regime.teacher, seed, cache)[: regime.rows] * regime.scale
    corrupted = torch.zeros(len(rows), dtype=torch.bool)
    if regime.foreign:
        generator = torch.Generator().manual_seed(seed * 7919 + 4)
        places = torch.randperm(len(rows), generator=generator)[: round(regime.foreign * len(rows))]
        corrupted[places] = True
        v = v.clone()
        v[places] = v[places.roll(1)]
    return Problem(
        x=pictures.student[rows],
        y=pictures.labels[rows],
        v=v,
        corrupted=corrupted,
        val_x=pictures.student[held],
        val_y=pictures.labels[held],
        test_x=pictures.test_student,
        test_y=pictures.test_labels,
        classes=pictures.classes,
        seed=seed,
        epochs=regime.epochs,
    )


# --- Arms -----------------------------------------------------------------------------------------------------------


def first_suite() -> list[Arm]:
    """The planned arms."""
    lr1, published = Revision(), Revision(at=None)
    arms = [Arm("alone", ce=1.0, kd=0.0)]
    arms += [Arm(f"lrT_{eta:g}", revision=replace(published, eta=eta)) for eta in (0.5, 0.8, 0.95)]
    arms += [Arm(f"lr1_{eta:g}", revision=replace(lr1, eta=eta)) for eta in (0.5, 0.8, 0.95)]
    arms += [Arm("swap", revision=Revision("swap")), Arm("mft", revision=Revision("mft"))]
    choices = {"below0": Selection("threshold", 0.0)}
    choices |= {f"z{z}": Selection("confidence", z) for z in (1, 2, 3)}
    choices |= {f"z{z}cap": Selection("confidence", z, cap=0.1) for z in (1, 2, 3)}
    choices |= {f"ratio{share:g}": Selection("ratio", share) for share in (0.7, 0.8, 0.9, 0.95)}
    for name, selection in choices.items():
        arms.append(Arm(name, selection=selection))
        if name not in ("z1cap", "z3cap"):  # a random selection of the same size, for most selections
            arms.append(Arm(f"random_{name}", selection=Selection("random", like=selection)))
    arms += [Arm("teacher_correct", selection=Selection("teacher_correct"))]
    arms += [Arm("teacher_loss0.9", selection=Selection("teacher_loss", 0.9))]
    for name in ("below0", "z2", "z2cap", "ratio0.7"):
        label = {None: "uce", 0.4: "u0.4", 0.7: "u0.7"}
        arms += [Arm(f"{name}_{label[u]}", selection=choices[name], unselected=u) for u in label]
    both = ("below0", "z2", "z2cap", "ratio0.9")
    arms += [Arm(f"lr1+{name}", revision=lr1, selection=choices[name]) for name in both]
    arms += [Arm("lrT+below0", revision=published, selection=choices["below0"])]
    arms += [
        Arm(f"lr1+random_{n}", revision=lr1, selection=Selection("random", like=choices[n])) for n in ("z2", "z2cap")
    ]
    tuned = [Arm(f"tuned+{arm.name}", ce=None, revision=arm.revision, selection=arm.selection) for arm in arms]
    wanted = ["lr1_0.8", "lr1_0.95", "lrT_0.8", "swap", *both, "random_z2", "random_z2cap", "lr1+z2", "lr1+z2cap"]
    return arms + [arm for arm in tuned if arm.name.removeprefix("tuned+") in wanted]


def baselines() -> list[Arm]:
    """Plain KD with each of CE_WEIGHTS."""
    return [Arm(kd_name(ce), ce=ce) for ce in CE_WEIGHTS]


def search_suite() -> list[Arm]:
    """The variants in docs/benchmarks/method.md, which has a prediction for each."""
    capped = Selection("confidence", 2, cap=0.1)
    outlier = Selection("outlier", 3.0)
    match, robust = Selection("match"), Selection("robust", 3.0)
    margin = Revision("margin")
    arms = [
        Arm("margin", revision=margin),
        Arm("lr2_0.8", revision=Revision(at=2.0)),
        Arm("posterior1", revision=Revision("posterior", strength=1.0)),
        Arm("posterior2", revision=Revision("posterior", strength=2.0)),
        Arm("ce_wrong1", ce_wrong=1.0),
        Arm("soft", selection=Selection("soft")),
        Arm("soft_uce", selection=Selection("soft"), unselected=None),
        Arm("soft_z", selection=Selection("soft_z", 2.0)),
        Arm("z2cap_by_z", selection=replace(capped, ranked="z")),
        Arm("z2cap_class", selection=replace(capped, per_class=True)),
        Arm("z2cap_again", selection=capped, rescored=True),
        Arm("z2cap_raise", selection=capped, keeps_teacher=True),
        Arm("z2cap_scored_ce1", selection=capped, score_ce=1.0),
        Arm("z2cap_folds5", selection=capped, folds=5),
        Arm("z2cap_folds20", selection=capped, folds=20),
        Arm("z2_train", selection=Selection("confidence", 2), on_training=True),
        Arm("z2cap_train", selection=capped, on_training=True),
        Arm("z3_train", selection=Selection("confidence", 3), on_training=True),
        Arm("below0_train", selection=Selection("threshold"), on_training=True),
        Arm("divergence0.9", selection=Selection("divergence", 0.9)),
        Arm("outlier3", selection=outlier),
        Arm("outlier3_uce", selection=outlier, unselected=None),
        Arm("margin+z2cap", revision=margin, selection=capped),
        Arm("random_outlier3", selection=Selection("random", like=outlier)),
        Arm("outlier2", selection=Selection("outlier", 2.0)),
        Arm("robust", selection=robust),
        Arm("robust_late", selection=robust, late=True),
        Arm("lr1_0.95+robust", revision=Revision(eta=0.95), selection=robust),
        Arm("lr1+outlier3", revision=Revision(), selection=outlier),
        Arm("lr1_0.95+outlier3", revision=Revision(eta=0.95), selection=outlier),
        Arm("lr1_0.95+z2_train", revision=Revision(eta=0.95), selection=Selection("confidence", 2), on_training=True),
        Arm("agreement0.9", selection=Selection("agreement", 0.9)),
        Arm("match", selection=match),
        Arm("random_match", selection=Selection("random", like=match)),
        Arm("match_uce", selection=match, unselected=None),
        Arm("match_soft", selection=Selection("match_soft")),
        Arm("match_again", selection=match, rescored=True),
        Arm("lr1_0.8+match", revision=Revision(), selection=match),
        Arm("lr1_0.95+match", revision=Revision(eta=0.95), selection=match),
        Arm("oracle", selection=Selection("oracle")),
    ]
    tuned_names = {"margin", "posterior1", "ce_wrong1", "soft", "soft_z", "z2cap_raise", "outlier3", "margin+z2cap"}
    tuned_names |= {"lr1+outlier3", "lr1_0.95+outlier3", "lr1_0.95+z2_train", "z2_train", "z2cap_train", "oracle"}
    tuned_names |= {"random_outlier3", "outlier2", "robust", "robust_late", "lr1_0.95+robust"}
    tuned_names |= {"match", "random_match", "match_uce", "match_soft", "lr1_0.8+match", "lr1_0.95+match"}
    tuned = [replace(arm, name=f"tuned+{arm.name}", ce=None) for arm in arms if arm.name in tuned_names]
    return arms + tuned


def rising_suite() -> list[Arm]:
    """A cross-entropy weight that changes over the epochs, alone and with revision and selection."""
    capped, match = Selection("confidence", 2, cap=0.1), Selection("match")
    return [
        Arm("rise", rises_to=1.0),
        Arm("rise0.5", rises_to=0.5),
        Arm("rise_from0.3", ce=0.3, rises_to=1.0),
        Arm("fall", ce=1.0, rises_to=0.1),
        Arm("lr1_0.8+rise", revision=Revision(), rises_to=1.0),
        Arm("z2cap+rise", selection=capped, rises_to=1.0),
        Arm("lr1+z2cap+rise", revision=Revision(), selection=capped, rises_to=1.0),
        Arm("match+rise", selection=match, rises_to=1.0),
        Arm("robust_late+rise", selection=Selection("robust", 3.0), late=True, rises_to=1.0),
        Arm("lr1_0.8+rise0.5", revision=Revision(), rises_to=0.5),
        Arm("robust_late+rise0.5", selection=Selection("robust", 3.0), late=True, rises_to=0.5),
        Arm("lr1+robust_late+rise", revision=Revision(), selection=Selection("robust", 3.0), late=True, rises_to=1.0),
    ]


def harm_suite() -> list[Arm]:
    """Selection by kd_gain only where the teacher's term is harmful by itself, and by calibrated held-out logits."""
    capped, lr1 = Selection("confidence", 2, cap=0.1), Revision()
    term = replace(capped, term=True)
    harm = replace(term, value=4)
    return [
        Arm("z2cap_calibrated", selection=capped, calibrated=True),
        Arm("z2cap_harmful", selection=term),
        Arm("z2term", selection=term, calibrated=True),
        Arm("random_z2term", selection=Selection("random", like=term, term=True), calibrated=True),
        Arm("lr1+z2term", revision=lr1, selection=term, calibrated=True),
        Arm("tuned+z2term", ce=None, selection=term, calibrated=True),
        Arm("z2term+rise", selection=term, calibrated=True, rises_to=1.0),
        Arm("lr1+z2term+rise", revision=lr1, selection=term, calibrated=True, rises_to=1.0),
        Arm("z4cap", selection=replace(capped, value=4)),
        Arm("z4harm", selection=harm),
        Arm("random_z4harm", selection=Selection("random", like=harm, term=True)),
        Arm("lr1+z4harm", revision=lr1, selection=harm),
        Arm("tuned+z4harm", ce=None, selection=harm),
        Arm("z4harm+rise", selection=harm, rises_to=1.0),
        Arm("lr1+z4harm+rise", revision=lr1, selection=harm, rises_to=1.0),
    ]


def all_suites() -> list[Arm]:
    return first_suite() + search_suite() + rising_suite() + harm_suite()


SUITES = {"first": first_suite, "search": search_suite, "rising": rising_suite, "harm": harm_suite, "all": all_suites}


# --- Running --------------------------------------------------------------------------------------------------------

COLUMNS = (
    "regime",
    "arm",
    "seed",
    "acc",
    "nll",
    "ece",
    "brier",
    "val_acc",
    "val_nll",
    "kept",
    "teacher_wrong",
    "p_wrong",
    "p_right",
    "denied_wrong",
    "denied_corrupted",
    "ce_weight",
    "unselected",
    "commit",
)


def tuned_ce(held: dict[str, float]) -> float:
    """The cross-entropy weight whose plain KD has the lowest NLL on the held-out slice; held: by arm."""
    return min(CE_WEIGHTS, key=lambda ce: held[kd_name(ce)])


def run_seed(problem: Problem, regime: str, arms: Sequence[Arm], path: Path, commit: str, training: Training) -> int:
    """Runs the arms of this seed that are not in the CSV file and appends their rows; returns their number."""
    there = {
        row["arm"]: row for row in stored_rows(path) if (row["regime"], row["seed"]) == (regime, str(problem.seed))
    }
    count = 0
    for suite in (baselines(), arms):
        missing = [arm for arm in suite if arm.name not in there]
        if not missing:
            continue
        held = {name: float(row["val_nll"]) for name, row in there.items()}
        ready = [arm.at(tuned_ce(held) if arm.ce is None else arm.ce) for arm in missing]
        rows: list[dict[str, object]] = []
        for arm, result in zip(ready, run(problem, ready, training), strict=True):
            facts = {"regime": regime, "arm": arm.name, "seed": problem.seed, "commit": commit}
            known = {"ce_weight": arm.ce, "unselected": arm.unselected if arm.selection else ""}
            numbers = {key: "" if value != value else f"{value:.5g}" for key, value in result.items()}
            rows.append(facts | known | numbers)
        append_csv(path, COLUMNS, rows)
        there |= {str(row["arm"]): {key: str(value) for key, value in row.items()} for row in rows}
        count += len(rows)
    return count


def seeds_of(text: str) -> list[int]:
    """The seeds of a range "0-9" or of one number "3"."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder for features and teachers, outside the checkout")
    parser.add_argument("--suite", choices=SUITES, default="first")
    parser.add_argument("--regimes", nargs="*", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--arms", nargs="*", help="names of arms of the suite (default: all)")
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-9"))
    parser.add_argument("--csv", type=Path, default=STORED)
    parser.add_argument("--list", action="store_true", help="print regimes and arms and exit")
    options = parser.parse_args()
    arms = [arm for arm in SUITES[options.suite]() if not options.arms or arm.name in options.arms]
    if options.list:
        for name, regime in REGIMES.items():
            print(f"{name}: {regime.about}")
        print("\n".join(arm.name for arm in baselines() + arms))
        return 0
    if options.cache is None:
        parser.error("--cache is required: a folder to store features and teachers in, outside the checkout")
    torch.set_num_threads(1)
    commit = checkout_commit()
    pictures = load_pictures(options.cache)
    for seed in options.seeds:
        for name in options.regimes:
            start = time.process_time()
            problem = problem_of(pictures, REGIMES[name], seed, options.cache)
            count = run_seed(problem, name, arms, options.csv, commit, Training())
            print(f"{name} seed {seed}: {count} runs, {time.process_time() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
