"""Opens a data set and makes a loader of each of its splits, as DataOptions say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrds_fast.data import cifar
from lrds_fast.data.dali import DaliLoader, has_dali
from lrds_fast.data.folder import FolderLoader
from lrds_fast.data.loader import Data, Loader, generator
from lrds_fast.data.memory import MemoryLoader, as_labels, digits, from_npz, two_digit_numbers
from lrds_fast.data.noise import mislabelled
from lrds_fast.data.sources import open_split
from lrds_fast.data.strong import PLAIN, Strong, TwoViews, training_views
from lrds_fast.data.transform import in_memory_transform, photograph_transform
from lrds_fast.recipe.recipe import DataOptions

#: Share of the digits that is the test split. It is drawn by a fixed seed.
DIGITS_TEST_FRACTION = 1 / 3
#: Size of the training split of two_digit_numbers (made of training digits) and of its test split (of test digits).
TRAIN_NUMBERS, TEST_NUMBERS = 5000, 4000

#: Data sets whose files contain class numbers.
_NUMBERED = ("npz", "webdataset", "tfrecord")
#: Options of the training loop, which mixes the samples of a batch; load does not.
_MIXING = ("mixup", "cutmix", "mix_probability")


class _Tensors(NamedTuple):
    """A data set in memory, before it is split: images and labels as MemoryLoader takes them. mean, std: used where the
    options have none."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def load(
    name: str | DataOptions,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    least: int = 2,
    views: int = 0,
    **options: Any,
) -> Data:
    """A data set, split and ready to train on.

    name: the data set's name, or a DataOptions. With a name, `options` are the other keys of DataOptions, but for those
    that the training loop applies (mixup, cutmix, mix_probability); docs/training.md lists all keys.

    - "digits" (of scikit-learn) and "two_digit_numbers" (100 classes, two digits side by side; split_seed draws the
      training numbers) need no root.
    - "cifar100", "cifar10": see lrds_fast.data.cifar.cifar for root; missing files are downloaded.
    - "npz": root is a file; see from_npz.
    - "folder": root has train/ and val/ (the test split), each with one folder per class. "webdataset", "tfrecord":
      archives of these splits; see lrds_fast.data.sources.open_split.

    val_fraction of the training samples are held out, drawn by split_seed; train_limit and test_limit reduce the rest
    and the test split.
    seed: of the order and the augmentation. device: where pictures in memory stay, or where DALI decodes; None is the
    CPU. least: a last training batch of fewer samples is added to the one before it. views: 0 draws new augmentations
    in every epoch; n > 0 repeats those of the first n epochs.

    Raises ValueError for options that do not fit the data set or each other, FileNotFoundError or ValueError for
    missing or damaged files, ImportError for a missing library.
    """
    if isinstance(name, str):
        options = _keys(options, name=name)
    elif options:
        raise TypeError(f"load takes a DataOptions or keywords, not both; got {', '.join(options)} beside DataOptions")
    chosen = DataOptions(**options) if isinstance(name, str) else name
    _check(chosen)
    if chosen.name in _ENCODED:
        return _encoded(chosen, seed=seed, device=device, least=least, views=views)
    tensors = _IN_MEMORY[chosen.name](chosen)
    return _in_memory(tensors, chosen, *training_views(chosen), seed=seed, device=device, least=least, views=views)


def in_memory(
    train_images: Tensor,
    train_targets: Tensor,
    test_images: Tensor,
    test_targets: Tensor,
    *,
    num_classes: int,
    class_names: tuple[str, ...] = (),
    strong: Strong = PLAIN,
    second: Strong | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    least: int = 2,
    views: int = 0,
    **options: Any,
) -> Data:
    """A data set made of tensors.

    images, targets: see MemoryLoader. class_names: of the classes 0, 1, ...; () for none. strong: further augmentation
    of the training images. second: augmentation of their second view, None for no second view. seed, device, least,
    views, options: see load. The name, "memory" by default, is only a label here.
    """
    tensors = _Tensors(train_images, train_targets, test_images, test_targets, num_classes, class_names)
    chosen = DataOptions(**_keys(options, name="memory"))
    return _in_memory(tensors, chosen, strong, second, seed=seed, device=device, least=least, views=views)


def hold_out(size: int, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """A random split of range(size): ascending indices (training, held out), floor(fraction * size + .5) held out."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"val_fraction must be in [0, 1); got {fraction}")
    count = int(fraction * size + 0.5)
    order = torch.randperm(size, generator=generator("hold out", seed))
    return order[count:].sort().values, order[:count].sort().values


class _Rows(NamedTuple):
    """Ascending indices of each split's samples; train and held_out are of the training samples."""

    train: Tensor
    held_out: Tensor
    test: Tensor


def _rows(options: DataOptions, train_size: int, test_size: int) -> _Rows:
    train, held_out = hold_out(train_size, options.val_fraction, seed=options.split_seed)
    train = _limited("train_limit", train, options.train_limit, seed=options.split_seed)
    test = _limited("test_limit", torch.arange(test_size), options.test_limit, seed=options.split_seed)
    return _Rows(train, held_out, test)


def _limited(key: str, rows: Tensor, limit: int, *, seed: int) -> Tensor:
    """`limit` of the rows, ascending, drawn by seed; all of them for 0."""
    if limit < 0 or limit > len(rows):
        raise ValueError(f"{key} must be 0 (all) to {len(rows)}, the number of samples; got {limit}")
    if limit == 0:
        return rows
    return rows[torch.randperm(len(rows), generator=generator("limit", seed))[:limit]].sort().values


def _keys(options: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Keywords of a call as those of DataOptions; None stands for the default."""
    unused = [key for key in _MIXING if key in options]
    if unused:
        raise TypeError(f"{', '.join(unused)}: loaders do not mix samples; lrds-fast train does, by data.{unused[0]}")
    return {"name": name} | {key: value for key, value in options.items() if value is not None}


def _check(options: DataOptions) -> None:
    """Raises ValueError for options that do not fit the named data set."""
    name = options.name
    if name not in (*_IN_MEMORY, *_ENCODED):
        raise ValueError(
            "data.name must be 'digits', 'two_digit_numbers', 'cifar100', 'cifar10', 'npz', 'folder', 'webdataset' or"
            f" 'tfrecord'; got {name!r}"
        )
    if name in ("npz", *_ENCODED) and not options.root:
        raise ValueError(
            f"data.root is empty: set it to the {'file' if name == 'npz' else 'folder'} of data {name!r}, e.g."
            " --set data.root=PATH"
        )
    first = options.first_label
    if first < -1 or (first >= 0 and name not in _NUMBERED):
        raise ValueError(
            f"data.first_label must be at least 0, or -1 for the default, and applies to data {', '.join(_NUMBERED)};"
            f" got {first} with data {name!r}"
        )
    if name not in _ENCODED:
        return
    if options.label_noise:
        raise ValueError(f"data.label_noise is for data in memory; got {options.label_noise} with data {name!r}")
    if options.augment not in ("none", "crop-flip"):
        raise ValueError(f"augment must be 'none' or 'crop-flip' for encoded pictures; got {options.augment!r}")
    if options.augment == "none" and training_views(options) != (PLAIN, None):
        raise ValueError("data.rand_augment, erasing and second_view need augment 'crop-flip'; got augment 'none'")


def _digits(options: DataOptions) -> _Tensors:
    images, targets = digits()
    train, test = hold_out(len(images), DIGITS_TEST_FRACTION, seed=0)
    return _Tensors(images[train], targets[train], images[test], targets[test], 10)


def _two_digit_numbers(options: DataOptions) -> _Tensors:
    single = _digits(options)
    train, test = generator("numbers", options.split_seed), generator("test numbers")
    return _Tensors(
        *two_digit_numbers(single.train_images, single.train_labels, TRAIN_NUMBERS, draws=train),
        *two_digit_numbers(single.test_images, single.test_labels, TEST_NUMBERS, draws=test),
        num_classes=100,
        class_names=tuple(f"{number:02d}" for number in range(100)),
    )


def _cifar(options: DataOptions) -> _Tensors:
    classes = int(options.name.removeprefix("cifar"))
    names = cifar.class_names(classes, options.root)
    return _Tensors(*cifar.cifar(classes, options.root), classes, names, cifar.MEAN, cifar.STD)


def _npz(options: DataOptions) -> _Tensors:
    tensors = from_npz(Path(options.root), first_label=max(options.first_label, 0))
    return _Tensors(*tensors, num_classes=1 + max(int(labels.max()) if len(labels) else 0 for labels in tensors[1::2]))


_IN_MEMORY: dict[str, Callable[[DataOptions], _Tensors]] = {
    "digits": _digits,
    "two_digit_numbers": _two_digit_numbers,
    "cifar100": _cifar,
    "cifar10": _cifar,
    "npz": _npz,
}
#: Data sets of encoded pictures, which are decoded batch by batch.
_ENCODED = ("folder", "webdataset", "tfrecord")


def _in_memory(
    data: _Tensors,
    options: DataOptions,
    strong: Strong,
    second: Strong | None,
    *,
    seed: int,
    device: torch.device | str | None,
    least: int,
    views: int,
) -> Data:
    train_labels, test_labels = as_labels(data.train_labels), as_labels(data.test_labels)
    rows = _rows(options, len(data.train_images), len(data.test_images))
    mean, std = options.mean or data.mean, options.std or data.std
    fixed: dict[str, Any] = {
        "num_classes": data.num_classes,
        "mean": mean or None,
        "std": std or None,
        "device": device,
    }

    def loader(images: Tensor, labels: Tensor, **arguments: Any) -> MemoryLoader:
        return MemoryLoader.of(options, images, labels, **fixed, **arguments)

    def training(images: Tensor, strong: Strong) -> MemoryLoader:
        return loader(images, labels, train=True, strong=strong, seed=seed, least=least, views=views)

    images, labels = data.train_images[rows.train], train_labels[rows.train]
    if options.label_noise:
        labels = mislabelled(labels, options.label_noise, num_classes=data.num_classes, seed=options.split_seed)
    first = training(images, strong)
    return Data(
        name=options.name,
        train=first if second is None else TwoViews(first, training(first.images, second)),
        score=loader(images, labels),
        val=loader(data.train_images[rows.held_out], train_labels[rows.held_out]) if len(rows.held_out) else None,
        test=loader(data.test_images[rows.test], test_labels[rows.test]),
        class_names=data.class_names,
        transform=in_memory_transform(tuple(data.test_images.shape[1:]), mean, std),
    )


def _encoded(options: DataOptions, *, seed: int, device: torch.device | str | None, least: int, views: int) -> Data:
    root = Path(options.root)
    train, test = (open_split(options.name, root, name, first_label=options.first_label) for name in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"{root}: train/ has {len(train.classes)} classes, val/ {len(test.classes)};"
            f" in one only: {', '.join(odd[:5])}"
        )
    rows = _rows(options, len(train.labels), len(test.labels))
    with_dali = options.reader == "dali" or (options.reader == "auto" and has_dali())
    reader: type[DaliLoader] | type[FolderLoader] = DaliLoader if with_dali else FolderLoader

    def loader(source: Any, indices: Tensor, **arguments: Any) -> Loader:
        return reader.of(options, source, indices, device=device, **arguments)

    def training(strong: Strong) -> Loader:
        return loader(train, rows.train, train=True, strong=strong, seed=seed, least=least, views=views)

    strong, second = training_views(options)
    numbered = train.classes == [str(number) for number in range(len(train.classes))]
    return Data(
        name=options.name,
        train=training(strong) if second is None else TwoViews(training(strong), training(second)),
        score=loader(train, rows.train),
        val=loader(train, rows.held_out) if len(rows.held_out) else None,
        test=loader(test, rows.test),
        class_names=() if numbered else tuple(train.classes),
        transform=photograph_transform(options.image_size),
    )
