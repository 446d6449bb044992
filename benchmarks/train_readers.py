"""What reads photographs: DALI against torchvision and its workers, for equal pixels. Part of bench_train.py."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import train_loaders as loaders
from benchmarks.train_loaders import Photographs, photograph_loader
from benchmarks.train_steps import cpu_seconds
from lrds_fast.data import DaliLoader, Loader
from lrds_fast.data.folder import MEAN, STD
from lrds_fast.data.sources import Folder

Row = dict[str, Any]


def levels(images: Tensor) -> Tensor:
    """Normalised photographs as levels of 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.cpu() * std + mean) * 255


def in_index_order(loader: Loader) -> Tensor:
    """Every picture of epoch 0, by sample index, on the CPU."""
    batches = list(loader.epoch(0))
    order = torch.cat([batch.indices for batch in batches]).argsort()
    return torch.cat([batch.images.cpu() for batch in batches])[order]


def check_evaluated(found: Photographs, count: int, kinds: Sequence[str], device: torch.device) -> dict[str, float]:
    """Every kind's evaluated pictures against the published loader's: the mean difference in levels of 255.

    AssertionError beyond 0.05 on average, or where the worst pixel of the median picture is more than 2 off, the
    tolerance of tests/test_data_dali.py. A GPU decodes JPEG by other rules: 2 on average there.
    """
    made = {
        kind: in_index_order(
            photograph_loader(kind, found, count=count, batch_size=25, train=False, workers=0, device=device)
        )
        for kind in kinds
    }
    wanted = levels(made["published"])
    errors = {}
    for kind, images in made.items():
        off = (levels(images) - wanted).abs()
        errors[kind] = float(off.mean())
        on_gpu = kind == "DALI" and device.type == "cuda"
        close = errors[kind] <= 2.0 if on_gpu else errors[kind] <= 0.05 and off.amax(dim=(1, 2, 3)).median() <= 2.0
        if not close:
            raise AssertionError(f"{kind}: evaluated pictures are {errors[kind]:.2f} levels of 255 off on average")
    return errors


def check_trained(found: Photographs, count: int, device: torch.device) -> float:
    """DALI's augmented pictures against Pillow's cut of the same boxes, resized by torchvision: the mean difference in
    levels of 255. AssertionError beyond 1 on average (2 on a GPU), or on the CPU 6 for the worst pixel of the median
    picture."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    loader = cast(
        DaliLoader,
        photograph_loader("DALI", found, count=count, batch_size=25, train=True, workers=1, device=device),
    )
    got, source = levels(in_index_order(loader)), Folder(found.root)
    errors = []
    for i in range(count):
        box = loader._prepare(i, 0).box
        opened = Image.open(io.BytesIO(source.read(int(loader._rows[i])).tobytes())).convert("RGB")
        cut = functional.resized_crop(opened, box.top, box.left, box.height, box.width, [224, 224], antialias=True)
        cut = functional.horizontal_flip(cut) if box.mirrored else cut
        errors.append((got[i] - functional.pil_to_tensor(cut).float()).abs())
    off = torch.stack(errors)
    mean, worst = float(off.mean()), float(off.amax(dim=(1, 2, 3)).median())
    if mean > (1.0 if device.type == "cpu" else 2.0) or (device.type == "cpu" and worst > 6.0):
        raise AssertionError(f"DALI: augmented pictures are {mean:.2f} levels off on average, {worst:.0f} at worst")
    return mean


def rows_of(
    scratch: Path, *, device: torch.device, count: int, workers: int, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """Pictures a second and a CPU-second by what reads them: CIFAR's to train on, photographs to train on and to
    evaluate, these checked for equal pixels first."""
    rows: list[Row] = []
    kinds, reasons = loaders.cifar_kinds()
    for reason in reasons:
        say(f"readers: without {reason}")
    if "published" in kinds:
        pictures = loaders.cifar_pictures(20 * count)
        made = {
            name: loaders.cifar_loader(
                name.partition(",")[0],
                pictures,
                batch_size=64,
                workers=0 if name.endswith("no workers") else workers,
                device=device,
            )
            for name in ("published", "published, no workers", "in memory")
        }
        facts = {"case": "train, 32 x 32", "pictures": pictures[2], "samples": 20 * count, "workers": workers}
        rows += compared(made, facts, {}, device, rounds)
    kinds, reasons = loaders.photograph_kinds()
    for reason in reasons:
        say(f"readers: without {reason}")
    if "published" not in kinds:
        return rows
    found = loaders.photographs(scratch)
    off = {"eval": check_evaluated(found, min(count, 100), kinds, device), "train": {}}
    if "DALI" in kinds:
        off["train"]["DALI"] = check_trained(found, min(count, 100), device)
    for transform in ("train", "eval"):
        made = {
            name: photograph_loader(
                name.partition(",")[0],
                found,
                count=count,
                batch_size=50,
                train=transform == "train",
                workers=0 if name.endswith("no workers") else workers,
                device=device,
            )
            for name in ["published", "published, no workers", *kinds[1:]]
        }
        facts = {"case": f"{transform}, 224 x 224", "pictures": found.words, "samples": count, "workers": workers}
        rows += compared(made, facts, off[transform], device, rounds)
    return rows


def compared(
    made: dict[str, Loader], facts: Row, off: dict[str, float], device: torch.device, rounds: int
) -> list[Row]:
    """Epochs of the loaders in turns: CPU time, that of ended workers included, and wall time, against "published"."""
    cpu: dict[str, list[float]] = {kind: [] for kind in made}
    wall: dict[str, list[float]] = {kind: [] for kind in made}
    for epoch in range(rounds + 1):
        for kind, loader in made.items():
            began, cpu_began = time.perf_counter(), cpu_seconds()
            for batch in loader.epoch(epoch):
                batch.images.to(device, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if epoch:  # the first one builds pipelines and fills the file cache
                wall[kind].append(time.perf_counter() - began)
                cpu[kind].append(cpu_seconds() - cpu_began)
    rows = []
    for kind in made:
        ratios = [a / b for a, b in zip(cpu["published"], cpu[kind], strict=True)]
        walls = [a / b for a, b in zip(wall["published"], wall[kind], strict=True)]
        rows.append(
            {"part": "reader", "loader": kind, "rounds": rounds}
            | facts
            | {
                "images_s": facts["samples"] / statistics.median(wall[kind]),
                "images_cpu_s": facts["samples"] / statistics.median(cpu[kind]),
                "vs_published": statistics.median(ratios),
                "vs_low": min(ratios),
                "vs_high": max(ratios),
                "vs_published_wall": statistics.median(walls),
                "levels_off": off.get(kind, ""),
            }
        )
    return rows


def shown(value: object, form: str, empty: str = "") -> str:
    """A number for a table; `empty` where the row has none."""
    return empty if value in ("", None) else format(float(str(value)), form)


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown; none for no rows."""
    if not rows:
        return []
    header = ["pictures", "reader", "images / CPU-s", "vs published, CPU time", "images/s", "levels of 255 off"]
    lines = [f"## Readers, {rows[0]['workers']} worker(s) or thread(s)", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        spread = f"({shown(row['vs_low'], '.2f')} to {shown(row['vs_high'], '.2f')})"
        cells = [f"{row['samples']} {row['pictures']}, {row['case']}", row["loader"], shown(row["images_cpu_s"], ".4g")]
        cells += [f"{shown(row['vs_published'], '.2f')}x {spread}", shown(row["images_s"], ".4g")]
        lines.append("| " + " | ".join([*cells, shown(row["levels_off"], ".4f")]) + " |")
    return [*lines, ""]
