"""CIFAR in every form that it comes in, and its augmentation against torchvision's."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor

from lrds_fast import data as data_sets
from lrds_fast.data import MemoryLoader
from lrds_fast.data.cifar import MEAN, STD, Pictures, _Plain, cifar, class_names


def write_official(folder: Path, classes: int, *, protocol: int = 2) -> Pictures:
    """Writes a small data set in the files of the official Python version; returns its contents."""
    draws = np.random.default_rng(classes)
    files = {10: [f"data_batch_{k}" for k in range(1, 6)], 100: ["train"]}[classes]
    key = {10: b"labels", 100: b"fine_labels"}[classes]
    folder.mkdir(parents=True)
    found: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in [*files, "test_batch" if classes == 10 else "test"]:
        images = draws.integers(0, 256, (7, 3072), dtype=np.uint8)
        labels = draws.integers(0, classes, 7)
        content = {b"data": images, key: labels.tolist(), b"filenames": [b"x.png"] * 7}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
        found["test" if name.startswith("test") else "train"] += [images, labels]
    sides = [np.concatenate(found[split][k::2]) for split in ("train", "test") for k in (0, 1)]
    tensors = [torch.from_numpy(side) for side in sides]
    return Pictures(tensors[0].view(-1, 3, 32, 32), tensors[1], tensors[2].view(-1, 3, 32, 32), tensors[3])


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("inside", [True, False], ids=["folder itself", "folder above"])
def test_official_files(tmp_path: Path, classes: int, inside: bool) -> None:
    name = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    wanted = write_official(tmp_path / name, classes)
    found = cifar(classes, str(tmp_path / name if inside else tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found.train_images.shape == ((35 if classes == 10 else 7), 3, 32, 32)


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("classes", [10, 100])
def test_names_of_the_classes(tmp_path: Path, classes: int, as_text: bool) -> None:
    folder = tmp_path / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    write_official(folder, classes)
    assert class_names(classes, str(tmp_path)) == (), "the file that names them is not there"
    names = [f"class {k}" for k in range(classes)]
    file, key = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}[classes]
    content = {key: names} if as_text else {key.encode(): [name.encode() for name in names]}
    (folder / file).write_bytes(pickle.dumps(content))
    assert class_names(classes, str(tmp_path)) == class_names(classes, str(folder)) == tuple(names)
    assert data_sets.load(f"cifar{classes}", root=str(tmp_path)).class_names == tuple(names)
    (folder / file).write_bytes(pickle.dumps({key: names[:-1]}))
    assert class_names(classes, str(tmp_path)) == ()


def test_files_of_numpy_1(tmp_path: Path) -> None:
    """The pickles of the official files name numpy.core.multiarray, which NumPy 2 has moved."""
    wanted = write_official(tmp_path / "cifar-100-python", 100, protocol=0)
    for path in (tmp_path / "cifar-100-python").iterdir():
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert torch.equal(cifar(100, str(tmp_path)).train_images, wanted.train_images)


@pytest.mark.parametrize("labels", ["list", "scalars", "array"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(tmp_path: Path, protocol: int, labels: str) -> None:
    wanted = write_official(tmp_path / "cifar-100-python", 100)
    for path in (tmp_path / "cifar-100-python").iterdir():
        content = pickle.loads(path.read_bytes())
        numbers = np.array(content[b"fine_labels"])
        content[b"fine_labels"] = {"list": numbers.tolist(), "scalars": list(numbers), "array": numbers}[labels]
        if labels == "array":  # and names as Python 3 writes them
            content = {name.decode(): value for name, value in content.items()}
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = cifar(100, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_have_the_names_of_either_numpy(core: str) -> None:
    reader = _Plain(io.BytesIO())
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")):
        assert callable(reader.find_class(f"{core}.{module}", name))


def test_pickles_run_no_code(tmp_path: Path) -> None:
    write_official(tmp_path / "cifar-100-python", 100)

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    train = tmp_path / "cifar-100-python" / "train"
    train.write_bytes(pickle.dumps({b"data": Harmful()}))
    with pytest.raises(ValueError, match=r"train is damaged or not a file of the official CIFAR \(it refers to"):
        cifar(100, str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "no labels", "wrong labels", "wrong shape", "text"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cifar-100-python"
    write_official(folder, 100)
    content: dict[bytes, Any] = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 2]}
    if damage == "no labels":
        del content[b"fine_labels"]
    elif damage == "wrong labels":
        content[b"fine_labels"] = [1, 100]
    elif damage == "wrong shape":
        content[b"data"] = np.zeros((2, 1024), np.uint8)
    raw = b"hello" if damage == "text" else pickle.dumps(content)
    (folder / "test").write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw)
    with pytest.raises(ValueError, match="test is damaged or not a file of the official CIFAR"):
        cifar(100, str(tmp_path))
    (folder / "test").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the file test; get CIFAR-100 again"):
        cifar(100, str(tmp_path))


def test_a_failed_download_names_the_manual_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(root: str, download: bool) -> None:
        raise URLError("no network")

    monkeypatch.setattr(datasets, "CIFAR100", offline)
    with pytest.raises(OSError, match=r"could not be downloaded .*no network.*; put cifar-100-python/ there"):
        cifar(100, str(tmp_path))

    def arrives(root: str, download: bool) -> None:
        assert download
        write_official(Path(root) / "cifar-100-python", 100)

    monkeypatch.setattr(datasets, "CIFAR100", arrives)
    assert len(cifar(100, str(tmp_path)).train_labels) == 7


def test_as_data(tmp_path: Path) -> None:
    wanted = write_official(tmp_path / "cifar-100-python", 100)
    loaded = data_sets.load("cifar100", root=str(tmp_path), batch_size=4)
    assert loaded.num_classes == 100
    assert torch.equal(loaded.train.labels, wanted.train_labels)
    batch = next(iter(loaded.score.epoch(0)))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(batch.images, (wanted.train_images / 255 - mean) / std)
    assert torch.equal(loaded.train.picture(3), wanted.train_images[3].permute(1, 2, 0))


def test_the_archive_of_webp_sheets() -> None:
    """All of CIFAR-100: the statistics that are published, five hundred pictures a class."""
    folder = Path(os.environ.get("LRDS_DATA", "")) / "cifar100"
    if not os.environ.get("LRDS_DATA") or not folder.is_dir():
        pytest.skip("LRDS_DATA is not set, or has no cifar100")
    found = cifar(100)
    assert class_names(100)[:2] == ("apple", "aquarium_fish") and len(set(class_names(100))) == 100
    assert found.train_images.shape == (50000, 3, 32, 32) and found.test_images.shape == (10000, 3, 32, 32)
    assert torch.bincount(found.train_labels).tolist() == [500] * 100
    assert torch.bincount(found.test_labels).tolist() == [100] * 100
    pixels = (found.train_images.permute(1, 0, 2, 3).flatten(1) / 255).double()
    mean, std = torch.tensor([0.50707516, 0.48654887, 0.44091784]), torch.tensor([0.26733429, 0.25643846, 0.27615047])
    torch.testing.assert_close(pixels.mean(dim=1), mean.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels.std(dim=1), std.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip_are_torchvisions(dtype: torch.dtype) -> None:
    """With equal offsets and mirrors, the pixels equal those of RandomCrop(32, padding=4) and RandomHorizontalFlip."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    draws = torch.Generator().manual_seed(0)
    images: Tensor = torch.randint(0, 256, (40, 3, 32, 32), generator=draws).to(torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    loader = MemoryLoader(
        images,
        torch.zeros(40, dtype=torch.int64),
        num_classes=1,
        batch_size=40,
        augment="crop-flip",
        mean=MEAN,
        std=STD,
    )
    down, right, mirrored = loader._draws(3)
    assert set(down.tolist()) <= set(range(9)) and len(set(down.tolist())) > 5
    found = next(iter(loader.epoch(3))).images
    for i in range(40):
        whole = functional.pad(images[i], [4, 4, 4, 4])
        cut = functional.crop(whole, int(down[i]), int(right[i]), 32, 32)
        cut = functional.horizontal_flip(cut) if mirrored[i] else cut
        wanted = functional.normalize(functional.to_dtype(cut, torch.float32, scale=True), list(MEAN), list(STD))
        torch.testing.assert_close(found[i], wanted, rtol=1e-5, atol=1e-5)


def test_statistics_must_fit_the_channels() -> None:
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="std must have one value per channel, 3; got 2"):
        MemoryLoader(images, torch.zeros(2, dtype=torch.int64), num_classes=1, std=(1.0, 2.0))
