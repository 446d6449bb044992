"""Killed runs, full disks, read-only folders, two runs at once: 200 kills each.

Every attempt is a process that gets SIGKILL at a random moment. After each attempt every file must be complete, and
after the last one the files must equal those of an undisturbed run. Damaged files are read, or the error is one line.
LRDS_SOAK_KILLS and LRDS_SOAK_FILES set the numbers, LRDS_SOAK_SEED the seed. docs/reliability.md has the figures.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lrds_fast.files import read_records

pytestmark = pytest.mark.soak
slow = pytest.mark.slow

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
    from lrds_fast.cli.main import main

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
        self._context.set_forkserver_preload(["test_soak", "lrds_fast.cli.main", "sklearn.datasets"])

    def start(self, *arguments: str) -> BaseProcess:
        begun = self._context.Process(target=command, args=(list(arguments), str(self.folder), str(self.log)))
        begun.start()
        return begun  # type: ignore[no-any-return]

    def finish(self, *arguments: str) -> float:
        """Runs to the end; returns the seconds that it took."""
        before = time.monotonic()
        begun = self.start(*arguments)
        begun.join(600)
        assert begun.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - before

    def kill(self, within: float, draws: random.Random, *arguments: str) -> bool:
        """Starts a run and kills it after a random share of `within` seconds; returns whether it was still running."""
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


def finished(folder: Path) -> list[Path]:
    """The files in a folder. Locks and temporary files, whose names begin with a dot, are left out."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def check_whole(folder: Path) -> None:
    for path in finished(folder):
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


def kill_and_resume(
    attempts: Attempts,
    arguments: Callable[[str], list[str]],
    folder: str,
    same: Callable[[Path, Path], None],
    seed: int,
) -> None:
    """Kills each run six times and resumes it to its end, until KILLS processes were killed."""
    draws = random.Random(seed)
    undisturbed = f"{folder}/undisturbed"
    seconds = attempts.finish(*arguments(undisturbed))
    killed, runs = 0, 0
    while killed < KILLS:
        out = f"{folder}/killed{runs}"
        for _ in range(6):
            killed += attempts.kill(1.2 * seconds, draws, *arguments(out), "--resume")
            check_whole(attempts.folder / out)
        attempts.finish(*arguments(out), "--resume")
        same(attempts.folder / out, attempts.folder / undisturbed)
        runs += 1
    print(f"{folder}: {killed} kills in {runs} runs")


@slow
def test_training(attempts: Attempts) -> None:
    kill_and_resume(attempts, train_arguments, "runs", same_run, SEED)


def cache_arguments(out: str) -> list[str]:
    return ["cache", "digits_kd", "--quiet", f"--set=teacher.cache={out}", "--set=teacher.cache_views=24"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in finished(folder)}


def same_files(found: Path, expected: Path) -> None:
    assert files(found) == files(expected)


@slow
def test_caching(attempts: Attempts) -> None:
    kill_and_resume(attempts, cache_arguments, "cache", same_files, SEED + 1)


@slow
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


@slow
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
        check_whole(attempts.folder / out)
        if 0 in codes:  # this run is done: no process locks its folder again
            out = f"runs/contested{rounds}"
    attempts.finish(*train_arguments(out), "--resume")
    same_run(attempts.folder / out, attempts.folder / "runs" / "alone")


@contextlib.contextmanager
def mounted(path: Path, kilobytes: int) -> Iterator[None]:
    """Mounts a file system of `kilobytes` at `path` for the block."""
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


@slow
def test_full_disk(attempts: Attempts) -> None:
    """The disk fills at a random byte: one line, exit code 1, the old files whole; with room again the run goes on."""
    draws = random.Random(SEED + 4)
    seconds = attempts.finish(*train_arguments("runs/roomy"))
    room = sum(path.stat().st_size for path in (attempts.folder / "runs" / "roomy").rglob("*")) // 1024 + 64
    small = attempts.folder / "small"
    full, killed = 0, 0
    with mounted(small, 8 * room):
        for number in range(max(2, KILLS // 10)):
            left = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize // 1024
            (small / "filler").write_bytes(b"\0" * 1024 * (left - draws.randrange(8, room)))
            out = f"small/run{number % 3}"
            if number % 2:
                killed += attempts.kill(seconds, draws, *train_arguments(out), "--resume")
            else:
                begun = attempts.start(*train_arguments(out), "--resume")
                begun.join(600)
                text = attempts.log.read_text()[-3000:]
                assert begun.exitcode in (0, 1, 2) and "Traceback" not in text, text
                full += begun.exitcode == 1 and "No space left" in text
            (small / "filler").unlink()
            check_whole(attempts.folder / out)
        assert full > 0
        for folder in sorted(small.iterdir()):
            attempts.finish(*train_arguments(f"small/{folder.name}"), "--resume")
            same_run(folder, attempts.folder / "runs" / "roomy")
    print(f"full disk: {full} runs ended by it, {killed} killed")


@slow
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


FILES = int(os.environ.get("LRDS_SOAK_FILES", "400"))


def damaged(content: bytes, draws: random.Random) -> bytes:
    """Cut short, or with bytes that are another's, or both; the first bytes, which say what it is, more often."""
    changed = bytearray(content)
    for _ in range(draws.choice([0, 1, 3, 30])):
        changed[min(int(draws.expovariate(8.0) * len(changed)), len(changed) - 1)] = draws.randrange(256)
    return bytes(changed[: draws.randrange(len(changed)) if draws.random() < 0.5 else None])


def reads(read: Callable[[], object], *accepted: type[Exception], named: object = "") -> bool:
    """Returns whether the file can be read. If not, the error must be one of `accepted`, have one line and name the
    file."""
    try:
        read()
    except accepted as error:
        text = str(error)
        if not text or "\n" in text or str(named) not in text:
            pytest.fail(f"{type(error).__name__}: {text!r}")
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the damage
def test_damaged_pictures() -> None:
    """A damaged picture is read or refused in one line: never another error or a crash."""
    image_module = pytest.importorskip("PIL.Image")
    from lrds_fast.data.pictures import Unreadable, decoded, for_dali, picture_size

    draws, noise = random.Random(SEED + 5), np.random.default_rng(SEED)
    originals = []
    for kind, mode in (("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "I;16"), ("TIFF", "F"), ("GIF", "P"), ("WEBP", "RGB")):
        pixels = noise.integers(0, 255, (40, 30, 3), dtype=np.uint8)
        picture = image_module.fromarray(pixels)
        if mode in ("I;16", "F"):
            picture = image_module.fromarray(pixels[..., 0].astype(np.uint16 if mode == "I;16" else np.float32))
        else:
            picture = picture.convert(mode)
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        originals.append(buffer.getvalue())
    read = 0
    for _ in range(FILES):
        data = np.frombuffer(damaged(draws.choice(originals), draws), np.uint8)
        read += sum(reads(partial(reader, data), Unreadable) for reader in (picture_size, decoded, for_dali))
    assert 0 < read < 3 * FILES
    print(f"pictures: {FILES} damaged files, three readers each, {read} reads")


def test_damaged_weights(tmp_path: Path) -> None:
    """Reading returns the weights that were written, or raises an error of one line that names the file."""
    from safetensors.torch import save_file

    from lrds_fast.models.weights import load_weights

    draws = random.Random(SEED + 6)
    torch.manual_seed(SEED)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "new.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    originals = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    target = tmp_path / "damaged.pth"
    read = 0
    for _ in range(FILES):
        target.write_bytes(damaged(draws.choice(originals), draws))
        load = partial(load_weights, model, target, key="teacher.checkpoint")
        read += reads(load, ValueError, OSError, named=target)
    assert read < FILES
    print(f"weights: {FILES} damaged files, {read} read")


def test_damaged_selections(tmp_path: Path) -> None:
    """Reading returns the selection that was written, or raises an error of one line that names the file."""
    from lrds_fast.selection import Selection, select

    draws = random.Random(SEED + 7)
    chosen = select({"kd_gain": torch.randn(40)}, by="kd_gain", ratio=0.5, labels=torch.arange(40) % 4)
    path = tmp_path / "selection.parquet"
    chosen.save(path)
    original = path.read_bytes()
    read = 0
    for _ in range(FILES // 4):
        path.write_bytes(damaged(original, draws))
        read += reads(partial(Selection.load, path), ValueError, OSError, named=path)
    print(f"selections: {FILES // 4} damaged files, {read} read")
