"""Killed runs, full disks, read-only folders, two runs at once: 200 kills each.

Every attempt is a process that gets SIGKILL at a random moment. After each attempt every file must be complete, and
after the last one the files must equal those of an undisturbed run. LRDS_SOAK_KILLS sets the number of kills,
LRDS_SOAK_SEED the seed of the random moments.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lrds_fast.train.files import read_records

pytestmark = [pytest.mark.slow, pytest.mark.soak]

KILLS = int(os.environ.get("LRDS_SOAK_KILLS", "200"))
SEED = int(os.environ.get("LRDS_SOAK_SEED", "0"))
#: Small enough that an undisturbed run takes a second or two; a checkpoint after every few steps.
TRAIN = [
    "--set=schedule.epochs=6",
    "--set=schedule.warmup_epochs=0",
    "--set=run.save_every_steps=5",
    "--set=run.ema_decay=0.9",
    "--set=run.device=cpu",
]


def command(arguments: list[str], folder: str, log: str) -> None:
    """Runs lrds-fast with these arguments in `folder`."""
    from lrds_fast.train.cli import main

    os.chdir(folder)
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Attempts:
    """Starts lrds-fast in processes forked from one that has imported everything: 200 starts are quick."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "output.txt"
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["test_soak", "lrds_fast.train.cli", "sklearn.datasets"])

    def start(self, *arguments: str) -> BaseProcess:
        begun = self._context.Process(target=command, args=(list(arguments), str(self.folder), str(self.log)))
        begun.start()
        return begun  # type: ignore[no-any-return]

    def finish(self, *arguments: str) -> float:
        """Runs to the end; its seconds."""
        before = time.monotonic()
        begun = self.start(*arguments)
        begun.join(600)
        assert begun.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - before

    def kill(self, within: float, draws: random.Random, *arguments: str) -> bool:
        """Starts and kills after a random share of `within` seconds; whether it was still running."""
        begun = self.start(*arguments)
        time.sleep(draws.uniform(0, within))
        begun.kill()
        begun.join(60)
        return begun.exitcode == -9


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempts]:
    """In a folder with a trained teacher; the forked processes find this module through PYTHONPATH."""
    before = dict(os.environ)
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*here, before.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Attempts(tmp_path_factory.mktemp("soak"))
    made.finish("train", "digits_teacher", "--quiet", "--set=schedule.epochs=3", "--set=schedule.warmup_epochs=0")
    yield made
    os.environ.clear()
    os.environ.update(before)


def whole(path: Path) -> None:
    """Reads a file with its own reader; raises if it is incomplete. Skips temporary files."""
    if path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.name == "log.jsonl":
        read_records(path)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.read_table(path)
    elif path.suffix == ".json":
        import json

        json.loads(path.read_text())
    elif path.suffix == ".npy":
        np.load(path)


def check_whole(folder: Path) -> None:
    for path in folder.rglob("*"):
        # A file that was being written when its process was killed; it never took its name.
        if path.is_file() and not path.name.startswith(".") and ".tmp" not in path.name:
            whole(path)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in read_records(folder / "log.jsonl")]


def same_run(found: Path, expected: Path) -> None:
    assert numbers(found) == numbers(expected)
    for name in ("best.safetensors", "last.safetensors"):
        if (expected / name).exists():
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    a = torch.load(found / "last.pt", weights_only=True)["student"]
    b = torch.load(expected / "last.pt", weights_only=True)["student"]
    assert all(torch.equal(a[key], b[key]) for key in b) and a.keys() == b.keys()


def train_arguments(out: str) -> list[str]:
    return ["train", "digits_kd_lr", "--quiet", f"--set=run.out={out}", *TRAIN]


def test_training(attempts: Attempts, record_property: Callable[[str, object], None]) -> None:
    draws = random.Random(SEED)
    seconds = attempts.finish(*train_arguments("runs/undisturbed"))
    killed, runs = 0, 0
    while killed < KILLS:
        out = f"runs/killed{runs}"
        # Six kills a run on average: early ones hit the start, later ones the middle and the end.
        for _ in range(6):
            killed += attempts.kill(1.2 * seconds, draws, *train_arguments(out), "--resume")
            if (attempts.folder / out).exists():
                check_whole(attempts.folder / out)
        attempts.finish(*train_arguments(out), "--resume")
        same_run(attempts.folder / out, attempts.folder / "runs" / "undisturbed")
        runs += 1
    record_property("kills", killed)
    print(f"training: {killed} kills in {runs} runs")


def cache_arguments(out: str) -> list[str]:
    return ["cache", "digits_kd", "--quiet", f"--set=teacher.cache={out}", "--set=teacher.cache_views=24"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and ".tmp" not in path.name
    }


def test_caching(attempts: Attempts) -> None:
    draws = random.Random(SEED + 1)
    seconds = attempts.finish(*cache_arguments("cache/undisturbed"))
    killed, runs = 0, 0
    while killed < KILLS:
        out = f"cache/killed{runs}"
        for _ in range(6):
            killed += attempts.kill(1.2 * seconds, draws, *cache_arguments(out), "--resume")
            if (attempts.folder / out).exists():
                check_whole(attempts.folder / out)
        attempts.finish(*cache_arguments(out), "--resume")
        assert files(attempts.folder / out) == files(attempts.folder / "cache" / "undisturbed")
        runs += 1
    print(f"caching: {killed} kills in {runs} runs")


def test_scoring(attempts: Attempts) -> None:
    draws = random.Random(SEED + 2)
    attempts.finish(*train_arguments("runs/scored"))
    score = ["score", "digits_kd_lr", "--quiet", "--set=run.out=runs/scored", *TRAIN]
    seconds = attempts.finish(*score, "--out=expected.parquet")
    expected = (attempts.folder / "expected.parquet").read_bytes()
    scored = attempts.folder / "scores.parquet"
    killed, finished = 0, 0
    while killed < KILLS:
        stopped = attempts.kill(1.1 * seconds, draws, *score, "--out=scores.parquet")
        killed += stopped
        # Absent, or equal to that of the undisturbed run.
        assert not scored.exists() or scored.read_bytes() == expected
        if scored.exists():
            finished += 1
            scored.unlink()
    print(f"scoring: {killed} kills, {finished} finished")


def test_two_at_once(attempts: Attempts) -> None:
    """Of two processes with the same folder one trains and the other fails; a killed process leaves no lock."""
    draws = random.Random(SEED + 3)
    seconds = attempts.finish(*train_arguments("runs/alone"))
    refused, rounds, out = 0, 0, "runs/contested"
    while rounds < KILLS // 10 or refused == 0:
        rounds += 1
        assert rounds < 20 + KILLS, "two processes trained in one folder, and neither was refused"
        pair = [attempts.start(*train_arguments(out), "--resume") for _ in range(2)]
        time.sleep(draws.uniform(0.3, 1.2) * seconds)
        for begun in pair:
            begun.kill()
            begun.join(60)
        codes = [begun.exitcode for begun in pair]
        # -9: killed; 2: refused; 0: it was done.
        assert set(codes) <= {-9, 0, 2}, attempts.log.read_text()[-3000:]
        refused += 2 in codes
        if (attempts.folder / out).exists():
            check_whole(attempts.folder / out)
        if codes.count(0) == 1 and 2 in codes:  # done: another one
            out = f"runs/contested{rounds}"
    attempts.finish(*train_arguments(out), "--resume")
    same_run(attempts.folder / out, attempts.folder / "runs" / "alone")


@contextlib.contextmanager
def mounted(path: Path, kilobytes: int) -> Iterator[None]:
    """A file system of `kilobytes` at `path`."""
    path.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"a file system of its own needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk(attempts: Attempts) -> None:
    """The disk fills at a random byte: one line, exit code 1, the old files whole; with room again the run goes on."""
    draws = random.Random(SEED + 4)
    attempts.finish(*train_arguments("runs/roomy"))
    room = sum(path.stat().st_size for path in (attempts.folder / "runs" / "roomy").rglob("*")) // 1024 + 64
    small = attempts.folder / "small"
    full = 0
    with mounted(small, 4 * room):
        for _ in range(max(1, KILLS // 10)):
            (small / "filler").write_bytes(b"\0" * 1024 * draws.randrange(3 * room, 4 * room - 4))
            begun = attempts.start(*train_arguments("small/run"), "--resume")
            begun.join(600)
            assert begun.exitcode in (0, 1, 2), attempts.log.read_text()[-3000:]
            text = attempts.log.read_text()
            assert "Traceback" not in text[-3000:]
            full += begun.exitcode == 1 and "No space left" in text[-1500:]
            (small / "filler").unlink()
            if (small / "run").exists():
                check_whole(small / "run")
        assert full > 0
        attempts.finish(*train_arguments("small/run"), "--resume")
        same_run(small / "run", attempts.folder / "runs" / "roomy")


def test_read_only_folder(attempts: Attempts) -> None:
    """In a read-only folder the error is one line and the files stay."""
    read_only = attempts.folder / "read_only"
    with mounted(read_only, 4096):
        attempts.finish(*train_arguments("read_only/run"))
        before = files(read_only)
        subprocess.run(["mount", "-o", "remount,ro", str(read_only)], check=True)
        for arguments in (
            [*train_arguments("read_only/run"), "--overwrite"],
            train_arguments("read_only/other"),
            cache_arguments("read_only/cache"),
            ["score", "digits_kd_lr", "--quiet", "--set=run.out=read_only/run", *TRAIN],
        ):
            begun = attempts.start(*arguments)
            begun.join(600)
            assert begun.exitcode in (1, 2), arguments
            text = attempts.log.read_text()[-1500:]
            assert "Read-only file system" in text and "Traceback" not in text
        assert files(read_only) == before
