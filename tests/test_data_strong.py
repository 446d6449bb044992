"""Strong augmentation: a function of seed, epoch and sample alone, from every reader, and as the literature has it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="pip install torchvision")
Image = pytest.importorskip("PIL.Image")

from lrds_fast.data import MemoryLoader, Strong, TwoViews, in_memory, load  # noqa: E402
from lrds_fast.data.folder import FolderLoader  # noqa: E402
from lrds_fast.data.sources import Folder  # noqa: E402
from lrds_fast.data.strong import apply, second_view  # noqa: E402
from lrds_fast.recipe.rand_augment import OPERATIONS, RandAugment, parse_rand_augment  # noqa: E402

STRONG = Strong("m9-n2-mstd0.5", erasing=0.5, cutout=True)


def pictures(count: int, size: int = 24, channels: int = 3) -> Tensor:
    """Smooth uint8 pictures, all different."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phases = torch.arange(count * channels).view(count, channels, 1, 1)
    return (127 + 90 * torch.sin((x * 2 + y + 11 * phases) / 7)).to(torch.uint8)


def test_names_match_timm() -> None:
    assert parse_rand_augment("m9-n2-mstd0.5") == RandAugment(9.0, 2, 0.5)
    assert parse_rand_augment("rand-m6-n3-mstdinf-inc1-p1.0-mmax20") == RandAugment(6.0, 3, math.inf, 20.0, True, 1.0)
    assert parse_rand_augment("m7-mstd101").deviation == math.inf
    for wrong, message in (
        ("9-2", "must be parts such as m9"),
        ("m9-m8", "must be parts"),
        ("m11", r"m must be in \[0, 10\]; got 11"),
        ("n0", r"n must be in \[1, 16\]; got 0"),
        ("p2", r"p must be in \[0, 1\]; got 2"),
    ):
        with pytest.raises(ValueError, match=f"data.rand_augment.*{message}"):
            parse_rand_augment(wrong)


@pytest.mark.parametrize("increasing", [False, True])
def test_operation_strengths_match_timm(increasing: bool) -> None:
    """At equal magnitudes, timm's operations get the same arguments, except for their signs."""
    auto_augment = pytest.importorskip("timm.data.auto_augment", reason="pip install timm")
    theirs = {
        "rotate": "Rotate",
        "posterize": "PosterizeIncreasing" if increasing else "Posterize",
        "solarize": "SolarizeIncreasing" if increasing else "Solarize",
        "solarize_add": "SolarizeAdd",
        "shear_x": "ShearX",
        "translate_y": "TranslateYRel",
    }
    theirs |= {
        name: f"{name.title()}Increasing" if increasing else name.title()
        for name in ("color", "contrast", "brightness", "sharpness")
    }
    for level in (0.0, 2.5, 9.0, 10.0):
        for ours, name in theirs.items():
            wanted = auto_augment.LEVEL_TO_ARG[name](level, {})[0]
            got = {RandAugment(increasing=increasing)._value(ours, level / 10, mirrored) for mirrored in (False, True)}
            assert any(abs(wanted - value) < 1e-9 or abs(wanted + value) < 1e-9 for value in got), (name, level)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_matches_pillow(name: str) -> None:
    """timm's operation on the same picture, but for a level of rounding, and for what is interpolated at borders."""
    auto_augment = pytest.importorskip("timm.data.auto_augment", reason="pip install timm")
    value = {"rotate": 17.0, "posterize": 3.0, "solarize": 130.0, "solarize_add": 40.0}.get(name, 0.25)
    value = 1.6 if name in ("color", "contrast", "brightness", "sharpness") else value
    images = pictures(2, 40)
    theirs_of = {
        "autocontrast": "AutoContrast",
        "solarize_add": "SolarizeAdd",
        "shear_x": "ShearX",
        "shear_y": "ShearY",
    }
    theirs_of |= {"translate_x": "TranslateXRel", "translate_y": "TranslateYRel"}
    function = auto_augment.NAME_TO_OP[theirs_of.get(name, name.title())]
    arguments = () if name in ("autocontrast", "equalize", "invert") else (value,)
    arguments = (int(value),) if name in ("posterize", "solarize", "solarize_add") else arguments
    ours = apply(name, images, value)
    assert not torch.equal(ours, images), "something happens"
    moved = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    for got, image in zip(ours, images, strict=True):
        options = {"resample": Image.BILINEAR, "fillcolor": (128, 128, 128)} if moved else {}
        wanted = torch.from_numpy(
            np.array(function(Image.fromarray(image.permute(1, 2, 0).numpy()), *arguments, **options))
        ).permute(2, 0, 1)
        difference = (got.int() - wanted.int()).abs()
        if moved:  # signs differ by convention
            back = apply(name, image[None], -value)[0]
            difference = min(difference, (back.int() - wanted.int()).abs(), key=lambda d: d.float().mean())
            assert difference.float().median() <= 2 and difference.float().mean() < 6
        else:
            assert difference.max() <= (12 if name in ("sharpness", "equalize") else 2)
            assert difference.float().mean() < 1.5


def numpy_state() -> np.ndarray:
    """The state of numpy's global generator, as an array of words."""
    words: np.ndarray = np.random.get_state(legacy=False)["state"]["key"].copy()
    return words


def test_augmentation_depends_on_the_seed_alone() -> None:
    images, seeds = pictures(40), [STRONG.seed(3, 1, i) for i in range(40)]
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate(), numpy_state()
    together = STRONG.erase(STRONG.augment(images, seeds).float(), seeds)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    for at in order:
        alone = STRONG.erase(STRONG.augment(images[at : at + 1], seeds[at : at + 1]).float(), seeds[at : at + 1])
        assert torch.equal(alone[0], together[at])
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == numpy_state()).all(), "no global generator is moved"
    others = [STRONG.augment(images, [STRONG.seed(*key, i) for i in range(40)]) for key in ((3, 2), (4, 1))]
    assert not torch.equal(others[0], others[1])
    assert torch.equal(images, pictures(40)), "what is given stays"


def test_rand_augment_draws_the_documented_distribution() -> None:
    plans = [RandAugment(9.0, 2, 0.5).plan(seed) for seed in range(3000)]
    names = [name for plan in plans for name, _ in plan]
    assert len(names) == 6000 and 0.47 < names.count("") / 6000 < 0.53
    for name in OPERATIONS:
        assert 150 < names.count(name) < 260, "3000 / 15 each"
    degrees = [value for plan in plans for name, value in plan if name == "rotate"]
    assert 0.35 < np.mean(np.sign(degrees) < 0) < 0.65 and np.mean(np.abs(degrees)) == pytest.approx(26.8, abs=0.5)
    uniform = [v for s in range(3000) for n, v in RandAugment(deviation=math.inf).plan(s) if n == "color"]
    assert np.mean(uniform) == pytest.approx(1.0, abs=0.1) and np.ptp(uniform) > 1.6


def test_erasing_and_cutout_have_the_documented_frequency_and_size() -> None:
    erased = Strong(erasing=0.25).erase(torch.full((2000, 1, 20, 20), 9.0), list(range(2000)))
    changed = (erased != 9.0).flatten(1).float().mean(dim=1)
    assert 0.21 < (changed > 0).float().mean() < 0.29
    boxes = changed[changed > 0]
    assert boxes.min() > 0.01 and boxes.max() < 0.37 and boxes.mean() == pytest.approx(0.5 * (0.02 + 1 / 3), abs=0.03)
    noise = erased[erased != 9.0]
    assert noise.mean() == pytest.approx(0.0, abs=0.02) and noise.std() == pytest.approx(1.0, abs=0.02)
    cut = Strong(cutout=True).augment(torch.zeros(500, 3, 20, 20, dtype=torch.uint8), list(range(500)))
    area = (cut == 128).flatten(1).float().mean(dim=1)
    assert 0.24 < area.max() <= 0.25 and area.min() < 0.13 and set(cut.unique().tolist()) == {0, 128}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_memory_loader_augments_per_sample(dtype: torch.dtype, channels: int) -> None:
    images = pictures(30, 16, channels)
    images = images if dtype == torch.uint8 else images.float() / 255
    targets = torch.arange(30) % 3

    def strong_pictures(batch_size: int, strong: Strong = STRONG) -> Tensor:
        options: dict[str, Any] = {
            "num_classes": 3,
            "seed": 5,
            "shuffle": True,
            "augment": "crop-flip",
            "mean": (0.5,),
            "std": (0.2,),
        }
        loader = MemoryLoader(images, targets, batch_size=batch_size, strong=strong, **options)
        batches = list(loader.epoch(2))
        order = torch.cat([batch.indices for batch in batches]).argsort()
        return torch.cat([batch.images for batch in batches])[order]

    assert torch.equal(strong_pictures(7), strong_pictures(30))
    assert not torch.equal(strong_pictures(7), strong_pictures(7, Strong()))
    assert strong_pictures(7).dtype == torch.float32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(pictures(12, 40)):
        for split in ("train", "val"):
            path = folder / split / f"class {i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.mark.parametrize("reader", ["torchvision", "dali"])
def test_encoded_pictures_do_not_depend_on_batch_or_workers(root: Path, reader: str) -> None:
    if reader == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")

    def augmented_pictures(batch_size: int, workers: int, rand_augment: str = "m9-n2-mstd0.5") -> Tensor:
        data = load(
            "folder",
            root=str(root),
            reader=reader,
            augment="crop-flip",
            image_size=16,
            batch_size=batch_size,
            workers=workers,
            rand_augment=rand_augment,
            erasing=0.5,
        )
        batches = list(data.train.epoch(1))
        order = torch.cat([batch.indices for batch in batches]).argsort()
        return torch.cat([batch.images for batch in batches])[order]

    assert torch.equal(augmented_pictures(5, 1), augmented_pictures(12, 2))
    assert not torch.equal(augmented_pictures(5, 1), augmented_pictures(5, 1, ""))
    assert not torch.equal(augmented_pictures(5, 1), augmented_pictures(5, 1, "m3-n2"))


def test_readers_apply_the_same_augmentation(root: Path) -> None:
    """Crops, operations and boxes are equal; pixels differ by one or two levels from resampling."""
    pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
    options: dict[str, Any] = {
        "root": str(root),
        "augment": "crop-flip",
        "image_size": 16,
        "batch_size": 12,
        "erasing": 0.5,
    }
    found = []
    for reader in ("dali", "torchvision"):
        data = load("folder", reader=reader, rand_augment="m9-n2-mstd0.5", second_view="strong", **options)
        (batch,) = data.train.epoch(1)
        assert batch.strong is not None
        found.append(torch.stack([batch.images, batch.strong])[:, batch.indices.argsort()])
    difference = (found[0] - found[1]).abs().flatten(2).mean(dim=2)
    assert difference.median() < 0.02 and (difference < 0.2).float().mean() > 0.8
    assert (found[0] - found[1].roll(1, dims=1)).abs().mean() > 0.5, "other samples are far"


def test_cutout_changes_only_its_square(root: Path) -> None:
    source = Folder(root / "train")
    plain = [FolderLoader(source, torch.arange(12), batch_size=4, image_size=16, train=True) for _ in range(2)]
    plain[1]._samples.strong = Strong(cutout=True)
    first, second = (torch.cat([batch.images for batch in loader.epoch(0)]) for loader in plain)
    grey = (second != first).any(dim=1)
    assert grey.any() and not grey.all() and torch.equal(first[:, :, ~grey.any(0)], second[:, :, ~grey.any(0)])


@pytest.mark.parametrize("reader", ["memory", "torchvision", "dali"])
def test_a_second_view_is_of_the_same_samples(root: Path, reader: str) -> None:
    if reader == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
    if reader == "memory":
        images, targets = pictures(30), torch.arange(30) % 3
        arguments: dict[str, Any] = {"num_classes": 3, "batch_size": 7, "augment": "crop-flip"}
        data, plain = (
            in_memory(images, targets, images[:6], targets[:6], second=second_view(name), **arguments)
            for name in ("strong", "")
        )
    else:
        options: dict[str, Any] = {
            "root": str(root),
            "reader": reader,
            "augment": "crop-flip",
            "image_size": 16,
            "batch_size": 5,
        }
        data, plain = load("folder", second_view="strong", **options), load("folder", **options)
    assert isinstance(data.train, TwoViews) and len(data.train) == len(plain.train)
    count = 0
    selected = torch.arange(len(data.train.labels)) % 2 == 0
    for got, wanted in zip(data.train.epoch(1, selected), plain.train.epoch(1, selected), strict=True):
        assert torch.equal(got.indices, wanted.indices) and torch.equal(got.images, wanted.images)
        assert got.strong is not None and wanted.strong is None
        assert got.strong.shape == got.images.shape and got.strong.dtype == got.images.dtype
        assert not (got.strong == got.images).flatten(1).all(dim=1).any(), "every sample has another picture"
        count += len(got.indices)
    assert count == len(data.train.labels)
    assert all(batch.strong is None for batch in data.test.epoch(0))
    assert torch.equal(data.train.picture(3), plain.train.picture(3))


@pytest.mark.parametrize("reader", ["memory", "torchvision", "dali"])
def test_views_repeat_and_epochs_start_in_the_middle_and_are_shared(root: Path, reader: str) -> None:
    if reader == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
    if reader == "memory":
        images, targets = pictures(30), torch.arange(30) % 3
        arguments: dict[str, Any] = {
            "num_classes": 3,
            "batch_size": 7,
            "augment": "crop-flip",
            "views": 2,
            "strong": STRONG,
        }
        train = in_memory(images, targets, images[:6], targets[:6], second=second_view("strong"), **arguments).train
    else:
        train = load(
            "folder",
            root=str(root),
            reader=reader,
            augment="crop-flip",
            image_size=16,
            batch_size=5,
            views=2,
            rand_augment="m9-n2-mstd0.5",
            erasing=0.5,
            second_view="strong",
        ).train

    def tensors(batch: Any) -> list[Tensor]:
        return [part for part in batch if part is not None]

    def by_index(epoch: int) -> list[Tensor]:
        batches = list(train.epoch(epoch))
        order = torch.cat([batch.indices for batch in batches]).argsort()
        return [torch.cat([tensors(batch)[place] for batch in batches])[order] for place in (0, 3)]

    first, again, other = by_index(0), by_index(2), by_index(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    whole = list(train.epoch(3))
    for a, b in zip(whole[1:], train.epoch(3, start=1), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    for a, b in zip(whole, train.epoch(3, share=(1, 2)), strict=True):
        rows = slice(1, None, 2) if len(a.indices) >= 4 else slice(0)  # a last batch that is too small is the first's
        assert all(torch.equal(x[rows], y) for x, y in zip(tensors(a), tensors(b), strict=True))
    assert torch.equal(train.boxes(0, torch.arange(4)), train.boxes(2, torch.arange(4)))


def test_mistakes_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data.erasing must be in \[0, 1\]; got 1.5"):
        Strong(erasing=1.5)
    with pytest.raises(ValueError, match="data.second_view must be '' or 'strong'; got 'weak'"):
        second_view("weak")
    with pytest.raises(ValueError, match="need augment 'crop-flip'; got augment 'none'"):
        load("folder", root=str(root), erasing=0.5)
    images = pictures(6)
    loaders = [MemoryLoader(images, torch.arange(6) % k, num_classes=3) for k in (2, 3)]
    with pytest.raises(ValueError, match="their labels differ"):
        TwoViews(*loaders)
    shuffled = [MemoryLoader(images, torch.zeros(6).long(), num_classes=1, seed=s, shuffle=True) for s in (0, 1)]
    with pytest.raises(RuntimeError, match="the loaders' seeds or batch sizes differ"):
        list(TwoViews(*shuffled).epoch(0))
