"""The evaluation transform of picture files against the loaders' images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lrds_fast.data import in_memory, load
from lrds_fast.data.transform import Transform

Image = pytest.importorskip("PIL.Image")


def saved(pixels: Tensor, path: Path) -> Path:
    """(C, H, W) uint8 as a PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_file_becomes_the_image_of_its_loader(tmp_path: Path, channels: int) -> None:
    draws = torch.Generator().manual_seed(channels)
    images = torch.randint(0, 256, (6, channels, 9, 7), generator=draws, dtype=torch.uint8)
    labels = torch.arange(6) % 2
    values = {"mean": (0.3,), "std": (0.7,)} if channels == 1 else {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    data = in_memory(images, labels, images, labels, num_classes=2, **values)
    assert data.transform is not None
    (batch,) = data.test.epoch(0)
    for i, pixels in enumerate(images):
        image = data.transform(saved(pixels, tmp_path / f"{i}.png"))
        assert image.dtype == torch.float32 and image.is_contiguous()
        torch.testing.assert_close(image, batch.images[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(data.transform(Image.open(tmp_path / f"{i}.png")), image, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (61, 300), (300, 33), (12, 12), (9, 64)])
def test_a_photograph_becomes_the_image_of_its_loader(tmp_path: Path, size: tuple[int, int]) -> None:
    """Of torchvision's reader; a level of 255 would be a difference of 0.017."""
    pytest.importorskip("torchvision")
    draws = np.random.default_rng(0)
    paths = []
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "a.png")
            paths.append(folder / "a.png")
    data = load("folder", root=str(tmp_path), image_size=24, reader="torchvision")
    assert data.transform is not None and data.class_names == ("cat", "dog")
    (batch,) = data.test.epoch(0)
    for path, expected in zip(paths[2:], batch.images, strict=True):
        torch.testing.assert_close(data.transform(path), expected, rtol=0, atol=1e-6)


def test_pictures_of_another_size_keep_their_proportions(tmp_path: Path) -> None:
    """The left half black, the right half white, twice as large and with margins above and below."""
    transform = Transform(1, (4, 8), (4, 8), (0.0,), (1.0,))
    pixels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    pixels[:, :, 8:] = 255
    pixels[:, :4], pixels[:, 12:] = 100, 100
    image = transform(saved(pixels, tmp_path / "a.png"))
    assert image.shape == (1, 4, 8)
    assert (image[:, 1:3, :3] < 0.05).all() and (image[:, 1:3, 5:] > 0.95).all()
    colour = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    assert transform(colour).unique().tolist() == pytest.approx([76 / 255]), "the luma of red"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no picture .*a.png; correct the path"),
        (b"", ValueError, "a.png is not a readable picture"),
        (b"not a picture", ValueError, r"a.png is not a readable picture \(cannot identify image file\)"),
    ],
)
def test_unreadable_pictures_are_named(
    tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(error, match=message):
        Transform(1, (8, 8), (8, 8), (0.0,), (1.0,))(tmp_path / "a.png")
