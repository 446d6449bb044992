"""DALI's pictures are torchvision's, in the trainer's order, from folders, tars, TFRecords; broken ones are named."""

from __future__ import annotations

import gc
import io
import json
import os
import struct
import tarfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data import example
from torch import Tensor, nn

from lrds_fast.data import SoftLabels, write_soft_labels
from lrds_fast.data.folder import FolderLoader
from lrds_fast.data.sources import Folder
from lrds_fast.data.tfrecord import TFRecords
from lrds_fast.data.transform import STD
from lrds_fast.data.webdataset import Tars

pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
Image = pytest.importorskip("PIL.Image")

from lrds_fast.data.boxes import random_box  # noqa: E402
from lrds_fast.data.dali import DaliLoader  # noqa: E402
from lrds_fast.data.pictures import picture_size  # noqa: E402

COUNT = 26
SIZE = 32


def picture(index: int, mode: str = "RGB") -> object:
    """Smooth pictures of different sizes: readers may differ by resampling only."""
    height, width = 40 + 3 * (index % 7), 38 + 5 * (index % 5)
    y, x = np.mgrid[0:height, 0:width]
    channels = [128 + 100 * np.sin((x * (k + 1) + y * 2 + 7 * index) / 17) for k in range(3)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of JPEGs, PNGs, grey and CMYK pictures, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        mode = {3: "L", 8: "CMYK"}.get(i, "RGB")
        extension = "png" if i % 6 == 1 else "jpg"
        path = folder / f"class {i % 3}" / ("more" if i == 9 else "") / f"{i:02d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, mode).save(path, **({} if extension == "png" else {"quality": 95}))  # type: ignore[attr-defined]
    return folder


def loader(root: Path, **options: object) -> DaliLoader:
    source = Folder(root)
    arguments = {"batch_size": 8, "image_size": SIZE, "seed": 3} | options
    return DaliLoader(source, torch.arange(len(source.labels)), **arguments)  # type: ignore[arg-type]


def images_of(found: DaliLoader, epoch: int = 0, **options: object) -> Tensor:
    """The pictures in the order of their indices."""
    batches = list(found.epoch(epoch, **options))  # type: ignore[arg-type]
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.images for batch in batches])[order]


def test_samples_are_those_of_torchvision(root: Path) -> None:
    from torchvision import datasets

    torchvision = datasets.ImageFolder(str(root))
    source = Folder(root)
    assert source.classes == torchvision.classes
    assert source.labels.tolist() == torchvision.targets
    assert [source.name(i) for i in range(COUNT)] == [path for path, _ in torchvision.samples]


def test_pixels_of_an_evaluation_are_torchvisions(root: Path) -> None:
    found = images_of(loader(root))
    wanted = torch.cat(
        [b.images for b in FolderLoader(Folder(root), torch.arange(COUNT), batch_size=8, image_size=SIZE).epoch(0)]
    )
    worst = (found - wanted).abs().amax(dim=(0, 2, 3)) * torch.tensor(STD) * 255
    # CMYK is converted by other rules.
    cmyk = next(i for i in range(COUNT) if Folder(root).name(i).endswith("08.jpg"))
    rest = torch.arange(COUNT) != cmyk
    worst = ((found - wanted)[rest]).abs().amax(dim=(0, 2, 3)) * torch.tensor(STD) * 255
    assert worst.max() <= 2.0, "levels of 255"
    assert ((found - wanted)[rest] * torch.tensor(STD).view(3, 1, 1) * 255).abs().mean() < 0.05


def test_training_pixels_match_their_boxes(root: Path) -> None:
    """The box that the seed gives, cut out by Pillow and resized by torchvision."""
    from torchvision.transforms.v2 import functional

    found = loader(root, train=True)
    got, source = images_of(found, 2), Folder(root)
    errors = []
    for i in range(COUNT):
        sample = found._prepare(i, 2)
        opened = Image.open(io.BytesIO(source.read(i).tobytes()))
        if opened.mode == "CMYK":
            continue
        box = sample.box
        cut = functional.resized_crop(
            opened.convert("RGB"), box.top, box.left, box.height, box.width, [SIZE, SIZE], antialias=True
        )
        cut = functional.horizontal_flip(cut) if box.mirrored else cut
        wanted = functional.pil_to_tensor(cut).float()
        mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
        errors.append(((got[i] * torch.tensor(STD).view(3, 1, 1) + mean) * 255 - wanted).abs())
    # Enlarged crops differ by how decoders interpolate colour at the box's edge.
    assert torch.stack(errors).mean() < 1.0
    assert torch.stack(errors).amax(dim=(1, 2, 3)).median() <= 6.0


def test_boxes_are_distributed_as_torchvisions() -> None:
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    whole = torch.zeros(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(whole, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    ours = np.array([random_box(300, 400, SIZE, seed)[:4] for seed in range(3000)])
    measures: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / np.maximum(300 - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(400 - b[:, 3], 1),
    ]
    for measure in measures:
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    assert 0.45 < np.mean([random_box(300, 400, SIZE, seed).mirrored for seed in range(3000)]) < 0.55


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 400), (400, 5)])
def test_boxes_of_odd_pictures_lie_inside(height: int, width: int) -> None:
    for seed in range(50):
        box = random_box(height, width, SIZE, seed)
        assert box.top >= 0 and box.top + box.height <= height and box.height > 0
        assert box.left >= 0 and box.left + box.width <= width and box.width > 0


def test_epochs_are_exact_and_repeat(root: Path) -> None:
    found = loader(root, train=True, shuffle=True)
    assert len(found) == 4
    first = [b for b in found.epoch(0)]
    assert torch.equal(torch.cat([b.indices for b in first]).sort().values, torch.arange(COUNT))
    assert [len(b.indices) for b in first] == [8, 8, 8, 2]
    assert all(torch.equal(b.targets, found.labels[b.indices]) for b in first)
    other = [b for b in found.epoch(1)]
    assert not torch.equal(torch.cat([b.indices for b in first]), torch.cat([b.indices for b in other]))
    again = [b for b in loader(root, train=True, shuffle=True, threads=3, batch_size=8).epoch(0)]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices)
    # A sample's picture does not depend on who shares its batch.
    assert torch.equal(images_of(loader(root, train=True, batch_size=5)), images_of(loader(root, train=True)))


def test_selected_samples_come_first(root: Path) -> None:
    selected = torch.arange(COUNT) % 3 == 0
    for batch in loader(root, shuffle=True).epoch(0, selected):
        mask = selected[batch.indices]
        assert mask[: int(mask.sum())].all()


def test_epochs_start_in_the_middle(root: Path) -> None:
    whole = list(loader(root, train=True, shuffle=True).epoch(4))
    rest = list(loader(root, train=True, shuffle=True).epoch(4, start=2))
    assert len(rest) == 2
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.images, b.images)


def test_an_abandoned_epoch_does_not_leak_into_the_next(root: Path) -> None:
    found = loader(root, train=True, shuffle=True)
    for batch in found.epoch(0):
        assert len(batch.indices) == 8
        break
    wanted = list(loader(root, train=True, shuffle=True).epoch(1))
    for a, b in zip(found.epoch(1), wanted, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.images, b.images)


def test_a_loader_is_freed_with_its_last_reference(root: Path) -> None:
    """Reference counting frees it. The garbage collector in a forked process would join threads that do not exist
    there."""
    gc.collect()
    gc.disable()
    try:
        found = loader(root)
        list(found.epoch(0))
        iterator = found.epoch(1)
        next(iterator)
        pipeline = weakref.ref(found._pipeline)
        assert pipeline() is not None
        del found, iterator
        assert pipeline() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("alive", [True, False])
def test_forked_processes_can_collect_garbage(root: Path, alive: bool) -> None:
    found: DaliLoader | None = loader(root)
    assert found is not None
    list(found.epoch(0))
    if not alive:
        found = None
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert found is None or len(found.labels) == COUNT


@pytest.mark.parametrize("selecting", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_every_batch(root: Path, count: int, selecting: bool) -> None:
    """The batches have 8, 8, 8 and 2 samples; only the first process has a part of the last one."""
    selected = torch.arange(COUNT) % 3 == 0 if selecting else None
    whole = list(loader(root, train=True, shuffle=True).epoch(0, selected))
    for number in range(count):
        share = list(loader(root, train=True, shuffle=True).epoch(0, selected, share=(number, count)))
        assert len(share) == len(whole)
        for batch, ours in zip(whole, share, strict=True):
            rows = slice(number, None, count)
            if len(batch.indices) < min(8, 2 * count):  # a last batch that is too small is the first process's
                rows = slice(0 if number else None)
            assert all(torch.equal(a[rows], b) for a, b in zip(batch[:3], ours[:3], strict=True))
            if selected is not None:
                mask = selected[ours.indices]
                assert mask[: int(mask.sum())].all()


def test_a_loader_takes_batches_of_every_size_in_turn(root: Path) -> None:
    """Shares of a half need less room in the pipeline than the whole batches after them."""
    found = loader(root, shuffle=True, least=8)
    half = list(found.epoch(0, share=(0, 2)))
    whole = list(found.epoch(0))
    assert [len(batch.indices) for batch in whole] == [8, 8, 10]
    assert all(torch.equal(a.images[::2], b.images) for a, b in zip(whole, half, strict=True))


def test_boxes_are_those_that_are_cut_and_torchvisions(root: Path) -> None:
    found = loader(root, train=True, views=3)
    indices = torch.tensor([4, 0, 25, 9])
    boxes = found.boxes(5, indices)
    for index, box in zip(indices.tolist(), boxes.tolist(), strict=True):
        prepared = found._prepare(index, 2).box
        assert box == [*prepared[:4], int(prepared.mirrored)]
    options: dict[str, object] = {"batch_size": 8, "image_size": SIZE, "seed": 3, "views": 3}
    folder = FolderLoader(Folder(root), torch.arange(COUNT), train=True, **options)  # type: ignore[arg-type]
    assert torch.equal(folder.boxes(5, indices), boxes)
    whole = loader(root).boxes(0, indices).tolist()
    sizes = [picture_size(Folder(root).read(i)) for i in indices.tolist()]
    assert whole == [[0, 0, *size, 0] for size in sizes]


def test_soft_labels_are_written_with_one_reader_and_used_with_the_other(root: Path, tmp_path: Path) -> None:
    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    options: dict[str, Any] = {
        "batch_size": 8,
        "image_size": SIZE,
        "seed": 3,
        "train": True,
        "shuffle": True,
        "views": 2,
    }
    everyone = torch.arange(COUNT)
    write_soft_labels(tmp_path, Means(), DaliLoader(Folder(root), everyone, **options), views=2, progress=False)
    theirs = FolderLoader(Folder(root), everyone, **options)
    found = SoftLabels.open(tmp_path, loader=theirs)
    for batch in theirs.epoch(3):
        rgb = torch.tensor([i not in (3, 8) for i in batch.indices.tolist()])
        written = torch.as_tensor(found.batch(1, batch.indices)).float()
        assert (written - Means()(batch.images))[rgb].abs().max() < 0.03


def test_training_pictures_are_torchvisions(root: Path) -> None:
    """Both readers cut the same boxes out, so that what was computed with one may be used with the other."""
    rgb = torch.tensor([i not in (3, 8) for i in range(COUNT)])
    ours = images_of(loader(root, train=True), 1)[rgb]
    folder = FolderLoader(Folder(root), torch.arange(COUNT), train=True, batch_size=8, image_size=SIZE, seed=3)
    theirs = images_of(folder, 1)[rgb]  # type: ignore[arg-type]
    levels = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # Enlarged crops differ by how decoders interpolate colour at the box's edge.
    assert levels.mean() < 1.0
    assert levels.amax(dim=(1, 2, 3)).median() <= 6.0


def test_broken_pictures_are_named_and_counted_not_fatal(root: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    source = Folder(copy)
    jpegs = [i for i in range(COUNT) if source.name(i).endswith(".jpg")]
    text, headless, rubbish, gone = jpegs[1], jpegs[4], jpegs[9], jpegs[-1]
    Path(source.name(text)).write_text("no picture")
    content = Path(source.name(headless)).read_bytes()
    Path(source.name(headless)).write_bytes(content[:40])
    content = Path(source.name(rubbish)).read_bytes()
    scan = content.index(b"\xff\xda")
    Path(source.name(rubbish)).write_bytes(
        content[: content.index(b"\xff\xc0") + 19] + b"\xff\xd9" + content[scan:][:0]
    )
    found = DaliLoader(source, torch.arange(COUNT), batch_size=8, image_size=SIZE)
    os.remove(source.name(gone))
    bad = {text, headless, rubbish, gone}
    for epoch in range(2):
        got = images_of(found, epoch)
        assert {i for i, _, _ in found.errors} == bad, found.errors
        assert len(found.errors) == 4, "each once"
    reasons = {i: reason for i, _, reason in found.errors}
    assert "DALI does not decode" in reasons[rubbish], "a sound header: found by decoding"
    for i, name, reason in found.errors:
        assert name == source.name(i) and reason and "\n" not in reason
    whole = images_of(loader(root))
    sound = torch.tensor([i not in bad for i in range(COUNT)])
    assert torch.equal(got[sound], whole[sound])
    assert (got[~sound].flatten(2).std(dim=2) < 1e-6).all(), "grey"


def test_headers_that_the_decoder_cannot_parse_do_not_end_the_process(root: Path, tmp_path: Path) -> None:
    source = Folder(root)
    png = next(i for i in range(COUNT) if source.name(i).endswith(".png"))
    for i in range(32):
        path = tmp_path / "a" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        # The size is there, the rest of the header is not.
        path.write_bytes(source.read(png).tobytes()[: 30 if i == 5 else None])
    for _ in range(6):
        found = DaliLoader(Folder(tmp_path), torch.arange(32), batch_size=32, image_size=SIZE, threads=2)
        images_of(found)
        assert [index for index, _, _ in found.errors] == [5]


def test_sizes_are_read_from_headers(root: Path) -> None:
    source = Folder(root)
    for i in range(COUNT):
        opened = Image.open(source.name(i))
        assert picture_size(source.read(i)) == (opened.height, opened.width)
    buffer = io.BytesIO()
    picture(5).save(buffer, "WEBP")  # type: ignore[attr-defined]
    assert picture_size(np.frombuffer(buffer.getvalue(), np.uint8)) == picture(5).size[::-1]  # type: ignore[attr-defined]
    for junk in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x04", b"GIF89a", os.urandom(300)):
        with pytest.raises(ValueError):  # noqa: PT011 (each says something else)
            picture_size(np.frombuffer(junk, np.uint8))


def write_tars(root: Path, folder: Path, *, as_json: bool = False) -> list[Path]:
    source, paths = Folder(root), [folder / f"part-{k}.tar" for k in range(2)]
    for k, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for i in range(k, COUNT, 2):
                label = int(source.labels[i])
                extension = source.name(i).rpartition(".")[2]
                text = json.dumps({"cls": label}) if as_json else str(label)
                for name, content in (
                    (f"{i:05d}.{'json' if as_json else 'cls'}", text.encode()),
                    (f"{i:05d}.{extension}", source.read(i).tobytes()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return paths


def test_tars_yield_the_samples_of_the_folder(root: Path, tmp_path: Path) -> None:
    folder = Folder(root)
    for as_json in (False, True):
        tars = Tars(write_tars(root, tmp_path, as_json=as_json), classes=folder.classes)
        order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
        assert torch.equal(tars.labels, folder.labels[order])
        assert all(np.array_equal(tars.read(k), folder.read(i)) for k, i in enumerate(order))
    assert tars.name(3).endswith("part-0.tar:00006")
    got = DaliLoader(tars, torch.arange(COUNT), batch_size=8, image_size=SIZE, threads=3)
    assert torch.equal(images_of(got), images_of(loader(root))[order])
    (tmp_path / "bad.tar").write_bytes((tmp_path / "part-0.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"bad.tar"):
        Tars([tmp_path / "bad.tar"])
    with tarfile.open(tmp_path / "bare.tar", "w") as archive:
        archive.add(folder.name(0), "7.jpg")
    with pytest.raises(ValueError, match=r"bare.tar:7 has a picture but no label"):
        Tars([tmp_path / "bare.tar"])


@pytest.mark.parametrize("packed", [True, False])
def test_tfrecords_yield_the_samples_of_the_folder(root: Path, tmp_path: Path, packed: bool) -> None:
    folder = Folder(root)
    paths = [tmp_path / f"train-{k:05d}-of-00002" for k in range(2)]
    for k, path in enumerate(paths):
        with path.open("wb") as file:
            for i in range(k, COUNT, 2):
                content = example(folder.read(i).tobytes(), int(folder.labels[i]) + 300, packed=packed)
                file.write(struct.pack("<Q", len(content)) + b"crc1" + content + b"crc2")
    records = TFRecords(paths, first_label=300)
    order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    assert torch.equal(records.labels, folder.labels[order])
    assert all(np.array_equal(records.read(k), folder.read(i)) for k, i in enumerate(order))
    got = DaliLoader(records, torch.arange(COUNT), batch_size=8, image_size=SIZE)
    assert torch.equal(images_of(got), images_of(loader(root))[order])
    paths[0].write_bytes(paths[0].read_bytes()[:-7])
    with pytest.raises(ValueError, match="train-00000-of-00002 is damaged or not a TFRecord file"):
        TFRecords(paths)
    with paths[0].open("wb") as file:
        file.write(struct.pack("<Q", 4) + b"crc1" + b"\x0a\x02ab" + b"crc2")
    with pytest.raises(ValueError, match="record 0 is not an example with image/encoded"):
        TFRecords(paths)


def test_bad_arguments_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"share must be .* got \(2, 2\)"):
        list(loader(root).epoch(0, share=(2, 2)))
    with pytest.raises(ValueError, match="threads and image_size must be at least 1"):
        loader(root, threads=0)
    with pytest.raises(ValueError, match="batch_size and least must be at least 1; got 8 and 0"):
        loader(root, least=0)
    (root.parent / "empty" / "a").mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        Folder(root.parent / "empty")


def test_real_photographs() -> None:
    """Original ImageNet files, odd encodings among them: DALI and torchvision see the same."""
    folder = Path(os.environ.get("LRDS_DATA", "")) / "imagenet_jpegs"
    if not os.environ.get("LRDS_DATA") or not folder.is_dir():
        pytest.skip("LRDS_DATA is not set, or has no imagenet_jpegs")
    source = Folder(folder)
    rows = torch.arange(len(source.labels))
    ours = DaliLoader(source, rows, batch_size=50)
    theirs = FolderLoader(source, rows, batch_size=50)
    for a, b in zip(ours.epoch(0), theirs.epoch(0), strict=True):
        levels = (a.images - b.images).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        assert float(levels.mean()) < 0.02
        assert float(levels.amax(dim=(1, 2, 3)).median()) <= 2.0
    assert ours.errors == []


def test_inference_mode_reads_the_same_pictures(root: Path) -> None:
    """Evaluation runs in inference mode; reader threads cannot write to inference tensors."""
    found = loader(root)
    expected = images_of(found)
    with torch.inference_mode():
        batches = list(found.epoch(0))
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    assert not any(batch.images.is_inference() for batch in batches)
    assert found.errors == []


def test_failures_not_caused_by_a_picture_are_raised(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loader(root)
    tries = []
    fault = DaliLoader._fault

    def counted(self: DaliLoader, sample: Any) -> str | None:
        tries.append(sample)
        monkeypatch.undo()
        return fault(self, sample)

    def failing(self: DaliLoader) -> Any:
        next(self._feed)
        raise RuntimeError("out of memory\nstack trace")

    monkeypatch.setattr(DaliLoader, "_decode", failing)
    monkeypatch.setattr(DaliLoader, "_fault", counted)
    with pytest.raises(
        RuntimeError, match="DALI fails on a batch, although it decodes each of its pictures alone: out of memory$"
    ):
        list(found.epoch(0))
    assert len(tries) == 1 and found.errors == []
