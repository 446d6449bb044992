"""Label revision and data selection on convolutional networks: paired trainings on CIFAR-100.

    python -m benchmarks.lab_networks run --cache DIR                   # all trainings, one after the other
    python -m benchmarks.lab_networks run --cache DIR --regimes unseen  # those of one regime
    python -m benchmarks.lab_networks gains --cache DIR                 # kd_gain in the students of finished runs
    python -m benchmarks.lab_networks page                              # docs/benchmarks/method.md and its plots

The protocol is in docs/benchmarks/method.md. A pair is a teacher and an initialisation of the student. All arms of a
pair share them, the samples, and the augmented views in the same order. Arms with a selection continue from the
checkpoint of the arm without one. A finished run is a row of results/method_networks.csv and is not repeated. Several
processes may share one cache: each takes the next pair that no other process has claimed. The teachers' weights are in
teachers/; after a new one, run `python -m benchmarks.teachers_table`.
"""

from __future__ import annotations

import argparse
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lrds_fast
from benchmarks.lab_students import Scored, Selection, best_temperature, kept, measures, revise_logits
from benchmarks.tables import append_csv, markdown_table, stored_rows
from lrds_fast import influence, models
from lrds_fast.data.cifar import MEAN, STD, Pictures, cifar
from lrds_fast.files import replacing, write_text
from lrds_fast.influence.last_layer import only_harmful
from lrds_fast.pages import charts
from lrds_fast.provenance import commit, cpu_name
from lrds_fast.report.statistics import estimate
from lrds_fast.train.setup import available_amp

HERE = Path(__file__).resolve().parent
STORED = HERE / "results" / "method_networks.csv"
GAINS = HERE / "results" / "method_gains.csv"
TEACHERS = HERE / "teachers"

CLASSES = 100
TEMPERATURE, CE_WEIGHT, KD_WEIGHT, ETA = 4.0, 0.1, 0.9, 0.8
#: Samples of the teacher, the student and the held-out slice, of the 50,000.
SPLIT = (25_000, 10_000, 5_000)
VIEWS, BATCH, EPOCHS, TEACHER_EPOCHS = 8, 128, 40, 20
#: A selection is made after so many epochs, from the standard errors over so many parts of the held-out slice.
SELECT_AFTER, FOLDS = 13, 10
CONFIDENCE, MAX_DROP, OUTLIERS = 2.0, 0.1, 3.0
REGIMES = ("unseen", "clean", "noise")


class Arm(NamedTuple):
    """How a student is trained. revise: None, "published" (at T) or "one" (at temperature 1). deny: None, "ds",
    "harm", "calibrated", "random" or "robust" (see Pair.selection). max_drop: the largest share of the samples that
    are denied, except by "robust". confidence: by how many standard errors kd_gain is above 0 in denied samples (None:
    CONFIDENCE). ce_end: the weight of the cross-entropy changes exponentially from ce_weight to ce_end (None: it is
    constant)."""

    ce_weight: float = CE_WEIGHT
    kd_weight: float = KD_WEIGHT
    revise: str | None = None
    deny: str | None = None
    max_drop: float = MAX_DROP
    confidence: float | None = None
    ce_end: float | None = None

    def ce_weight_at(self, epoch: int) -> float:
        """The weight of the cross-entropy in an epoch, counted from 0: that of its middle."""
        end = self.ce_weight if self.ce_end is None else self.ce_end
        weight: float = self.ce_weight * (end / self.ce_weight) ** ((epoch + 0.5) / EPOCHS)
        return weight


ARMS = {
    "kd": Arm(),
    "ds": Arm(deny="ds"),
    "random": Arm(deny="random"),
    "lr": Arm(revise="one"),
    "lr+ds": Arm(revise="one", deny="ds"),
    "lr-published": Arm(revise="published"),
    "kd-ce0.3": Arm(ce_weight=0.3),
    "kd-ce1": Arm(ce_weight=1.0),
    "ds-ce1": Arm(ce_weight=1.0, deny="ds"),
    "lr+ds-ce1": Arm(ce_weight=1.0, revise="one", deny="ds"),
    "ds-30%": Arm(deny="ds", max_drop=0.3),
    "random-30%": Arm(deny="random", max_drop=0.3),
    "lr+ds-30%": Arm(revise="one", deny="ds", max_drop=0.3),
    "ds-30%-ce1": Arm(ce_weight=1.0, deny="ds", max_drop=0.3),
    "robust": Arm(deny="robust"),
    "robust-ce0.3": Arm(ce_weight=0.3, deny="robust"),
    "kd-rise": Arm(ce_end=1.0),
    "lr+ds-rise": Arm(revise="one", deny="ds", ce_end=1.0),
    "kd-fall": Arm(ce_weight=1.0, ce_end=CE_WEIGHT),
    "ds-term": Arm(deny="calibrated"),
    "ds-harm": Arm(deny="harm", confidence=4.0),
    "ds-harm-rise": Arm(deny="harm", confidence=4.0, ce_end=1.0),
    "lr+ds-harm": Arm(revise="one", deny="harm", confidence=4.0),
    "lr+ds-harm-rise": Arm(revise="one", deny="harm", confidence=4.0, ce_end=1.0),
    "alone": Arm(ce_weight=1.0, kd_weight=0.0),
}

FIELDS = (
    "regime", "teacher", "student", "arm", "test_acc", "test_nll", "test_ece", "val_acc", "val_nll", "teacher_test_acc",
    "teacher_wrong", "denied", "denied_wrong", "revised_label", "right_label", "epochs", "seconds", "precision", "cpu",
    "torch", "commit",
)  # fmt: skip
GAIN_FIELDS = (
    "regime", "teacher", "student", "arm", "val_nll", "mean_gain", "std_gain", "harmful", "harmful_wrong", "helpful",
    "wrong", "epochs", "precision", "cpu", "torch", "commit",
)  # fmt: skip

Network = models.Classifier | models.External


class Split(NamedTuple):
    """Indices of the training pictures."""

    teacher: Tensor
    student: Tensor
    held_out: Tensor


class Trained(NamedTuple):
    """A student between two epochs."""

    model: Network
    optimizer: torch.optim.Optimizer
    epoch: int


def generator(*key: object) -> torch.Generator:
    """A generator seeded by the key; every random draw of the experiment has its own key."""
    return torch.Generator().manual_seed(int.from_bytes(repr(key).encode(), "little") % (2**61 - 1))


def split_of(teacher: int) -> Split:
    order = torch.randperm(50_000, generator=generator("split", teacher))
    return Split(*order[: sum(SPLIT)].split(SPLIT))


def normalised(images: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) to float32, channels last."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """uint8 (N, 3, 32, 32): padded by 4, cropped at a random place, flipped with probability 1/2; pixels of the padding
    are the mean."""
    count = len(images)
    padded = (
        torch.tensor([round(255 * value) for value in MEAN], dtype=torch.uint8)
        .view(1, 3, 1, 1)
        .repeat(count, 1, 40, 40)
    )
    padded[:, :, 4:36, 4:36] = images
    rows = torch.randint(0, 9, (count, 1), generator=random) + torch.arange(32)
    columns = torch.randint(0, 9, (count, 1), generator=random) + torch.arange(32)
    flip = torch.rand(count, generator=random) < 0.5
    columns[flip] = columns[flip].flip(1)
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(3)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def precision() -> str:
    return available_amp("bf16", torch.device("cpu"))


def run_network(model: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision() == "bf16"):
        logits: Tensor = model(images)
        return logits.float()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([run_network(model, normalised(part)) for part in images.split(500)])


@torch.no_grad()
def features_of(model: Network, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model.features(normalised(part)).float() for part in images.split(500)])


def one_epoch(
    state: Trained, order: Tensor, epochs: int, batches: int, loss_of: Callable[[nn.Module, Tensor], Tensor]
) -> Trained:
    """The steps of one epoch; the learning rate follows a cosine from 0.1, with a warm-up in the first epoch.

    loss_of: from (model, row numbers) to the mean loss.
    """
    state.model.train()
    for number, rows in enumerate(order.split(BATCH)):
        at = state.epoch + number / batches
        warm, half_cosine = (
            min(1.0, (at + 1 / batches)),
            0.5 * (1 + torch.cos(torch.tensor(at / epochs * torch.pi)).item()),
        )
        for group in state.optimizer.param_groups:
            group["lr"] = 0.1 * warm * half_cosine
        state.optimizer.zero_grad(set_to_none=True)
        loss_of(state.model, rows).backward()
        state.optimizer.step()
    return state._replace(epoch=state.epoch + 1)


def fresh(name: str, *seed: object) -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator("init", name, *seed))))
        model = models.create(name, num_classes=CLASSES).to(memory_format=torch.channels_last)
    return Trained(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4), 0)


def saved(path: Path, state: Trained) -> None:
    with replacing(path) as name:
        torch.save(
            {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict(), "epoch": state.epoch}, name
        )


def loaded(path: Path, state: Trained) -> Trained:
    kept = torch.load(path, weights_only=True)
    state.model.load_state_dict(kept["model"])
    state.optimizer.load_state_dict(kept["optimizer"])
    return state._replace(epoch=kept["epoch"])


def teacher_labels(regime: str, teacher: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The samples that the teacher is trained on, (N,) bool, and the labels that it is trained with, (N,).

    labels: the true labels, (N,).
    """
    random = generator("regime", regime, teacher)
    keep = torch.ones(len(labels), dtype=torch.bool)
    if regime == "unseen":
        keep = ~torch.isin(labels, torch.randperm(CLASSES, generator=random)[:25])
    elif regime == "noise":
        wrong = torch.rand(len(labels), generator=random) < 0.4
        shift = torch.randint(1, CLASSES, (len(labels),), generator=random)
        labels = torch.where(wrong, (labels + shift) % CLASSES, labels)
    return keep, labels


def teacher_of(regime: str, number: int, data: Pictures, cache: Path) -> nn.Module:
    """A resnet20 of the regime, loaded from teachers/ or trained; interrupted training resumes after the last epoch."""
    path = TEACHERS / f"resnet20_{regime}_{number}.safetensors"
    state = fresh("resnet20", regime, number)
    if not path.exists():
        index = split_of(number).teacher
        keep, labels = teacher_labels(regime, number, data.train_labels[index])
        images, labels = data.train_images[index[keep]], labels[keep]
        half_done = cache / f"teacher_{regime}_{number}.pt"
        if half_done.exists():
            state = loaded(half_done, state)
        while state.epoch < TEACHER_EPOCHS:
            random = generator("teacher", regime, number, state.epoch)
            view = augmented(images, random)

            def loss_of(model: nn.Module, rows: Tensor, view: Tensor = view) -> Tensor:
                return F.cross_entropy(run_network(model, normalised(view[rows])), labels[rows])

            order = torch.randperm(len(images), generator=random)
            state = one_epoch(state, order, TEACHER_EPOCHS, -(-len(images) // BATCH), loss_of)
            saved(half_done, state)
        # Students learn from the stored weights, rounded to 16 bits, so that their runs can be repeated from these.
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.model.state_dict().items()}
        TEACHERS.mkdir(exist_ok=True)
        with replacing(path) as name:
            save_file({k: v.contiguous() for k, v in half.items()}, name)
        half_done.unlink(missing_ok=True)
    state.model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return state.model


def checkpoint(cache: Path, regime: str, teacher: int, student: int, arm: Arm) -> Path:
    """The student of a pair after SELECT_AFTER epochs, which arms that differ in later epochs only share."""
    weight = "" if arm.ce_weight == CE_WEIGHT else f"_ce{arm.ce_weight:g}"
    weight += "" if arm.ce_end is None else f"_to{arm.ce_end:g}"
    return cache / f"student_{regime}_{teacher}_{student}_{arm.revise}{weight}.pt"


class Pair:
    """The data, views and teacher's logits that all arms of a pair share.

    view_logits: (VIEWS + 1, N, C), the teacher's for each view. wrong: (N,) bool, where the teacher's top class is not
    the label.
    """

    def __init__(self, regime: str, teacher: int, student: int, data: Pictures, cache: Path) -> None:
        self.regime, self.teacher, self.student, self.cache, self.data = regime, teacher, student, cache, data
        split = split_of(teacher)
        self.images, self.labels = data.train_images[split.student], data.train_labels[split.student]
        self.held_out, self.held_out_labels = data.train_images[split.held_out], data.train_labels[split.held_out]
        with claimed(cache / f"teacher_{regime}_{teacher}.lock", wait=True):
            network = teacher_of(regime, teacher, data, cache)
        # The last view, number VIEWS, is the picture without augmentation: scores are computed on it.
        self.views = [augmented(self.images, generator("view", teacher, view)) for view in range(VIEWS)] + [self.images]
        path = cache / f"logits_{regime}_{teacher}.pt"
        if not path.exists():
            logits = torch.stack([logits_of(network, view) for view in self.views]).half()
            with replacing(path) as name:
                torch.save({"views": logits, "test": logits_of(network, data.test_images)}, name)
        kept = torch.load(path, weights_only=True)
        self.view_logits = kept["views"].float()
        self.teacher_test_acc = measures(kept["test"], data.test_labels)["acc"]
        self.wrong = self.view_logits[VIEWS].argmax(1) != self.labels

    def checkpoint(self, arm: Arm) -> Path:
        return checkpoint(self.cache, self.regime, self.teacher, self.student, arm)

    def teacher_logits(self, arm: Arm, view: int) -> Tensor:
        """The teacher's logits, already revised where the arm revises at temperature 1."""
        logits = self.view_logits[view]
        return revise_logits(logits, self.labels, at=1.0, eta=ETA) if arm.revise == "one" else logits

    def train(self, arm: Arm, state: Trained, epochs: int, selected: Tensor | None) -> Trained:
        batches = -(-len(self.images) // BATCH)
        while state.epoch < epochs:
            view = state.epoch % VIEWS
            teacher_logits, ce_weight = self.teacher_logits(arm, view), arm.ce_weight_at(state.epoch)

            def loss_of(
                model: nn.Module,
                rows: Tensor,
                view: int = view,
                teacher_logits: Tensor = teacher_logits,
                ce_weight: float = ce_weight,
            ) -> Tensor:
                return lrds_fast.kd_loss(
                    run_network(model, normalised(self.views[view][rows])),
                    teacher_logits[rows],
                    self.labels[rows],
                    temperature=TEMPERATURE,
                    ce_weight=ce_weight,
                    kd_weight=arm.kd_weight,
                    ce_weight_unselected=1.0,
                    revise="lr" if arm.revise == "published" else None,
                    eta=ETA,
                    revise_temperature=None,
                    selected=None if selected is None else selected[rows],
                )

            order = torch.randperm(
                len(self.images), generator=generator("order", self.teacher, self.student, state.epoch)
            )
            state = one_epoch(state, order, EPOCHS, batches, loss_of)
        return state

    def gain(
        self, arm: Arm, model: Network, *, calibrated: bool = False, unselected: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """kd_gain of every sample and its standard error over FOLDS parts of the held-out slice.

        calibrated: the held-out logits are divided by the temperature with which their loss is lowest. unselected: the
        weight of the cross-entropy for a sample without the teacher.
        """
        features, logits = features_of(model, self.images), logits_of(model, self.images)
        val_features, val_logits = features_of(model, self.held_out), logits_of(model, self.held_out)
        if calibrated:
            val_logits = val_logits / best_temperature(val_logits, self.held_out_labels)
        loss = lrds_fast.KDLoss(
            temperature=TEMPERATURE,
            ce_weight=arm.ce_weight_at(SELECT_AFTER),
            kd_weight=arm.kd_weight,
            ce_weight_unselected=unselected,
            revise=None,
        )
        folds = []
        for fold in range(FOLDS):
            part = slice(fold, None, FOLDS)
            scores = influence.last_layer_scores(
                features=features,
                student_logits=logits,
                teacher_logits=self.teacher_logits(arm, VIEWS),
                target=self.labels,
                val_features=val_features[part],
                val_logits=val_logits[part],
                val_target=self.held_out_labels[part],
                loss=loss,
            )
            folds.append(scores["kd_gain"])
        values = torch.stack(folds).double()
        return values.mean(0), values.std(0) / FOLDS**0.5

    def selection(self, arm: Arm, model: Network) -> Tensor:
        """The samples that keep the teacher, (N,) bool.

        Denied are those whose kd_gain exceeds arm.confidence standard errors and is among the share arm.max_drop with
        the largest kd_gain. With arm.deny "random" as many random samples are denied. With "harm", only samples are
        denied whose kd_gain would also be above 0 if they kept the weight of the cross-entropy when they lose the
        teacher; with "calibrated", the held-out loss is also that of calibrated logits.
        With "robust", denied are those whose teacher's logits more likely belong to another sample, and those whose
        divergence of student and teacher at T is more than OUTLIERS robust standard deviations above the median.
        """
        if arm.deny == "robust":
            z, v = logits_of(model, self.images), self.teacher_logits(arm, VIEWS)
            scored = Scored(
                gain=torch.zeros(len(z)),
                error=torch.zeros(len(z)),
                term=torch.zeros(len(z)),
                divergence=lrds_fast.kd_loss(
                    z,
                    v,
                    self.labels,
                    temperature=TEMPERATURE,
                    ce_weight=0.0,
                    kd_weight=1.0,
                    revise=None,
                    reduction="none",
                ),
                z=z,
                y=self.labels,
                v=v,
                order=torch.randperm(len(z), generator=generator("match", self.regime, self.teacher, self.student)),
                corrupted=torch.zeros(len(z), dtype=torch.bool),
            )
            return kept(Selection("robust", OUTLIERS), scored) > 0
        calibrated = arm.deny == "calibrated"
        score, error = self.gain(arm, model, calibrated=calibrated)
        if arm.deny in ("harm", "calibrated"):
            term, _ = self.gain(arm, model, calibrated=calibrated, unselected=arm.ce_weight_at(SELECT_AFTER))
            score = only_harmful(score, term)
        scores = {"kd_gain": score, "kd_gain_standard_error": error}
        confidence = CONFIDENCE if arm.confidence is None else arm.confidence
        selected = lrds_fast.select(scores, confidence=confidence, max_drop=arm.max_drop).mask
        if arm.deny == "random":
            order = torch.randperm(len(score), generator=generator("random", self.regime, self.teacher, self.student))
            denied = order[: int((~selected).sum())]
            selected = torch.ones_like(selected)
            selected[denied] = False
        return selected

    def run(self, name: str) -> dict[str, object]:
        """Trains and measures one arm; returns its row."""
        arm, began = ARMS[name], time.monotonic()
        state, selected = fresh("resnet8", "student", self.teacher, self.student), None
        branch = self.checkpoint(arm)
        shared = arm.revise != "published" and arm.kd_weight == KD_WEIGHT
        if shared and branch.exists():
            state = loaded(branch, state)
        if shared:
            state = self.train(arm, state, SELECT_AFTER, None)
            if not branch.exists():
                saved(branch, state)
            if arm.deny:
                selected = self.selection(arm, state.model)
        state = self.train(arm, state, EPOCHS, selected)
        test = measures(logits_of(state.model, self.data.test_images), self.data.test_labels)
        val = measures(logits_of(state.model, self.held_out), self.held_out_labels)
        teacher_logits = self.teacher_logits(arm, 0)
        if arm.revise == "published":
            teacher_logits = (
                lrds_fast.revise_labels(
                    teacher_logits, self.labels, temperature=TEMPERATURE, eta=ETA, revise_temperature=None
                ).log()
                * TEMPERATURE
            )
        p_y = (teacher_logits / TEMPERATURE).softmax(1).gather(1, self.labels[:, None])[:, 0]
        wrong_view = self.view_logits[0].argmax(1) != self.labels
        denied = torch.zeros_like(self.wrong) if selected is None else ~selected
        return {
            "regime": self.regime, "teacher": self.teacher, "student": self.student, "arm": name,
            "test_acc": round(test["acc"], 2), "test_nll": round(test["nll"], 5), "test_ece": round(test["ece"], 3),
            "val_acc": round(val["acc"], 2), "val_nll": round(val["nll"], 5),
            "teacher_test_acc": round(self.teacher_test_acc, 2),
            "teacher_wrong": round(float(self.wrong.float().mean()), 4),
            "denied": int(denied.sum()), "denied_wrong": int((denied & self.wrong).sum()),
            "revised_label": round(float(p_y[wrong_view].mean()), 4),
            "right_label": round(float(p_y[~wrong_view].mean()), 4),
            "epochs": EPOCHS, "seconds": round(time.monotonic() - began), "precision": precision(),
            "cpu": cpu_name(), "torch": torch.__version__, "commit": commit(),
        }  # fmt: skip


def gains(pair: Pair, name: str) -> dict[str, object]:
    """kd_gain in the student of an arm when its selection is due, as a row.

    harmful, helpful: the shares of samples whose kd_gain is more than CONFIDENCE standard errors above and below 0.
    harmful_wrong: the share of the harmful ones on which the teacher is wrong; wrong: the share of all.
    """
    arm = ARMS[name]
    model = loaded(pair.checkpoint(arm), fresh("resnet8", "student", pair.teacher, pair.student)).model
    gain, error = pair.gain(arm, model)
    harmful, helpful = gain > CONFIDENCE * error, gain < -CONFIDENCE * error
    val = measures(logits_of(model, pair.held_out), pair.held_out_labels)
    return {
        "regime": pair.regime, "teacher": pair.teacher, "student": pair.student, "arm": name,
        "val_nll": round(val["nll"], 4), "mean_gain": round(float(gain.mean()), 4),
        "std_gain": round(float(gain.std()), 4), "harmful": round(float(harmful.float().mean()), 4),
        "harmful_wrong": round(float(pair.wrong[harmful].float().mean()), 4) if harmful.any() else "",
        "helpful": round(float(helpful.float().mean()), 4), "wrong": round(float(pair.wrong.float().mean()), 4),
        "epochs": SELECT_AFTER, "precision": precision(), "cpu": cpu_name(), "torch": torch.__version__,
        "commit": commit(),
    }  # fmt: skip


def score_stored(data: Pictures, cache: Path) -> None:
    """Appends the row of `gains` of every student in the cache that has none yet."""
    done = keys_of(stored_rows(GAINS))
    for pair in dict.fromkeys(job[:3] for job in jobs(REGIMES)):
        for name in ("kd", "lr", "kd-ce0.3", "kd-ce1"):
            if checkpoint(cache, *pair, ARMS[name]).exists() and (*pair, name) not in done:
                append_csv(GAINS, GAIN_FIELDS, [gains(Pair(*pair, data, cache), name)])


def keys_of(rows: Sequence[dict[str, str]]) -> set[tuple[str, int, int, str]]:
    """(regime, teacher, student, arm) of each row."""
    return {(row["regime"], int(row["teacher"]), int(row["student"]), row["arm"]) for row in rows}


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yields True and holds the lock of the file until the block or the process ends; yields False if another process
    holds it.

    wait: waits until the other process releases the lock, so that True is always yielded.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def jobs(regimes: Sequence[str]) -> Iterator[tuple[str, int, int, Sequence[str]]]:
    """(regime, teacher, student, arms) in the order of their importance: the first regime's primary comparison, then
    the other weights, rising, constant and falling, for the first and then for three pairs of every regime, then these
    pairs' arms of the other registrations, then their other arms, then the other pairs."""
    primary, weights = ("kd", "lr", "lr+ds", "ds", "random"), ("kd-rise", "kd-ce0.3", "kd-ce1")
    third, tuned = ("lr+ds-rise", "kd-fall"), ("ds-ce1", "lr+ds-ce1")
    fourth = ("ds-harm", "lr+ds-harm-rise", "ds-harm-rise", "lr+ds-harm", "ds-term")
    second = ("ds-30%", "robust", "robust-ce0.3", "random-30%", "lr+ds-30%", "ds-30%-ce1")
    every = (*primary, *weights, *third, *fourth, *tuned, *second, "lr-published", "alone")
    pairs = [(teacher, student) for student in range(2) for teacher in range(4)]
    yield from ((regimes[0], *pair, primary) for pair in pairs)
    for arms, part in (
        (("kd", *weights, *third), pairs[:1]),
        (("kd", *weights), pairs[:3]),
        (fourth[:2], pairs[:3]),
        ((*primary, *third, *fourth), pairs[:3]),
        (tuned, pairs[:3]),
        (every, pairs[:3]),
        (every, pairs[3:]),
    ):
        for regime in regimes:
            yield from ((regime, *pair, arms) for pair in part)


# --- The page -------------------------------------------------------------------------------------------------------

PAGE = HERE.parent / "docs" / "benchmarks" / "method.md"
BEGIN, END = "<!-- networks:begin -->", "<!-- networks:end -->"
#: Points of accuracy that an arm may lose against plain KD in *clean*.
SAFETY = -0.3
#: Settings that a recipe could have by default.
CANDIDATES = ("kd", "kd-ce0.3", "kd-ce1", "kd-rise", "ds-harm", "lr+ds-harm", "lr+ds-harm-rise")
#: Not trained: of a pair's plain KDs the one that is most accurate on the held-out pictures.
TUNED = "kd-tuned"
Results = dict[str, dict[tuple[int, int], dict[str, str]]]


def results_of(rows: Sequence[dict[str, str]], regime: str) -> Results:
    """The regime's rows by arm and pair, with those of tuned KD where a pair has all three weights.

    A student alone is the same in all regimes, so its row counts in each.
    """
    results: Results = {}
    for row in rows:
        if row["regime"] == regime or row["arm"] == "alone":
            results.setdefault(row["arm"], {})[int(row["teacher"]), int(row["student"])] = row
    weights = [results.get(arm, {}) for arm in ("kd", "kd-ce0.3", "kd-ce1")]
    for pair in set.intersection(*(set(each) for each in weights)):
        tuned = max((each[pair] for each in weights), key=lambda row: float(row["val_acc"]))
        results.setdefault(TUNED, {})[pair] = tuned
    return results


def differences(results: Results, arm: str, baseline: str, key: str) -> list[float]:
    """arm - baseline for each pair that has both, in the pairs' order."""
    of_arm, of_baseline = results.get(arm, {}), results.get(baseline, {})
    return [
        float(of_arm[pair][key]) - float(of_baseline[pair][key]) for pair in sorted(of_arm.keys() & of_baseline.keys())
    ]


def signed(values: Sequence[float], digits: int) -> str:
    """Mean and half-width of the 95% t interval, in bold if it excludes 0; the mean alone if there is one value."""
    if not values:
        return "-"
    difference = estimate(values)
    if difference.n == 1:
        return f"{difference.mean:+.{digits}f}"
    text = f"{difference.mean:+.{digits}f} ± {difference.half_width:.{digits}f}"
    return text if difference.within_noise else f"**{text}**"


def table(results: Results) -> str:
    """Markdown: a row an arm."""
    header = ["arm", "pairs", "accuracy, %", "NLL", "ECE, %", "accuracy - kd", "NLL - kd", "accuracy - tuned"]
    body = []
    for arm in [*ARMS, TUNED]:
        rows = results.get(arm, {}).values()
        if not rows:
            continue
        level = [estimate([float(row[key]) for row in rows]).mean for key in ("test_acc", "test_nll", "test_ece")]
        denied, wrong = (sum(int(row[key]) for row in rows) for key in ("denied", "denied_wrong"))
        cells = [arm, len(rows), f"{level[0]:.2f}", f"{level[1]:.3f}", f"{level[2]:.1f}"]
        for baseline in ("kd", TUNED):
            for key, digits in (("test_acc", 2), ("test_nll", 3)):
                same = arm == baseline
                cells.append("" if same else signed(differences(results, arm, baseline, key), digits))
        cells.append(f"{denied / len(rows):.0f} ({wrong / denied:.0%})" if denied else "0")
        body.append(cells)
    return "\n".join(markdown_table([*header, "NLL - tuned", "denied (teacher wrong)"], body))


def verdict(values: Sequence[float], least: float) -> str:
    """Whether the mean is above `least`: "met" or "not met" where the 95% t interval is above or below it, else
    "undecided", as with one value."""
    low, high = estimate(values).interval
    return "met" if low > least else "not met" if high < least else "undecided"


def registered(results: Mapping[str, Results]) -> list[str]:
    """The registered comparisons, with their numbers."""
    unseen, clean = results["unseen"], results["clean"]
    primary, gate = differences(unseen, "lr+ds", "kd", "test_acc"), differences(unseen, "ds", "random", "test_acc")
    lines = [
        f"1. Primary, *unseen*, `lr+ds` - `kd`: accuracy {signed(primary, 2)},"
        f" NLL {signed(differences(unseen, 'lr+ds', 'kd', 'test_nll'), 3)}; {len(primary)} of 8 pairs. Above 0:"
        f" {verdict(primary, 0.0)}.",
        f"2. Gate, *unseen*, `ds` - `random`: accuracy {signed(gate, 2)},"
        f" NLL {signed(differences(unseen, 'ds', 'random', 'test_nll'), 3)}. Above 0: {verdict(gate, 0.0)}.",
    ]
    parts = []
    for arm in ("lr", "ds", "lr+ds"):
        values = differences(clean, arm, "kd", "test_acc")
        parts.append(f"`{arm}` {signed(values, 2)} ({verdict(values, SAFETY)})")
    lines.append(f"3. Safety, *clean*, accuracy - `kd`, not below {SAFETY:g}: {', '.join(parts)}.")
    for title, arm, baseline in (
        ("", "lr+ds", TUNED),
        ("Second registration, ", "ds-30%", "ds"),
        ("Second registration, ", "ds-30%", "random-30%"),
        ("Third registration, ", "kd-rise", "kd"),
        ("Third registration, ", "kd-rise", TUNED),
        ("Third registration, ", "lr+ds-rise", "kd-rise"),
        ("Fourth registration, ", "ds-term", "kd"),
        ("Fourth registration, ", "ds-harm", "kd"),
        ("Fourth registration, ", "ds-harm", "ds"),
        ("Fourth registration, ", "lr+ds-harm-rise", "kd-rise"),
    ):
        parts = [
            f"*{regime}* {signed(differences(of_regime, arm, baseline, 'test_acc'), 2)} (NLL"
            f" {signed(differences(of_regime, arm, baseline, 'test_nll'), 3)})"
            for regime, of_regime in results.items()
        ]
        name = "tuned KD" if baseline == TUNED else f"`{baseline}`"
        lines.append(f"{len(lines) + 1}. {title}`{arm}` - {name}, accuracy: {', '.join(parts)}.")
    return lines


def candidates_table(results: Mapping[str, Results]) -> str:
    """Markdown: accuracy of CANDIDATES minus plain KD and minus tuned KD, and where the interval is below 0."""
    columns = [(regime, baseline) for regime in results for baseline in ("kd", TUNED)]
    header = ["arm", *(f"{regime} - {'tuned' if baseline == TUNED else baseline}" for regime, baseline in columns)]
    body = []
    for arm in CANDIDATES:
        values = [differences(results[regime], arm, baseline, "test_acc") for regime, baseline in columns]
        worse = [name for name, each in zip(header[1:], values, strict=True) if verdict(each, 0.0) == "not met"]
        cells = [
            "" if arm == baseline else f"{signed(each, 2)} ({len(each)})" if each else "-"
            for (_, baseline), each in zip(columns, values, strict=True)
        ]
        body.append([arm, *cells, ", ".join(worse)])
    return "\n".join(markdown_table([*header, "worse beyond noise"], body))


def gains_table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: kd_gain by regime and arm, means over the pairs."""
    header = ["regime", "arm", "pairs", "mean of kd_gain", "its standard deviation", "harmful", "helpful"]
    body = []
    for regime in REGIMES:
        for arm in ARMS:
            of_arm = [row for row in rows if (row["regime"], row["arm"]) == (regime, arm)]
            if of_arm:
                mean = {
                    key: estimate([float(row[key] or 0.0) for row in of_arm]).mean
                    for key in ("mean_gain", "std_gain", "harmful", "harmful_wrong", "helpful", "wrong")
                }
                wrong = f"teacher wrong on {mean['harmful_wrong']:.0%}, on all {mean['wrong']:.0%}"
                cells = [f"{mean['mean_gain']:+.2f}", f"{mean['std_gain']:.2f}", f"{mean['harmful']:.0%} ({wrong})"]
                body.append([regime, arm, len(of_arm), *cells, f"{mean['helpful']:.0%}"])
    return "\n".join(markdown_table(header, body))


def forest(results: Mapping[str, Results], key: str) -> Any:
    """Differences to plain KD, a panel a regime."""
    panels = {}
    for regime, of_regime in results.items():
        lines = []
        for arm in [*ARMS, TUNED]:
            pairs = differences(of_regime, arm, "kd", key)
            if arm not in ("kd", "alone") and len(pairs) > 1:
                mean = estimate(pairs)
                lines.append(charts.Interval(arm, mean.mean, *mean.interval, pairs))
        if lines:
            panels[regime] = lines
    label, better = ("accuracy - kd, points", "higher") if key == "test_acc" else ("NLL - kd", "lower")
    return charts.forest_plot(panels, x_label=label, better=better) if panels else None


def section(rows: Sequence[dict[str, str]]) -> str:
    """The results as Markdown."""
    results = {regime: results_of(rows, regime) for regime in REGIMES}
    commits: dict[str, set[str]] = {}
    for row in rows:
        commits.setdefault(f"{row['cpu']}, {row['precision']}, torch {row['torch']}", set()).add(row["commit"])
    places = [f"{place}, commits {', '.join(sorted(names))}" for place, names in sorted(commits.items())]
    trained = {row["arm"] for row in rows}
    parts = ["## On convolutional networks: the results", "\n".join(registered(results))]
    missing = ", ".join(f"`{arm}`" for arm in ARMS if arm not in trained)
    if missing:
        parts.append(f"Registered and not trained: {missing}.")
    parts += [
        "### Which setting is never worse, with networks",
        "The rule for a default is that it is in no regime worse than plain KD and tuned KD beyond noise. Accuracy,"
        " points; (n) is the number of pairs; the last column has the comparisons whose 95% interval is below 0.",
        candidates_table(results),
    ]
    for regime, of_regime in results.items():
        if of_regime:
            some_arm = next(iter(of_regime.values()))
            accuracy, wrong = (
                estimate([float(row[key]) for row in some_arm.values()]).mean
                for key in ("teacher_test_acc", "teacher_wrong")
            )
            parts += [
                f"### {regime}",
                f"The teachers are right on {accuracy:.1f}% of the test pictures. They are wrong on {wrong:.1%} of the"
                " pictures that the students are trained on.",
                table(of_regime),
            ]
    parts += [
        "### kd_gain in these students",
        f"Scored after epoch {SELECT_AFTER}. harmful and helpful: kd_gain is more than {CONFIDENCE:g} standard errors"
        " above and below 0.",
        gains_table(stored_rows(GAINS)),
    ]
    parts += [f"![Paired differences: {name}](method_networks_{name}.svg)" for name in ("acc", "nll")]
    parts.append(
        "± is the half-width of a 95% t interval over pairs, which is bold if it excludes 0. A dash marks a comparison"
        f" that has no finished pair. {'; '.join(places)}."
    )
    return "\n\n".join(parts)


def render(path: Path, out: Path) -> Path:
    """Writes the plots of stored rows into the folder, and method.md with their section between its marks."""
    rows = stored_rows(path)
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} must have {BEGIN} and {END} once")
    results = {regime: results_of(rows, regime) for regime in REGIMES}
    for name in ("acc", "nll"):
        made = forest(results, f"test_{name}")
        if made is not None:
            charts.save(made, out / f"method_networks_{name}.svg", f"Paired differences to plain KD: {name}")
    page = out / PAGE.name
    write_text(page, f"{before}{BEGIN}\n{section(rows)}\n{END}{after}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="the trainings that have no row yet")
    run.add_argument("--cache", type=Path, required=True, help="folder for logits and checkpoints")
    run.add_argument(
        "--regimes", nargs="+", choices=REGIMES, default=REGIMES, help="the first one's primary arms first"
    )
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--data", default="", help="folder of CIFAR-100 (default: in LRDS_DATA)")
    gain = actions.add_parser("gains", help="kd_gain in the students whose checkpoints are in the cache, a row each")
    gain.add_argument("--cache", type=Path, required=True, help="folder of `run`")
    gain.add_argument("--data", default="", help="folder of CIFAR-100 (default: in LRDS_DATA)")
    actions.add_parser("page", help="docs/benchmarks/method.md and its plots, from the stored rows")
    options = parser.parse_args()
    if options.action == "page":
        print(render(STORED, PAGE.parent))
        return
    if options.action == "gains":
        score_stored(cifar(CLASSES, options.data), options.cache)
        return
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    data = cifar(CLASSES, options.data)
    for regime, teacher, student, arms in jobs(options.regimes):
        with claimed(options.cache / f"{regime}_{teacher}_{student}.lock") as is_claimed:
            pair = None
            for name in arms if is_claimed else ():
                if (regime, teacher, student, name) not in keys_of(stored_rows(STORED)):
                    pair = pair or Pair(regime, teacher, student, data, options.cache)
                    append_csv(STORED, FIELDS, [pair.run(name)])


if __name__ == "__main__":
    main()
