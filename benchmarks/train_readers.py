"""Loaders of pictures compared: torchvision's with its workers, DALI's, and CIFAR's in memory. Part of bench_train.py.

The pixels of photographs are compared before anything is timed.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks import train_loaders as loaders
from benchmarks.tables import Row, markdown_table
from benchmarks.train_loaders import Loader, Photographs, photograph_loader
from benchmarks.train_steps import cpu_seconds
from lrds_fast.data import DaliLoader
from lrds_fast.data.sources import Folder
from lrds_fast.data.transform import MEAN, STD


def levels(images: Tensor) -> Tensor:
    """Normalised photographs (N, 3, H, W) as pixel values from 0 to 255, float32 on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.cpu() * std + mean) * 255


def in_index_order(loader: Loader) -> Tensor:
    """Every picture of epoch 0 in the order of sample indices, on the CPU."""
    batches = list(loader.epoch(0))
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.images.cpu() for batch in batches])[order]


def check_evaluated(pictures: Photographs, count: int, kinds: Sequence[str], device: torch.device) -> dict[str, float]:
    """Compares the pictures that each kind of loader returns for evaluation with those of the published one; returns
    the mean difference of pixels for each kind, on the scale from 0 to 255.

    AssertionError for a mean above 0.05, or above 2 for the worst pixel of the median picture, the tolerance of
    tests/test_data_dali.py. GPUs decode JPEG differently: there the mean may be 2.
    """
    images_of = {
        kind: in_index_order(
            photograph_loader(kind, pictures, count=count, batch_size=25, train=False, workers=0, device=device)
        )
        for kind in kinds
    }
    expected = levels(images_of["published"])
    errors = {}
    for kind, images in images_of.items():
        off = (levels(images) - expected).abs()
        errors[kind] = float(off.mean())
        on_gpu = kind == "DALI" and device.type == "cuda"
        close = errors[kind] <= 2.0 if on_gpu else errors[kind] <= 0.05 and off.amax(dim=(1, 2, 3)).median() <= 2.0
        if not close:
            raise AssertionError(f"{kind}: evaluated pictures are {errors[kind]:.2f} levels of 255 off on average")
    return errors


def check_trained(pictures: Photographs, count: int, device: torch.device) -> float:
    """Compares DALI's augmented pictures with crops of the same boxes by Pillow and torchvision; returns the mean
    difference of pixels on the scale from 0 to 255.

    AssertionError for a mean above 1 (2 on a GPU), or on the CPU above 6 for the worst pixel of the median picture.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional

    loader = cast(
        DaliLoader,
        photograph_loader("DALI", pictures, count=count, batch_size=25, train=True, workers=1, device=device),
    )
    augmented, source = levels(in_index_order(loader)), Folder(pictures.root)
    errors = []
    for i in range(count):
        box = loader._prepare(i, 0).box
        image = Image.open(io.BytesIO(source.read(int(loader._rows[i])).tobytes())).convert("RGB")
        crop = functional.resized_crop(image, box.top, box.left, box.height, box.width, [224, 224], antialias=True)
        crop = functional.horizontal_flip(crop) if box.mirrored else crop
        errors.append((augmented[i] - functional.pil_to_tensor(crop).float()).abs())
    off = torch.stack(errors)
    mean, worst = float(off.mean()), float(off.amax(dim=(1, 2, 3)).median())
    if mean > (1.0 if device.type == "cpu" else 2.0) or (device.type == "cpu" and worst > 6.0):
        raise AssertionError(f"DALI: augmented pictures are {mean:.2f} levels off on average, {worst:.0f} at worst")
    return mean


def rows_of(
    scratch: Path, *, device: torch.device, count: int, workers: int, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """A row for each loader: of CIFAR for training, of photographs for training and for evaluation.

    scratch: folder for generated photographs. count: photographs of an epoch. say: prints a line.
    """
    return cifar_rows(device=device, count=20 * count, workers=workers, rounds=rounds, say=say) + photograph_rows(
        scratch, device=device, count=count, workers=workers, rounds=rounds, say=say
    )


def workers_of(name: str, workers: int) -> int:
    """ "published, no workers" has none, the other loaders have `workers`."""
    return 0 if name.endswith("no workers") else workers


def cifar_rows(*, device: torch.device, count: int, workers: int, rounds: int, say: Callable[[str], None]) -> list[Row]:
    kinds, reasons = loaders.cifar_kinds()
    for reason in reasons:
        say(f"readers: without {reason}")
    if "published" not in kinds:
        return []
    pictures = loaders.cifar_pictures(count)
    by_name = {
        name: loaders.cifar_loader(
            name.partition(",")[0], pictures, batch_size=64, workers=workers_of(name, workers), device=device
        )
        for name in ("published", "published, no workers", "in memory")
    }
    facts = {"case": "train, 32 x 32", "pictures": pictures[2], "samples": count, "workers": workers}
    return compared(by_name, facts, {}, device, rounds)


def photograph_rows(
    scratch: Path, *, device: torch.device, count: int, workers: int, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    kinds, reasons = loaders.photograph_kinds()
    for reason in reasons:
        say(f"readers: without {reason}")
    if "published" not in kinds:
        return []
    pictures = loaders.photographs(scratch)
    levels_off = {"eval": check_evaluated(pictures, min(count, 100), kinds, device), "train": {}}
    if "DALI" in kinds:
        levels_off["train"]["DALI"] = check_trained(pictures, min(count, 100), device)
    rows: list[Row] = []
    for transform in ("train", "eval"):
        by_name = {
            name: photograph_loader(
                name.partition(",")[0],
                pictures,
                count=count,
                batch_size=50,
                train=transform == "train",
                workers=workers_of(name, workers),
                device=device,
            )
            for name in ["published", "published, no workers", *kinds[1:]]
        }
        case = f"{transform}, 224 x 224"
        facts = {"case": case, "pictures": pictures.description, "samples": count, "workers": workers}
        rows += compared(by_name, facts, levels_off[transform], device, rounds)
    return rows


def compared(
    by_name: dict[str, Loader], facts: Row, levels_off: dict[str, float], device: torch.device, rounds: int
) -> list[Row]:
    """Times epochs of the loaders in turns, in CPU time (with that of workers that have ended) and in wall time; a row
    for each, with its ratios to "published"."""
    cpu: dict[str, list[float]] = {name: [] for name in by_name}
    wall: dict[str, list[float]] = {name: [] for name in by_name}
    for epoch in range(rounds + 1):
        for name, loader in by_name.items():
            began, cpu_began = time.perf_counter(), cpu_seconds()
            for batch in loader.epoch(epoch):
                batch.images.to(device, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if epoch:  # the first epoch builds pipelines and fills the file cache
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(cpu_seconds() - cpu_began)
    rows = []
    for name in by_name:
        ratios = [a / b for a, b in zip(cpu["published"], cpu[name], strict=True)]
        walls = [a / b for a, b in zip(wall["published"], wall[name], strict=True)]
        rows.append(
            {"part": "reader", "loader": name, "rounds": rounds}
            | facts
            | {
                "images_s": facts["samples"] / statistics.median(wall[name]),
                "images_cpu_s": facts["samples"] / statistics.median(cpu[name]),
                "vs_published": statistics.median(ratios),
                "vs_low": min(ratios),
                "vs_high": max(ratios),
                "vs_published_wall": statistics.median(walls),
                "levels_off": levels_off.get(name, ""),
            }
        )
    return rows


def formatted(value: object, form: str, empty: str = "") -> str:
    """The value as a number in the format `form`; `empty` if the row has no value."""
    return empty if value in ("", None) else format(float(str(value)), form)


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown; none for no rows."""
    if not rows:
        return []
    header = ["pictures", "reader", "images / CPU-s", "vs published, CPU time", "images/s", "levels of 255 off"]
    body = []
    for row in rows:
        spread = f"({formatted(row['vs_low'], '.2f')} to {formatted(row['vs_high'], '.2f')})"
        cells = [
            f"{row['samples']} {row['pictures']}, {row['case']}",
            row["loader"],
            formatted(row["images_cpu_s"], ".4g"),
        ]
        cells += [f"{formatted(row['vs_published'], '.2f')}x {spread}", formatted(row["images_s"], ".4g")]
        body.append([*cells, formatted(row["levels_off"], ".4f")])
    return [f"## Readers, {rows[0]['workers']} worker(s) or thread(s)", "", *markdown_table(header, body), ""]
