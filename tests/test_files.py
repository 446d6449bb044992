"""Atomic files, their mode, errors of the disk; locks on folders."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lrds_fast.cli import main as cli
from lrds_fast.data import label_files
from lrds_fast.files import append_record, replacing, rewrite_records, write_text
from lrds_fast.lock import holding
from lrds_fast.selection import Selection
from lrds_fast.train.checkpoint import Position, save, save_weights

BIG = 1 << 16


def selection(rows: int) -> Selection:
    scores = {"score": torch.rand(rows, dtype=torch.float64)}
    return Selection(torch.ones(rows, dtype=torch.bool), scores, None, None, {"by": "score"}, None, None)


def safetensors(path: Path, count: int) -> None:
    with replacing(path) as temporary:  # the library may put a file of its own there
        save_file({"a": torch.zeros(count)}, temporary)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "text": lambda path, count: write_text(path, "x" * count),
    "log": lambda path, count: rewrite_records(path, [{"epoch": 1}] * count),
    "checkpoint": lambda path, count: save(
        path, Position(0, 0, {}), facts={}, student=torch.nn.Linear(count, 1), parts={}
    ),
    "weights": lambda path, count: save_weights(path, torch.nn.Linear(count, 1), {}),
    "safetensors": safetensors,
    "selection": lambda path, count: selection(count).save(path),
    "soft labels": lambda path, count: label_files.write_rows(path, np.zeros(count, bool)),
}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limits the size of files, to simulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)], ids=["022", "007"])
def test_files_have_the_mode_that_the_umask_leaves(
    tmp_path: Path, write: Callable[[Path, int], object], umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "file", 8)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_an_error_of_the_disk_names_the_path_and_the_old_file_stays(
    tmp_path: Path, write: Callable[[Path, int], object]
) -> None:
    path = tmp_path / "file"
    write(path, 8)
    before = path.read_bytes()
    with files_of_at_most(20000), pytest.raises(OSError, match="File too large") as refused:
        write(path, BIG)
    assert (refused.value.errno, refused.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_disk_names_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_record(path, {"epoch": 1})
    with files_of_at_most(100), pytest.raises(OSError, match="File too large") as refused:
        append_record(path, {"epoch": 2, "text": "x" * 200})
    assert refused.value.filename == str(path)
    assert json.loads(path.read_text().splitlines()[0]) == {"epoch": 1}


def test_a_device_is_written_in_place() -> None:
    write_text(Path(os.devnull), "gone")
    assert not Path(os.devnull).is_file()
    with pytest.raises(OSError, match="No space left on device") as refused:
        write_text(Path("/dev/full"), "x")
    assert refused.value.filename == "/dev/full"


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    with holding(out):
        refusal = rf"{out} is in use by process {os.getpid()} on .*; wait until that process has ended, or choose"
        with pytest.raises(FileExistsError, match=refusal), holding(out):
            pass
        with pytest.raises(FileExistsError, match="is in use by"), holding(out, shared=True):
            pass
    assert list(out.iterdir()) == []
    with holding(out, shared=True):
        with holding(out, shared=True):
            pass
        with pytest.raises(FileExistsError, match="is in use by"), holding(out):
            pass
    with holding(out):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="must be a folder; it is a file"), holding(tmp_path / "file"):
        pass


def test_a_lock_ends_with_its_process_while_workers_live(tmp_path: Path) -> None:
    """kill -9 of a run whose loader has forked: another holds the folder at once."""
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        try:
            with holding(tmp_path):
                worker = os.fork()
                if worker:
                    os.write(write, str(worker).encode())
                signal.pause()
        finally:
            os._exit(1)
    worker = int(os.read(read, 100))
    try:
        with pytest.raises(FileExistsError, match=f"is in use by process {run} on "), holding(tmp_path):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        os.kill(worker, 0)  # it is there
        with holding(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_without_file_locks_the_run_continues_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("lrds_fast.lock.fcntl.flock", refused)
    with holding(tmp_path / "run"):
        pass
    said = capsys.readouterr().err
    assert "run is on a file system without locks (No locks available); start no second run there" in said
    assert said.count("\n") == 1


def test_every_command_that_writes_a_folder_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "--quiet",
        "--set",
        "run.device=cpu",
        "--set",
        "schedule.epochs=1",
        "--set",
        f"run.out={tmp_path / 'run'}",
    ]
    assert cli.main(["train", "digits_teacher", *common]) == cli.OK
    checkpoint = (tmp_path / "run" / "last.pt").read_bytes()
    taught = ["--set", f"teacher.checkpoint={tmp_path / 'run' / 'last.pt'}", "--set", "student.model=small_cnn"]
    taught += ["--set", f"teacher.cache={tmp_path / 'run'}"]
    capsys.readouterr()
    with holding(tmp_path / "run"):
        for arguments in (
            ["train", "digits_teacher", *common, "--overwrite"],
            ["train", "digits_teacher", *common, "--resume"],
            ["cache", "digits_kd", *common, *taught],
            ["score", "digits_kd", *common, *taught],
        ):
            assert cli.main(arguments) == cli.MISUSED
            said = capsys.readouterr().err
            assert f"{tmp_path / 'run'} is in use by process {os.getpid()}" in said and said.count("\n") == 1
    assert (tmp_path / "run" / "last.pt").read_bytes() == checkpoint
    with holding(tmp_path / "other"):
        assert cli.main(["sweep", "digits_teacher", *common, "--set", f"run.out={tmp_path / 'other'}"]) == cli.FAILED
        assert "is in use by" in capsys.readouterr().err
