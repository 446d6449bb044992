"""Scores of a data set of ImageNet's size from its last layer, end to end: time, memory and disk.

    python -m benchmarks.bench_influence_scale               1.28 M samples, 2048 features, 1000 classes
    python -m benchmarks.bench_influence_scale --quick       20 thousand samples, 256 features, 100 classes
    python -m benchmarks.bench_influence_scale --samples 200000 --features 512 --classes 21841
    python -m benchmarks.bench_influence_scale --markdown results/influence_scale_cpu.csv

The samples are synthetic last-layer features, drawn as they are read, so that neither disk nor decoding is measured: a
feature is its class's mean plus noise. Student and teacher are linear heads on them. One call of influence.score with
out=: forward passes, factors over all samples, held-out gradient, six scores, Parquet. First the same is done on 4096
samples and compared with influence.last_layer_scores, which has everything in memory. Each size runs in a process of
its own: peak is that process's largest resident size, torch's libraries (about 0.35 GB) included.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from benchmarks.bench_kd_loss import Row, facts, write_csv
from lrds_fast import influence

SCORES = ("kd_gain", "self_influence", "param_shift", "conflict", "el2n", "ce")
BATCH = 512


class Features(Dataset[tuple[Tensor, Tensor]]):
    """Samples (d,) around their classes' means, drawn a batch at a time from the number of its first sample."""

    def __init__(self, samples: int, features: int, classes: int, seed: int) -> None:
        self._samples, self._seed, self._classes = samples, seed, classes
        generator = torch.Generator().manual_seed(7)
        #: 4.2 standard deviations from the origin: heads that know them well are wrong on a quarter of the samples.
        self.means = torch.randn(classes, features, generator=generator) * (4.2 / features**0.5)

    def __len__(self) -> int:
        return self._samples

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 10_000_019 + indices[0])
        y = torch.randint(self._classes, (len(indices),), generator=generator)
        x = torch.randn(len(indices), self.means.shape[1], generator=generator)
        return x.add_(self.means[y]), y


def loader(data: Features) -> DataLoader[tuple[Tensor, Tensor]]:
    sampler = BatchSampler(SequentialSampler(data), BATCH, drop_last=False)
    return DataLoader(data, batch_sampler=sampler, collate_fn=lambda batch: batch)


def heads(features: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher that know the means, the student less well."""
    means = Features(0, features, classes, 0).means
    generator = torch.Generator().manual_seed(3)
    found = []
    for noise in (0.6, 0.3):
        head = nn.Linear(features, classes)
        with torch.no_grad():
            off = torch.randn(means.shape, generator=generator) * (4.2 / features**0.5 * noise)
            head.weight.copy_((means + off) * 0.7)
            head.bias.zero_()
        found.append(nn.Sequential(head).eval())
    return found[0], found[1]


def check(features: int, classes: int) -> float:
    """Largest relative difference to last_layer_scores, over the scores of 4096 samples."""
    data, held_out = Features(4096, features, classes, 1), Features(1024, features, classes, 2)
    student, teacher = heads(features, classes)
    with tempfile.TemporaryDirectory() as folder:
        found = influence.score(
            student,
            teacher,
            loader(data),
            loader(held_out),
            scores=SCORES,
            out=Path(folder) / "scores",
            progress=False,
        )
    (h, y), (hv, yv) = (tuple(torch.cat(side) for side in zip(*loader(part), strict=True)) for part in (data, held_out))
    with torch.no_grad():
        expected = influence.last_layer_scores(
            features=h,
            student_logits=student(h),
            teacher_logits=teacher(h),
            target=y,
            val_features=hv,
            val_logits=student(hv),
            val_target=yv,
            scores=SCORES,
        )
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in SCORES)


class _Disk:
    """The largest size of a folder, looked at every second."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.peak = folder, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.peak = max(self.peak, size_of(self._folder))

    def __enter__(self) -> _Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def size_of(folder: Path) -> int:
    """Bytes of the files in it, those left out that go away meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def run(samples: int, features: int, classes: int, folder: Path) -> Row:
    """One run in this process."""
    data, held_out = Features(samples, features, classes, 1), Features(max(samples // 50, 1024), features, classes, 2)
    student, teacher = heads(features, classes)
    out = folder / "scores"
    start, processor = time.perf_counter(), time.process_time()
    with _Disk(folder) as disk:
        found = influence.score(student, teacher, loader(data), loader(held_out), scores=SCORES, out=out)
    seconds = time.perf_counter() - start
    wrong = found.teacher_pred != found.target
    seen = found["self_influence"][wrong].mean() > found["self_influence"][~wrong].mean()
    if len(found.target) != samples or not all(found[name].isfinite().all() for name in SCORES) or not seen:
        raise ValueError("scores are missing, not finite, or do not see which samples are hard")
    return {
        "samples": samples,
        "features": features,
        "classes": classes,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - processor,
        "microseconds_per_sample": seconds / samples * 1e6,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "disk_peak_gb": disk.peak / 1e9,
        "output_gb": size_of(out) / 1e9,
    }


def table(rows: list[Row]) -> str:
    header = ["samples", "features", "classes", "minutes", "us a sample", "peak memory", "disk meanwhile", "scores"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [f"{int(row[name]):,}" for name in ("samples", "features", "classes")]
        cells += [f"{float(row['seconds']) / 60:.1f}", f"{float(row['microseconds_per_sample']):.0f}"]
        cells += [f"{float(row[name]):.2f} GB" for name in ("peak_gb", "disk_peak_gb", "output_gb")]
        lines.append("| " + " | ".join(cells) + " |")
    found = rows[0]
    lines += [
        "",
        f"{found['device']}, {found['threads']} threads; torch {found['torch']}; commit {found['commit']};"
        f" `{found['command']}`.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="20 thousand samples of 256 features, 100 classes")
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the rows lie meanwhile (default: the temporary folder)")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="print a stored run as a table and end")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        with arguments.markdown.open(newline="", encoding="utf-8") as file:
            sys.stdout.write(table(list(csv.DictReader(file))) + "\n")
        return 0
    if arguments.device == "cuda":
        parser.error("this suite measures the CPU; run it with --device cpu")
    torch.set_num_threads(arguments.threads)
    samples, features, classes = arguments.samples, arguments.features, arguments.classes
    if arguments.one:
        sys.stdout.write(json.dumps(run(samples, features, classes, arguments.folder)) + "\n")
        return 0
    if arguments.quick:
        samples, features, classes = 20_000, 256, 100
    error = check(min(features, 256), min(classes, 100))
    sys.stdout.write(f"4096 samples against last_layer_scores: relative difference {error:.1e}\n")
    sys.stdout.flush()
    if error > 1e-5:
        raise ValueError(f"the streamed scores are not last_layer_scores' ({error:.1e})")
    # A tenth first: memory that grows with the samples would show.
    rows: list[Row] = []
    for part in (samples // 10, samples):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            command = [sys.executable, __file__, "--one", "--threads", str(arguments.threads), "--folder", folder]
            command += ["--samples", str(part), "--features", str(features), "--classes", str(classes)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row: Row = json.loads(done.stdout)
        rows.append(row | facts("cpu"))
        sys.stdout.write(f"{part} samples: {row['seconds']:.1f} s, {row['peak_gb']:.2f} GB\n")
        sys.stdout.flush()
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)
    sys.stdout.write("\n" + table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
