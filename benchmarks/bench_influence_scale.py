"""Scores of a data set of ImageNet's size from its last layer, end to end: time, memory and disk.

    python -m benchmarks.bench_influence_scale               1.28 M samples, 2048 features, 1000 classes
    python -m benchmarks.bench_influence_scale --quick       20 thousand samples, 256 features, 100 classes
    python -m benchmarks.bench_influence_scale --samples 200000 --features 512 --classes 21841
    python -m benchmarks.bench_influence_scale --markdown results/influence_scale_cpu.csv

The samples are synthetic last-layer features, drawn as they are read, so that neither disk nor decoding is measured: a
feature vector is the mean of its class plus noise. Student and teacher are linear heads on them. One call of
influence.score with out= is measured: forward passes, factors over all samples, held-out gradient, six scores, Parquet.
First the same call on 4096 samples is compared with influence.last_layer_scores, which keeps everything in memory. Each
size runs in a process of its own: peak is the largest resident size of that process, with about 0.35 GB of torch's
libraries.
"""

from __future__ import annotations

import argparse
import contextlib
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

from benchmarks.program import parse_suite, say, suite_parser
from benchmarks.tables import Row, facts, markdown_table, origin, write_csv
from lrds_fast import influence

SCORES = ("kd_gain", "self_influence", "param_shift", "conflict", "el2n", "ce")
BATCH = 512


class Features(Dataset[tuple[Tensor, Tensor]]):
    """Samples (d,) around the means of their classes. A batch is drawn as a whole, seeded by its first index."""

    def __init__(self, samples: int, features: int, classes: int, seed: int) -> None:
        self._samples, self._seed, self._classes = samples, seed, classes
        generator = torch.Generator().manual_seed(7)
        #: (classes, d), 4.2 standard deviations from the origin: good heads are wrong on a quarter of the samples.
        self.means = torch.randn(classes, features, generator=generator) * (4.2 / features**0.5)

    def __len__(self) -> int:
        return self._samples

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 10_000_019 + indices[0])
        y = torch.randint(self._classes, (len(indices),), generator=generator)
        x = torch.randn(len(indices), self.means.shape[1], generator=generator)
        return x.add_(self.means[y]), y


def loader(data: Features) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (features (BATCH, d), targets (BATCH,)) in the order of the samples."""
    sampler = BatchSampler(SequentialSampler(data), BATCH, drop_last=False)
    return DataLoader(data, batch_sampler=sampler, collate_fn=lambda batch: batch)


def heads(features: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher: linear heads whose weights are the means of the classes plus noise, more of it in the
    student."""
    means = Features(0, features, classes, 0).means
    generator = torch.Generator().manual_seed(3)
    networks = []
    for noise in (0.6, 0.3):
        head = nn.Linear(features, classes)
        with torch.no_grad():
            error = torch.randn(means.shape, generator=generator) * (4.2 / features**0.5 * noise)
            head.weight.copy_((means + error) * 0.7)
            head.bias.zero_()
        networks.append(nn.Sequential(head).eval())
    return networks[0], networks[1]


def check(features: int, classes: int) -> float:
    """The largest relative difference to last_layer_scores over SCORES, on 4096 samples."""
    data, held_out = Features(4096, features, classes, 1), Features(1024, features, classes, 2)
    student, teacher = heads(features, classes)
    with tempfile.TemporaryDirectory() as folder:
        streamed = influence.score(
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
    return max(float((streamed[name] - expected[name]).norm() / expected[name].norm()) for name in SCORES)


class _Disk:
    """peak: the largest size of a folder in bytes, measured every second inside a with block."""

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
    """Bytes of the files in a folder; files that are deleted meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def run(samples: int, features: int, classes: int, folder: Path) -> Row:
    """The columns of one run, carried out in this process. ValueError if the scores are missing or implausible."""
    data, held_out = Features(samples, features, classes, 1), Features(max(samples // 50, 1024), features, classes, 2)
    student, teacher = heads(features, classes)
    out = folder / "scores"
    start, processor = time.perf_counter(), time.process_time()
    with _Disk(folder) as disk:
        scores = influence.score(student, teacher, loader(data), loader(held_out), scores=SCORES, out=out)
    seconds = time.perf_counter() - start
    if len(scores.target) != samples or not all(scores[name].isfinite().all() for name in SCORES):
        raise ValueError(f"there are {len(scores.target)} scores of {samples} samples, or some are not finite")
    wrong = scores.teacher_pred != scores.target
    if not scores["self_influence"][wrong].mean() > scores["self_influence"][~wrong].mean():
        raise ValueError("self_influence is not larger where the teacher is wrong")
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
    body = []
    for row in rows:
        cells = [f"{int(row[name]):,}" for name in ("samples", "features", "classes")]
        cells += [f"{float(row['seconds']) / 60:.1f}", f"{float(row['microseconds_per_sample']):.0f}"]
        body.append([*cells, *(f"{float(row[name]):.2f} GB" for name in ("peak_gb", "disk_peak_gb", "output_gb"))])
    return "\n".join([*markdown_table(header, body), "", origin(rows[0], [f"{rows[0]['threads']} threads"])])


def run_in_process(samples: int, features: int, classes: int, threads: int, folder: Path | None) -> Row:
    """`run` in a new process, in a temporary folder inside `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "benchmarks.bench_influence_scale", "--one", "--folder", scratch]
        command += ["--threads", str(threads), "--samples", str(samples)]
        command += ["--features", str(features), "--classes", str(classes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(done.stdout)
    return row


def main() -> int:
    threads = torch.get_num_threads()
    parser = suite_parser(__doc__, quick="20 thousand samples of 256 features, 100 classes", threads=threads)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where runs keep their files (default: a temporary folder)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parse_suite(parser, table, cpu_only=True)
    if arguments is None:
        return 0
    torch.set_num_threads(arguments.threads)
    samples, features, classes = arguments.samples, arguments.features, arguments.classes
    if arguments.one:
        say(json.dumps(run(samples, features, classes, arguments.folder)))
        return 0
    if arguments.quick:
        samples, features, classes = 20_000, 256, 100
    error = check(min(features, 256), min(classes, 100))
    say(f"4096 samples against last_layer_scores: relative difference {error:.1e}")
    if error > 1e-5:
        raise ValueError(f"the scores differ from last_layer_scores' by {error:.1e}, more than 1e-5")
    # A tenth of the samples first, to show whether memory grows with their number.
    rows: list[Row] = []
    for count in (samples // 10, samples):
        row = run_in_process(count, features, classes, arguments.threads, arguments.folder)
        rows.append(row | facts("cpu"))
        say(f"{count} samples: {row['seconds']:.1f} s, {row['peak_gb']:.2f} GB")
        if arguments.csv is not None:
            write_csv(arguments.csv, rows)
    say(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
