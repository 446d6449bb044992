"""Bad data and full disks in training: a one-line error, or samples that are skipped and counted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_processes import blobs, numbers, trained

from lrds_fast.cli import main as cli
from lrds_fast.data.dali import has_dali
from lrds_fast.files import read_records

Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

CLASSES, PICTURES = ("ant", "bee", "cat"), 8
READERS = [
    pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="pip install nvidia-dali-cuda130")),
    "torchvision",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of eight photographs each to train on, four to test."""
    draws = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", PICTURES), ("val", 4)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40, 48, 3), 60 * number + 40) + draws.integers(0, 30, (40, 48, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "data"


def arguments(root: Path, reader: str, **values: object) -> list[str]:
    settings = {
        "name": "photographs",
        "data.root": root,
        "data.reader": reader,
        "data.batch_size": 6,
        "data.image_size": 32,
        "data.workers": 1,
        "student.model": "resnet8",
        "teacher.model": "",
        "schedule.epochs": 2,
        "schedule.milestones": [],
        "run.amp": "off",
        "run.device": "cpu",
        "run.out": root.parent / "run",
    } | values
    found = ["train", "imagenet_resnet34_resnet18", "--quiet"]
    for key, value in settings.items():
        found += ["--set", f"{key}={value}"]
    return found


def damage_two_pictures(root: Path) -> None:
    """Cuts one picture short and empties another."""
    cut = root / "train" / "bee" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:100])
    (root / "train" / "cat" / "5.jpg").write_bytes(b"")


@pytest.mark.skipif(not has_dali(), reason="pip install nvidia-dali-cuda130")
def test_dali_names_and_counts_unreadable_pictures_and_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_two_pictures(root)
    assert cli.main(arguments(root, "dali")) == cli.OK
    said = capsys.readouterr().err
    for name in ("bee/3.jpg", "cat/5.jpg"):
        assert said.count(f"{name} was replaced by a grey picture") == 1, "named once, not once an epoch"
    records = read_records(root.parent / "run" / "log.jsonl")
    assert [record["unreadable"] for record in records] == [2, 2]
    assert [record["rows"] for record in records] == [len(CLASSES) * PICTURES] * 2


def test_torchvision_names_an_unreadable_picture_and_ends(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_two_pictures(root)
    assert cli.main(arguments(root, "torchvision", **{"data.workers": 0})) == cli.MISUSED
    said = capsys.readouterr().err
    assert "is not a readable picture" in said and said.count("\n") == 1
    assert "bee/3.jpg" in said or "cat/5.jpg" in said
    assert not (root.parent / "run" / "last.pt").exists()


def test_an_unreadable_picture_in_a_worker_is_a_one_line_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_two_pictures(root)
    assert cli.main(arguments(root, "torchvision")) in (cli.MISUSED, cli.FAILED)
    said = capsys.readouterr().err
    assert "is not a readable picture" in said and said.count("\n") == 1


@pytest.mark.parametrize("reader", READERS)
def test_a_class_that_val_lacks_is_named(root: Path, capsys: pytest.CaptureFixture[str], reader: str) -> None:
    shutil.rmtree(root / "val" / "bee")
    assert cli.main(arguments(root, reader)) == cli.MISUSED
    assert "train/ has 3 classes, val/ 2; in one only: bee" in capsys.readouterr().err


def test_class_counts_of_teacher_student_and_data_must_agree(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher's checkpoint has a hundred classes, the data have three."""
    assert cli.main(["train", "digits_teacher", "--quiet", "--set", "schedule.epochs=1", "--set", "run.device=cpu",
                     "--set", f"run.out={tmp_path / 'teacher'}"]) == cli.OK  # fmt: skip
    capsys.readouterr()
    taught = {"teacher.model": "mlp_8x16_128", "teacher.checkpoint": tmp_path / "teacher" / "last.pt"}
    assert cli.main(arguments(root, "torchvision", **taught)) == cli.MISUSED
    said = capsys.readouterr().err
    assert "is for another model" in said and "shape" in said and said.count("\n") == 1
    # A file of another network altogether.
    taught["teacher.model"] = "resnet8"
    assert cli.main(arguments(root, "torchvision", **taught)) == cli.MISUSED
    assert "is for another model: it lacks" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], Path]]]:
    """A disk of 1 MB, and what fills it up: (folder, fill() -> the file that does)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk needs the right to mount one")

    def fill() -> Path:
        state = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(state.f_bavail * state.f_frsize))
        return disk / "filler"

    try:
        yield disk, fill
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_costs_no_checkpoint(tmp_path: Path, small_disk: tuple[Path, Callable[[], Path]]) -> None:
    disk, fill = small_disk
    out = disk / "run"
    with pytest.raises(OSError, match=r"No space left on device: '.*/run/.*'"):
        trained(out, data=blobs((1, 3), fill))
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["epoch"], state["steps"]) == (1, 0)
    (disk / "filler").unlink()
    resumed, found = trained(out, resume=True)
    whole, expected = trained(tmp_path / "whole")
    assert numbers(resumed.records) == numbers(whole.records)
    assert numbers(read_records(out / "log.jsonl")) == numbers(whole.records)
    assert not list(out.glob(".*.partial"))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_a_full_disk_is_a_one_line_error(
    small_disk: tuple[Path, Callable[[], Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    disk, fill = small_disk
    fill()
    code = cli.main(["train", "digits_alone", "--quiet", "--set", "schedule.epochs=1", "--set", "run.device=cpu",
                     "--set", f"run.out={disk / 'run'}"])  # fmt: skip
    said = capsys.readouterr().err
    assert code == cli.FAILED
    assert f"{disk / 'run'}" in said and "No space left on device; check" in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_and_not_the_checkpoint(root: Path) -> None:
    """A worker is killed, as the kernel does when memory runs out."""
    from test_train_options import command

    out = root.parent / "run"
    values = {"data.workers": 1, "schedule.epochs": 1000}
    begun = subprocess.Popen(
        command(*arguments(root, "torchvision", **values)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(900):
        if (out / "last.pt").exists() or begun.poll() is not None:
            break
        time.sleep(0.1)
    deadline = time.monotonic() + 60
    while begun.poll() is None and time.monotonic() < deadline:
        hit = False
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for child in Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
                hit = True
                break
        # One that was ending anyway is no loss; a second loss during the report of the first would be another case.
        time.sleep(5.0 if hit else 0.02)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode == cli.FAILED, err[-2000:]
    last = err.strip().splitlines()[-1]
    assert last.startswith("lrds-fast: error: ") and "worker" in last.lower()
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["epoch"] >= 1
    assert json.loads((out / "recipe.json").read_text())["name"] == "photographs"
