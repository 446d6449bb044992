"""Data: one Loader protocol, implemented in memory and over folders of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrds_fast.data import cifar as cifar_files
from lrds_fast.data.dali import DaliLoader, has_dali
from lrds_fast.data.folder import FolderLoader
from lrds_fast.data.loader import (
    Batch,
    Data,
    Loader,
    batch_count,
    derived_seed,
    epoch_batches,
    generator,
    hold_out,
    prefix_rows,
)
from lrds_fast.data.memory import MemoryLoader, as_labels, digits, from_npz, two_digit_numbers
from lrds_fast.data.soft_labels import SoftLabels, write_soft_labels
from lrds_fast.data.sources import Source, open_split
from lrds_fast.data.strong import PLAIN, Strong, TwoViews
from lrds_fast.data.strong import second_view as described

__all__ = [
    "Batch",
    "DaliLoader",
    "Data",
    "FolderLoader",
    "Loader",
    "MemoryLoader",
    "SoftLabels",
    "Source",
    "Strong",
    "TwoViews",
    "answer_sources",
    "batch_count",
    "derived_seed",
    "digits",
    "epoch_batches",
    "from_npz",
    "generator",
    "hold_out",
    "in_memory",
    "load",
    "mislabelled",
    "open_split",
    "prefix_rows",
    "two_digit_numbers",
    "write_soft_labels",
]

#: Data sets of encoded pictures, and what reads them.
ENCODED = ("folder", "webdataset", "tfrecord")
READERS = ("auto", "dali", "torchvision")
#: Data sets whose files hold class numbers.
NUMBERED = ("npz", "webdataset", "tfrecord")

#: Share of the digits that are the test split; which ones is fixed for good.
DIGITS_TEST_FRACTION = 1 / 3
#: Two-digit numbers in the training split (of the training digits) and in the test split (of the test digits).
NUMBERS = 5000, 4000


def load(
    name: str,
    *,
    root: str = "",
    batch_size: int = 64,
    eval_batch_size: int = 256,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    seed: int = 0,
    train_limit: int = 0,
    test_limit: int = 0,
    label_noise: float = 0.0,
    augment: str = "none",
    image_size: int = 224,
    workers: int = 0,
    reader: str = "auto",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    rand_augment: str = "",
    erasing: float = 0.0,
    second_view: str = "",
    first_label: int = -1,
    device: torch.device | str | None = None,
    least: int = 2,
    views: int = 0,
) -> Data:
    """The data set `name`, split and ready to train on.

    name: "digits" (scikit-learn's, needs no root), "two_digit_numbers" (100 classes, two digits of one split side by
    side; split_seed draws the training numbers), "cifar100" or "cifar10" (root: see lrds_fast.data.cifar; downloaded
    where it is not there), "npz" (root is a file, see from_npz), "folder" (root holds train/ and val/, each with one
    folder per class; val/ is the test split), "webdataset" or "tfrecord" (archives of the two splits, see
    lrds_fast.data.sources.open_split). val_fraction of the training samples is held out, by split_seed;
    train_limit > 0 keeps that many of the others, test_limit > 0 that many of the test split. seed orders and augments.
    augment: see MemoryLoader and FolderLoader
    ("none" or "crop-flip"). least, views: of the training samples; a last batch of fewer than `least` joins the one
    before it; with views > 0 the augmentation of epoch e is that of epoch e % views. rand_augment, erasing: what the
    training pictures go through after that; see lrds_fast.data.Strong. second_view "strong": the training batches bring
    another view of their samples, in `strong`. first_label: the number of the first class in the files of "npz",
    "webdataset" and "tfrecord"; -1 means 1 for "tfrecord" and 0 for the others.
    For encoded pictures (folder, webdataset, tfrecord): reader "dali", "torchvision", or "auto", DALI where it is
    installed; workers, the processes (torchvision) or threads (DALI) that decode; device, where DALI decodes.
    For data in memory only: mean, std, per channel (CIFAR has the literature's by default); device, where the images
    stay and are augmented; label_noise, the share of the training labels that are replaced by another class, by
    split_seed, for experiments with unreliable teachers (held-out and test labels stay).
    """
    if batch_size < 1 or eval_batch_size < 1:
        raise ValueError(f"batch sizes must be at least 1; got {batch_size} and {eval_batch_size}")
    if name in ("npz", *ENCODED) and not root:
        raise ValueError(
            f"data.root is empty: set it to the {'file' if name == 'npz' else 'folder'} of data {name!r}, e.g."
            " --set data.root=PATH"
        )
    if first_label < -1 or (first_label >= 0 and name not in NUMBERED):
        raise ValueError(
            f"data.first_label must be at least 0, or -1 for the default, and applies to data {', '.join(NUMBERED)};"
            f" got {first_label} with data {name!r}"
        )
    class_names: tuple[str, ...] = ()
    strongly: dict[str, Any] = {"strong": Strong(rand_augment, erasing), "second": described(second_view)}
    if name in ("digits", "two_digit_numbers"):
        images, targets = digits()
        train, test = hold_out(len(images), DIGITS_TEST_FRACTION, seed=0)
        splits = images[train], targets[train], images[test], targets[test]
        num_classes = 10
        if name == "two_digit_numbers":
            splits = (
                *two_digit_numbers(*splits[:2], NUMBERS[0], draws=generator("numbers", split_seed)),
                *two_digit_numbers(*splits[2:], NUMBERS[1], draws=generator("test numbers")),
            )
            num_classes, class_names = 100, tuple(f"{k:02d}" for k in range(100))
    elif name in ("cifar10", "cifar100"):
        num_classes = int(name.removeprefix("cifar"))
        splits = cifar_files.cifar(num_classes, root)
        class_names = cifar_files.class_names(num_classes, root)
        mean, std = mean or cifar_files.MEAN, std or cifar_files.STD
    elif name == "npz":
        splits = from_npz(Path(root), first_label=max(first_label, 0))
        num_classes = 1 + max(int(labels.max()) if len(labels) else 0 for labels in splits[1::2])
    elif name in ENCODED:
        if label_noise:
            raise ValueError(f"data.label_noise is for data in memory; got {label_noise} with data {name!r}")
        return _encoded(
            name,
            Path(root),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            split_seed=split_seed,
            seed=seed,
            train_limit=train_limit,
            test_limit=test_limit,
            augment=augment,
            image_size=image_size,
            workers=workers,
            reader=reader,
            device=device,
            least=least,
            views=views,
            first_label=first_label,
            **strongly,
        )
    else:
        raise ValueError(
            "data.name must be 'digits', 'two_digit_numbers', 'cifar100', 'cifar10', 'npz', 'folder', 'webdataset' or"
            f" 'tfrecord'; got {name!r}"
        )
    return in_memory(
        *splits,
        name=name,
        num_classes=num_classes,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        val_fraction=val_fraction,
        split_seed=split_seed,
        seed=seed,
        train_limit=train_limit,
        test_limit=test_limit,
        label_noise=label_noise,
        augment=augment,
        mean=mean or None,
        std=std or None,
        device=device,
        least=least,
        views=views,
        class_names=class_names,
        **strongly,
    )


def in_memory(
    train_images: Tensor,
    train_targets: Tensor,
    test_images: Tensor,
    test_targets: Tensor,
    *,
    num_classes: int,
    name: str = "memory",
    batch_size: int = 64,
    eval_batch_size: int = 256,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    seed: int = 0,
    train_limit: int = 0,
    test_limit: int = 0,
    label_noise: float = 0.0,
    augment: str = "none",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    strong: Strong = PLAIN,
    second: Strong | None = None,
    device: torch.device | str | None = None,
    least: int = 2,
    views: int = 0,
    class_names: tuple[str, ...] = (),
) -> Data:
    """Data from tensors; see MemoryLoader for images and targets, load for the rest. second: what the training samples'
    second view goes through, None for none."""
    train_targets = as_labels(train_targets)
    test_targets = as_labels(test_targets)
    kept, held_out = hold_out(len(train_images), val_fraction, seed=split_seed)
    kept = _limited("train_limit", kept, train_limit, seed=split_seed)
    tested = _limited("test_limit", torch.arange(len(test_images)), test_limit, seed=split_seed)

    def loader(images: Tensor, targets: Tensor, **options: Any) -> MemoryLoader:
        return MemoryLoader(
            images,
            targets,
            num_classes=num_classes,
            mean=mean,
            std=std,
            device=device,
            **{"batch_size": eval_batch_size, **options},
        )

    images, targets = train_images[kept], train_targets[kept]
    if label_noise:
        targets = mislabelled(targets, label_noise, num_classes=num_classes, seed=split_seed)

    def training(images: Tensor, strong: Strong) -> MemoryLoader:
        return loader(
            images,
            targets,
            batch_size=batch_size,
            seed=seed,
            shuffle=True,
            augment=augment,
            strong=strong,
            least=least,
            views=views,
        )

    first = training(images, strong)
    return Data(
        name=name,
        train=first if second is None else TwoViews(first, training(first.images, second)),
        score=loader(images, targets),
        val=loader(train_images[held_out], train_targets[held_out]) if len(held_out) else None,
        test=loader(test_images[tested], test_targets[tested]),
        class_names=class_names,
    )


def mislabelled(targets: Tensor, fraction: float, *, num_classes: int, seed: int) -> Tensor:
    """targets (N,) int64 with floor(fraction * N + .5) of them replaced by another class, uniformly."""
    if not 0.0 <= fraction < 1.0 or num_classes < 2:
        raise ValueError(f"label_noise must be in [0, 1) over at least 2 classes; got {fraction} over {num_classes}")
    draws = generator("label noise", seed)
    rows = torch.randperm(len(targets), generator=draws)[: int(fraction * len(targets) + 0.5)]
    noisy = targets.clone()
    noisy[rows] = (targets[rows] + torch.randint(1, num_classes, (len(rows),), generator=draws)) % num_classes
    return noisy


def answer_sources(size: int, fraction: float, *, seed: int) -> Tensor:
    """(size,) int64: whose answer each sample gets. floor(fraction * size + .5) samples, drawn by seed, get another
    one's; the others their own. ValueError for a fraction outside [0, 1), or where there is no other sample."""
    if not 0.0 <= fraction < 1.0 or (fraction and size < 2):
        raise ValueError(f"answer_noise must be in [0, 1), over at least 2 samples; got {fraction} over {size}")
    order = torch.randperm(size, generator=generator("answer noise", seed))
    count = int(fraction * size + 0.5)
    source = torch.arange(size)
    source[order[:count]] = order.roll(1)[:count]
    return source


def _limited(name: str, rows: Tensor, limit: int, *, seed: int) -> Tensor:
    """`limit` of the rows, ascending, drawn by seed; all of them for 0."""
    if limit < 0 or limit > len(rows):
        raise ValueError(f"{name} must be 0 (all) to {len(rows)}, the number of samples; got {limit}")
    if limit == 0:
        return rows
    return rows[torch.randperm(len(rows), generator=generator("limit", seed))[:limit]].sort().values


def _encoded(
    name: str,
    root: Path,
    *,
    batch_size: int,
    eval_batch_size: int,
    val_fraction: float,
    split_seed: int,
    seed: int,
    train_limit: int,
    test_limit: int,
    augment: str,
    image_size: int,
    workers: int,
    reader: str,
    strong: Strong,
    second: Strong | None,
    device: torch.device | str | None,
    least: int,
    views: int,
    first_label: int,
) -> Data:
    if augment not in ("none", "crop-flip"):
        raise ValueError(f"augment must be 'none' or 'crop-flip' for encoded pictures; got {augment!r}")
    if reader not in READERS:
        raise ValueError(f"data.reader must be one of {', '.join(READERS)}; got {reader!r}")
    if reader == "auto":
        reader = "dali" if has_dali() else "torchvision"
    train, test = (open_split(name, root, split, first_label=first_label) for split in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"{root}: train/ has {len(train.classes)} classes, val/ {len(test.classes)};"
            f" in one only: {', '.join(odd[:5])}"
        )
    numbered = train.classes == [str(k) for k in range(len(train.classes))]
    kept, held_out = hold_out(len(train.labels), val_fraction, seed=split_seed)
    kept = _limited("train_limit", kept, train_limit, seed=split_seed)
    tested = _limited("test_limit", torch.arange(len(test.labels)), test_limit, seed=split_seed)

    def loader(source: Source, rows: Tensor, **options: Any) -> Loader:
        defaults: dict[str, Any] = {"batch_size": eval_batch_size, "image_size": image_size}
        if reader == "dali":
            defaults |= {"device": device or "cpu", "threads": workers or 1}
            return DaliLoader(source, rows, **{**defaults, **options})
        return FolderLoader(source, rows, **{**defaults, "workers": workers, **options})

    def training(strong: Strong) -> Loader:
        return loader(
            train,
            kept,
            batch_size=batch_size,
            seed=seed,
            shuffle=True,
            train=augment == "crop-flip",
            least=least,
            views=views,
            strong=strong,
        )

    if augment == "none" and (second is not None or strong != PLAIN):
        raise ValueError("data.rand_augment, erasing and second_view go with augment 'crop-flip'; got augment 'none'")
    return Data(
        name=name,
        train=training(strong) if second is None else TwoViews(training(strong), training(second)),
        score=loader(train, kept),
        val=loader(train, held_out) if len(held_out) else None,
        test=loader(test, tested),
        class_names=() if numbered else tuple(train.classes),
    )
