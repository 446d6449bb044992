"""Cached soft labels equal the teacher's logits of the same views; caches of other teachers are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrds_fast import TopKTeacher, kd_loss
from lrds_fast.data import Batch, MemoryLoader, SoftLabels, label_files, write_soft_labels

COUNT, CLASSES = 70, 11
FACTS = {"data's fingerprint": "abc", "teacher's weights": "def", "seed": 0, "data.mean": (0.5, 0.25)}


def loader(**options: Any) -> MemoryLoader:
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(COUNT, 1, 8, 8, generator=draws)
    targets = torch.randint(0, CLASSES, (COUNT,), generator=draws)
    defaults: dict[str, Any] = {"num_classes": CLASSES, "batch_size": 16, "shuffle": True, "augment": "crop-flip"}
    return MemoryLoader(images, targets, **(defaults | options))


def network(seed: int = 2, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, width), nn.Linear(width, CLASSES)
    )
    for _ in range(3):  # statistics that are not the identity
        net(3 * torch.rand(20, 1, 8, 8))
    return net


def write(path: Path, *, views: int = 2, source: Any = None, **options: Any) -> SoftLabels:
    """Writes a cache of 70 samples, which are 5 batches in each view."""
    defaults: dict[str, Any] = {"facts": FACTS, "progress": False}
    return write_soft_labels(path, network(), source or loader(), views=views, **(defaults | options))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_sample_of_every_view_has_teacher_logits(tmp_path: Path, dtype: str) -> None:
    found = write(tmp_path / "cache", dtype=dtype)
    teacher = network().eval()
    assert (found.views, found.samples, found.classes, found.top_k) == (2, COUNT, CLASSES, 0)
    for view in range(2):
        for batch in loader().epoch(view):
            with torch.inference_mode():
                wanted = teacher(batch.images).to(getattr(torch, dtype))
            stored = found.batch(view, batch.indices)
            assert isinstance(stored, Tensor)
            assert torch.equal(stored, wanted), "the same batches: the same bits"
            assert torch.equal(found.boxes(view, batch.indices), loader().boxes(view, batch.indices))
            # In another order they are the same samples'.
            order = torch.randperm(len(batch.indices))
            reordered = found.batch(view, batch.indices[order])
            assert isinstance(reordered, Tensor)
            assert torch.equal(reordered, wanted[order])
    empty = found.batch(1, torch.tensor([], dtype=torch.int64))
    assert isinstance(empty, Tensor) and empty.shape == (0, CLASSES)


def distil(taught: Callable[[int, Batch], Tensor | TopKTeacher], epochs: int, views: int) -> nn.Module:
    """Trains for a few epochs of SGD on kd_loss."""
    student = network(seed=5, width=6).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        for batch in loader(views=views).epoch(epoch):
            loss = kd_loss(student(batch.images), taught(epoch, batch), batch.targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return student


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "float32"}, 0.0),
        ({"dtype": "float32", "top_k": CLASSES}, 1e-4),
        ({"dtype": "float16"}, 2e-3),
    ],
)
def test_distillation_from_the_cache_is_that_from_the_teacher(
    tmp_path: Path, options: dict[str, Any], tolerance: float
) -> None:
    """A view an epoch, so that the teacher saw the very batches: all logits in float32 give the same bits."""
    cache = write(tmp_path / "cache", views=3, **options)
    teacher = network().eval()

    def online(_: int, batch: Batch) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = teacher(batch.images)
        return logits

    wanted = distil(online, epochs=3, views=3)
    found = distil(lambda epoch, batch: cache.batch(epoch % 3, batch.indices), epochs=3, views=3)
    start = network(seed=5, width=6)
    for (name, a), b, c in zip(
        wanted.state_dict().items(), found.state_dict().values(), start.state_dict().values(), strict=True
    ):
        if tolerance == 0.0:
            assert torch.equal(a, b), name
        elif a.dtype.is_floating_point:
            assert (a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max())), name
            assert not torch.equal(a, c), "training moves every parameter"


def test_later_epochs_see_the_views_again(tmp_path: Path) -> None:
    """Two views in four epochs: the order is new, so that batches, and the teacher's rounding with them, differ."""
    cache = write(tmp_path / "cache", views=2, dtype="float32")
    teacher = network().eval()
    for epoch in range(2, 4):
        for batch in loader(views=2).epoch(epoch):
            with torch.inference_mode():
                torch.testing.assert_close(
                    cache.batch(epoch % 2, batch.indices), teacher(batch.images), rtol=1e-5, atol=1e-5
                )


def test_top_k_logits_are_a_teacher_for_kd_loss(tmp_path: Path) -> None:
    found = write(tmp_path / "cache", top_k=4, temperature=2.0, dtype="float32")
    batch = next(loader().epoch(1))
    with torch.inference_mode():
        logits = network().eval()(batch.images)
    kept = found.batch(1, batch.indices)
    assert isinstance(kept, TopKTeacher)
    wanted = TopKTeacher.from_logits(logits, 4, temperature=2.0)
    assert torch.equal(kept.values, wanted.values)
    assert torch.equal(kept.indices.long(), wanted.indices)
    torch.testing.assert_close(kept.logsumexp, wanted.logsumexp)
    student = torch.randn(16, CLASSES)
    assert torch.equal(
        kd_loss(student, kept, batch.targets, temperature=2.0), kd_loss(student, wanted, batch.targets, temperature=2.0)
    )
    with pytest.raises(ValueError, match=r"temperature must be 2.0"):
        kd_loss(student, kept, batch.targets, temperature=4.0)


def test_half_precision_top_k_of_all_classes_loses_nothing(tmp_path: Path) -> None:
    """The stored logsumexp is that of the rounded logits, so the stored probabilities sum to exactly one."""
    kept = write(tmp_path / "k", top_k=CLASSES, temperature=1.0)
    whole = write(tmp_path / "whole")
    indices = torch.arange(COUNT)
    student = 3 * torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(1))
    for divergence in ("kl", "rkl", "dkd", "jsd", "tvd", "skl", "srkl"):
        a, b = (
            kd_loss(student, x.batch(0, indices), loader().labels, temperature=1.0, divergence=divergence)
            for x in (kept, whole)
        )
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


# Of kd_loss at k of 100 classes, measured on repvgg_a2 -> resnet20 and resnet56 -> shufflenetv2_x0_5, T = 4, with label
# revision; see docs/training.md. loss: relative; gradient: the difference's norm over the whole one's.
MEASURED = {
    ("repvgg_a2", "resnet20"): {10: (0.099, 0.059), 25: (0.043, 0.037), 50: (0.013, 0.020)},
    ("resnet56", "shufflenetv2_x0_5"): {10: (0.033, 0.117), 25: (0.006, 0.062), 50: (0.0003, 0.027)},
}


@pytest.mark.parametrize(("teacher", "student"), MEASURED)
def test_top_k_errors_on_real_logits_are_those_that_are_documented(teacher: str, student: str) -> None:
    path = Path(os.environ.get("LRDS_DATA", "")) / "logits" / "cifar100_test.npz"
    if not os.environ.get("LRDS_DATA") or not path.is_file():
        pytest.skip("LRDS_DATA is not set, or has no logits/cifar100_test.npz")
    with np.load(path) as archive:
        z, v = (torch.from_numpy(archive[name]).float() for name in (student, teacher))
        y = torch.from_numpy(archive["target"]).long()

    def measured(given: Tensor | TopKTeacher) -> tuple[float, Tensor]:
        logits = z.clone().requires_grad_()
        loss = kd_loss(logits, given, y, revise_temperature=None)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.item(), gradient

    layout = label_files.Layout(len(y), len(y), "", 100, 1, 0, "float16", 4.0, 1)
    indices, boxes = torch.arange(len(y)), torch.zeros(len(y), 5, dtype=torch.int32)
    loss, gradient = measured(v)
    for k, (loss_error, gradient_error) in (MEASURED[teacher, student] | {100: (1e-6, 1e-6)}).items():
        kept = label_files.Layout(**(vars(layout) | {"top_k": k}))
        found, approximate = measured(kept.unpack(kept.pack(indices, boxes, v), "cpu"))
        assert 0.9 * loss_error <= abs(found - loss) / loss <= 1.1 * loss_error or k == 100
        assert float((approximate - gradient).norm() / gradient.norm()) <= 1.1 * gradient_error
        assert abs(found - loss) / loss <= 1.1 * loss_error


def test_selected_samples_alone_are_cached(tmp_path: Path) -> None:
    rows = torch.arange(COUNT) % 3 == 0
    found = write(tmp_path / "cache", rows=rows, dtype="float32")
    assert torch.equal(found.cached(1), rows)
    teacher = network().eval()
    for batch in loader().epoch(1, rows):
        selected_indices = batch.indices[: int(rows[batch.indices].sum())]
        with torch.inference_mode():
            wanted = teacher(batch.images)[: len(selected_indices)]
        torch.testing.assert_close(found.batch(1, selected_indices), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"has no soft labels of sample 7 in view 1: 24 of 70 samples are cached"):
        found.batch(1, torch.tensor([3, 7, 8]))
    whole = write(tmp_path / "whole", dtype="float32")
    assert found.bytes < whole.bytes / 2


def test_places_out_of_range_are_named(tmp_path: Path) -> None:
    found = write(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"view must be in \[0, 2\), the cached views .*; got 2"):
        found.batch(2, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 70\), the samples .*; got 70"):
        found.batch(0, torch.tensor([0, 70]))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 70\).*; got -1"):
        found.batch(0, torch.tensor([-1]))


@pytest.mark.parametrize(
    ("fact", "value"),
    [("teacher's weights", "other"), ("data's fingerprint", "other"), ("seed", 1), ("data.mean", (0.5,)), ("new", 1)],
)
def test_soft_labels_of_other_facts_are_refused_naming_them(tmp_path: Path, fact: str, value: object) -> None:
    write(tmp_path / "cache")
    SoftLabels.open(tmp_path / "cache", facts=FACTS)
    with pytest.raises(ValueError, match="does not fit this run") as caught:
        SoftLabels.open(tmp_path / "cache", facts=FACTS | {fact: value})
    was = label_files.plain(FACTS).get(fact, "not there")
    now = label_files.plain({fact: value})[fact]
    assert f"its {fact} is {was!r}, this run's is {now!r};" in str(caught.value)
    assert str(caught.value).count("this run's is") == 1
    assert "\n" not in str(caught.value)


def test_every_fact_that_differs_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"its seed is 0, this run's is 4; its teacher's weights is 'def', this run's is 'x'"
    ):
        SoftLabels.open(tmp_path / "cache", facts=FACTS | {"seed": 4, "teacher's weights": "x"})


@pytest.mark.parametrize("other", [{"seed": 9}, {"augment": "none"}])
def test_another_augmentation_is_detected_by_its_boxes(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path / "cache")
    SoftLabels.open(tmp_path / "cache", loader=loader(views=2))
    with pytest.raises(ValueError, match=r"the teacher saw sample \d+ in view 0 at .* the loader shows it at"):
        SoftLabels.open(tmp_path / "cache", loader=loader(views=2, **other))


def test_damage_is_detected_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    write(path)
    original = contents(path)
    assert sorted(original) == ["meta.json", "rows.npy", "view-0000.bin", "view-0001.bin"]

    def repaired(batches: int) -> None:
        source = Counting()
        write(path, resume=True, source=source)
        assert source.count == batches, "what is sound is not computed again"
        assert contents(path) == original
        SoftLabels.open(path)

    size = label_files.read_meta(path).layout.record.itemsize
    for offset in (0, 4, 8, 12, size - 1):  # checksum, batch, its rows, box, logits
        content = bytearray(original["view-0000.bin"])
        content[33 * size + offset] ^= 4
        (path / "view-0000.bin").write_bytes(content)
        SoftLabels.open(path, verify=False)
        damaged = (
            r"view-0000.bin is damaged: 1 records have a wrong checksum, the first is that of sample 33;.*--resume"
        )
        with pytest.raises(ValueError, match=damaged):
            SoftLabels.open(path)
        repaired(1)

    content = bytearray(original["view-0000.bin"])
    content[:size], content[size : 2 * size] = content[size : 2 * size], content[:size]
    (path / "view-0000.bin").write_bytes(content)
    with pytest.raises(ValueError, match="2 records have a wrong checksum"):
        SoftLabels.open(path)
    (path / "view-0000.bin").write_bytes(original["view-0001.bin"])
    with pytest.raises(ValueError, match="70 records have a wrong checksum"):
        SoftLabels.open(path)
    repaired(5)

    (path / "view-0001.bin").write_bytes(original["view-0001.bin"][:-9])
    with pytest.raises(ValueError, match=r"view-0001.bin is cut short or overwritten: \d+ bytes, not"):
        SoftLabels.open(path, verify=False)
    repaired(1)

    (path / "view-0001.bin").unlink()
    with pytest.raises(ValueError, match=r"view-0001.bin is missing"):
        SoftLabels.open(path, verify=False)
    repaired(5)

    (path / "rows.npy").write_bytes(original["rows.npy"][:-1] + b"\0")
    with pytest.raises(ValueError, match=r"rows.npy is damaged: its checksum"):
        SoftLabels.open(path, verify=False)
    repaired(0)
    (path / "rows.npy").unlink()
    with pytest.raises(ValueError, match=r"rows.npy is missing"):
        SoftLabels.open(path, verify=False)
    repaired(0)

    (path / "meta.json").write_text((path / "meta.json").read_text()[:300])
    with pytest.raises(ValueError, match=r"meta.json is damaged .*--overwrite"):
        SoftLabels.open(path)
    write(path, overwrite=True)
    assert contents(path) == original


def test_another_format_is_refused_and_overwritten(tmp_path: Path) -> None:
    """A cache of format 2, which consisted of shards, is an error; overwrite=True replaces it."""
    path = tmp_path / "cache"
    write(path)
    original = contents(path)
    meta = json.loads((path / "meta.json").read_text()) | {"format": 2}
    (path / "meta.json").write_text(json.dumps(meta))
    for name in ("view-0000-part-00000.npy", "view-0000-rows.npy", "written.jsonl"):
        (path / name).write_bytes(b"old")
    attempts: tuple[Callable[[], SoftLabels], ...] = (lambda: SoftLabels.open(path), lambda: write(path, resume=True))
    for refused in attempts:
        with pytest.raises(ValueError, match=r"has format 2, this version reads 3: run lrds-fast cache again"):
            refused()
    write(path, overwrite=True)
    assert contents(path) == original


class Counting:
    """A loader that counts its batches, and stops before one."""

    def __init__(self, stop: int | None = None) -> None:
        self._loader, self.stop, self.count = loader(), stop, 0
        self.num_classes, self.labels = self._loader.num_classes, self._loader.labels

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, selected: Tensor | None = None, **options: Any) -> Iterator[Batch]:
        for batch in self._loader.epoch(epoch, selected, **options):
            if self.count == self.stop:
                raise KeyboardInterrupt
            self.count += 1
            yield batch

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        return self._loader.boxes(epoch, indices)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 9])  # before the first; in a view; between views; in the last batch
@pytest.mark.parametrize("selected", [False, True])
def test_interrupted_writing_resumes_to_the_same_files(tmp_path: Path, stop: int, selected: bool) -> None:
    options: dict[str, Any] = {"rows": torch.arange(COUNT) % 3 == 0} if selected else {}
    write(tmp_path / "whole", **options)
    path = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        write(path, source=Counting(stop), **options)
    with pytest.raises(
        ValueError, match=rf"are not complete, {1 + stop // 5} of 2 views have been started; .*--resume"
    ):
        SoftLabels.open(path)
    rest = Counting()
    write(path, source=rest, resume=True, **options)
    assert rest.count == 10 - stop, "finished batches are not computed again"
    assert contents(path) == contents(tmp_path / "whole")
    again = Counting()
    write(path, source=again, resume=True, **options)
    assert again.count == 0


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import test_data_soft_labels as here
from lrds_fast.data import label_files
write, batches = label_files.write_records, []
def dying(file, view, batch, places, records):
    write(file, view, batch, places, records)
    batches.append(batch)
    if len(batches) == 3:
        # The third batch is torn: one record's first half is written.
        os.pwrite(file.fileno(), bytes(records.itemsize // 2), int(places[5]) * records.itemsize)
        os.kill(os.getpid(), 9)
label_files.write_records = dying
here.write(here.Path({path!r}))
"""


def test_writing_resumes_after_a_killed_process(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    path = tmp_path / "killed"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    assert subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == -9
    (path / ".meta.json.1.partial").write_bytes(b"half")
    rest = Counting()
    write(path, resume=True, source=rest)
    assert rest.count == 10 - 2
    assert contents(path) == contents(tmp_path / "whole")


def test_resuming_with_other_facts_layout_or_order_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        write(path, source=Counting(3))
    with pytest.raises(ValueError, match=r"its seed is 0, this run's is 1"):
        write(path, resume=True, facts=FACTS | {"seed": 1})
    with pytest.raises(ValueError, match=r"its views is 2, this run's is 3"):
        write(path, resume=True, views=3)
    with pytest.raises(ValueError, match=r"its kept is 70, this run's is 24; its rows is"):
        write(path, resume=True, rows=torch.arange(COUNT) % 3 == 0)
    with pytest.raises(ValueError, match=r"its batches is 5, this run's is 9"):
        write(path, resume=True, source=loader(batch_size=8))
    with pytest.raises(ValueError, match=r"view 0 of .* does not hold every sample once: .*--overwrite"):
        write(path, resume=True, source=loader(seed=4))
    with pytest.raises(FileExistsError, match=r"holds soft labels already.*--resume.*--overwrite"):
        write(path)
    with pytest.raises(FileNotFoundError, match=r"there is no cache of soft labels in .*absent"):
        SoftLabels.open(tmp_path / "absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no soft labels"):
        write(tmp_path / "full", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "full" / "thesis.txt")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".meta.json.d11ebd1b.partial").write_text("{")  # of a process that was killed at once
    write(tmp_path / "begun", resume=True)
    assert not list((tmp_path / "begun").glob(".*.partial"))


def test_logits_that_cannot_be_kept_are_named(tmp_path: Path) -> None:
    class Wild(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), CLASSES)
            logits[:, 2] = -torch.inf  # a class that cannot be: legal
            logits[3, 4] = self.value
            return logits

    def wild(name: str, value: float, **options: Any) -> SoftLabels:
        return write_soft_labels(tmp_path / name, Wild(value), loader(), views=1, progress=False, **options)

    third = int(next(loader().epoch(0)).indices[3])
    with pytest.raises(ValueError, match=rf"of sample {third} hold 70000: too much for float16; take dtype float32"):
        wild("a", 7e4)
    with pytest.raises(ValueError, match=rf"of sample {third} hold nan: it gives NaN"):
        wild("b", float("nan"))
    found = wild("c", 7e4, dtype="float32").batch(0, torch.tensor([third]))
    assert isinstance(found, Tensor)
    assert found[0, [2, 4]].tolist() == [-torch.inf, 7e4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, r"views must be at least 1; got 0"),
        ({"top_k": 12}, r"top_k must be 0 \(all\) to 11, the number of classes; got 12"),
        ({"dtype": "bfloat16"}, r"dtype must be one of float16, float32; got 'bfloat16'"),
        ({"top_k": 3, "temperature": 0.0}, r"temperature must be above 0 and finite; got 0.0"),
        ({"rows": torch.ones(3, dtype=torch.bool)}, r"rows must be bool of shape \(70,\), one per sample"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_disk_without_room_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2000))
    with pytest.raises(
        OSError, match=r"2 views of 70 samples, 11 classes, need 7.6 kB, 2.0 kB are free; .*cache_views"
    ):
        write(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_error_of_the_disk_names_the_file_and_resuming_mends_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            write(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.filename == str(tmp_path / "cache" / "view-0000.bin")
    write(tmp_path / "cache", resume=True)
    write(tmp_path / "whole")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_full_disk_is_named_and_writing_resumes_with_free_space(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        (small / "another's").write_bytes(bytes(36 << 10))

        class Filling(Counting):
            """A disk that another process fills in the meantime."""

            def epoch(self, epoch: int, selected: Tensor | None = None, **options: Any) -> Iterator[Batch]:
                for i, batch in enumerate(super().epoch(epoch, selected, **options)):
                    if epoch == 0 and i == 4:
                        (small / "more").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
                    yield batch

        with pytest.raises(OSError, match=r"the disk of .* is too small: .* need 7.6 kB \(\d.\d kB are written, --res"):
            write(small / "cache", source=Filling())
        assert not list((small / "cache").glob(".*.partial"))
        (small / "more").unlink()
        found = write(small / "cache", resume=True)
        whole = write(tmp_path / "whole")
        everyone = torch.arange(COUNT)
        assert torch.equal(torch.as_tensor(found.batch(1, everyone)), torch.as_tensor(whole.batch(1, everyone)))
    finally:
        subprocess.run(["umount", "-l", small], check=True)
