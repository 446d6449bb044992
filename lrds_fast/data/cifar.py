"""CIFAR-10 and CIFAR-100 from the official pickles, from WebP sheets, or downloaded by torchvision."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrds_fast.data.memory import npz_arrays
from lrds_fast.data.pictures import Unreadable, decoded, reading

#: Mean and standard deviation per channel in the CIFAR literature.
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)

_FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
_FILES = {
    10: ([f"data_batch_{k}" for k in range(1, 6)], ["test_batch"], b"labels"),
    100: (["train"], ["test"], b"fine_labels"),
}
_SIDE = 32
#: Pictures per row and per column of a sheet.
_PER_SIDE = 50


class Pictures(NamedTuple):
    """images (size, 3, 32, 32) uint8, labels (size,) int64, of the training and the test split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def cifar(classes: int, root: str = "") -> Pictures:
    """CIFAR-10 or CIFAR-100.

    classes: 10 or 100. root: a folder with the official Python version (cifar-100-python/, cifar-10-batches-py/, or
    that folder itself) or, for CIFAR-100, with WebP sheets (labels.npz, train_00.webp, ...). "" is the folder cifar100/
    or cifar10/ in LRDS_DATA if it exists, else "data". torchvision downloads missing files. Code in pickles is never
    run. Raises ValueError for damaged files, OSError if the download fails, ImportError if a library is missing.
    """
    folder = Path(root) if root else _default(classes)
    if classes == 100 and (folder / "labels.npz").is_file():
        return _from_sheets(folder)
    official = _official(classes, folder)
    if not (official / _FILES[classes][0][0]).is_file():
        _download(classes, folder)
    return _from_pickles(classes, official)


def class_names(classes: int, root: str = "") -> tuple[str, ...]:
    """The classes' names, from the files that `cifar` reads; () if they have none. Arguments: see cifar."""
    folder = Path(root) if root else _default(classes)
    names: Any = ()
    try:
        if classes == 100 and (folder / "labels.npz").is_file():
            with np.load(folder / "labels.npz") as arrays:
                names = arrays["names"].tolist()
        else:
            file, key = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}[classes]
            content = _Plain(io.BytesIO((_official(classes, folder) / file).read_bytes()), encoding="bytes").load()
            names = content.get(key.encode()) or content[key]
        decoded_names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError):
        return ()
    return decoded_names if len(decoded_names) == classes else ()


def _official(classes: int, folder: Path) -> Path:
    return folder if (folder / _FILES[classes][0][0]).is_file() else folder / _FOLDERS[classes]


def _default(classes: int) -> Path:
    shared = os.environ.get("LRDS_DATA")
    named = Path(shared or "") / f"cifar{classes}"
    return named if shared and named.is_dir() else Path("data")


def _download(classes: int, folder: Path) -> None:
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError as error:
        raise ImportError(
            f"data.root: {folder} has no CIFAR-{classes}, and downloading it needs torchvision: pip install torchvision"
            f" ({error})"
        ) from error
    try:
        (CIFAR10 if classes == 10 else CIFAR100)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"data.root: {folder} has no CIFAR-{classes}, and it could not be downloaded ({reason}); put"
            f" {_FOLDERS[classes]}/ there"
        ) from error


class _Plain(pickle.Unpickler):
    """Reads arrays, bytes and plain containers; a pickle that names anything else is an error."""

    # The inner package's name differs between NumPy 1 and 2. Arrays use _reconstruct or, in protocol 5, _frombuffer.
    _CORE = "numpy._core" if int(np.__version__.partition(".")[0]) >= 2 else "numpy.core"
    _ALLOWED = {
        (f"{_CORE}.multiarray", "_reconstruct"),
        (f"{_CORE}.multiarray", "scalar"),
        (f"{_CORE}.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        installed = re.sub(r"^numpy\._?core(?=\.)", self._CORE, module)
        if (installed, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not data")
        return super().find_class(installed, name)


def _unpickled(path: Path, key: bytes, classes: int) -> tuple[Tensor, Tensor]:
    try:
        content = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        # Files written by Python 3 have str keys.
        content = {name.encode() if isinstance(name, str) else name: value for name, value in content.items()}
        images, labels = np.asarray(content[b"data"]), np.asarray(content[key])
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"its labels must be class numbers from 0 to {classes - 1}")
        if images.dtype != np.uint8 or images.shape != (len(labels), 3 * _SIDE * _SIDE):
            raise ValueError(f"its pictures are {images.dtype} of shape {images.shape}")
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a file of the official CIFAR ({error}); get it again") from error
    return torch.from_numpy(images.copy()).view(-1, 3, _SIDE, _SIDE), torch.from_numpy(labels.astype(np.int64))


def _from_pickles(classes: int, folder: Path) -> Pictures:
    train, test, key = _FILES[classes]
    splits = []
    for files in (train, test):
        parts = []
        for name in files:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"data.root: {folder} lacks the file {name}; get CIFAR-{classes} again")
            parts.append(_unpickled(folder / name, key, classes))
        splits += [torch.cat(side) for side in zip(*parts, strict=True)]
    return Pictures(*splits)


def _from_sheets(folder: Path) -> Pictures:
    """CIFAR-100 from lossless WebP sheets of 50 x 50 pictures, row by row in the labels' order."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"CIFAR in WebP sheets needs Pillow: pip install pillow ({error})") from error
    arrays = npz_arrays(folder / "labels.npz", ("train", "test"))
    labels = {
        split: torch.from_numpy(array.astype(np.int64)) for split, array in zip(("train", "test"), arrays, strict=True)
    }
    splits = []
    for split in ("train", "test"):
        count = len(labels[split])
        sheets = []
        for number in range(-(-count // _PER_SIDE**2)):
            path = folder / f"{split}_{number:02d}.webp"
            try:
                with reading():
                    sheet = np.asarray(decoded(np.fromfile(path, dtype=np.uint8)))
                    tiles = sheet.reshape(_PER_SIDE, _SIDE, _PER_SIDE, _SIDE, 3).transpose(0, 2, 4, 1, 3)
            except Unreadable as error:
                raise ValueError(f"{path} is missing, damaged or not a sheet of 50 x 50 pictures ({error})") from error
            sheets.append(torch.from_numpy(tiles.reshape(-1, 3, _SIDE, _SIDE).copy()))
        splits += [torch.cat(sheets)[:count], labels[split]]
    return Pictures(*splits)
