"""The suite "train": equal steps in all arms, CPU time of workers, shares that add up, reports of missing packages."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_train, train_loaders, train_readers, train_steps
from benchmarks.baselines import Objective
from benchmarks.train_steps import REGIONS, Arm, Case

CPU = torch.device("cpu")
# The smallest networks with convolutions and batch statistics.
CASE = Case("resnet14", "resnet8", 8, 7, Objective(), 10, 10)
OURS = Arm("ours", ours=True)
# Of 40 samples in batches of 10, a share that does not divide: some batches have a row more than others.
SHARE = 0.33
ARMS = [
    OURS,
    dataclasses.replace(OURS, name="selected", selected=SHARE),
    dataclasses.replace(OURS, name="mask", selected=SHARE, compose="mask"),
    dataclasses.replace(OURS, name="cached", cached=True),
    dataclasses.replace(OURS, name="channels_last", channels_last=True),
]


# CPU time on one thread is compared.
pytestmark = pytest.mark.usefixtures("one_thread")


def plan() -> bench_train.Plan:
    length = bench_train.Length(2)
    return bench_train.Plan(CPU, 10, 2, 0, length, bench_train.Length(4), (float("inf"), float("inf")))


def updates(arms: list[Arm], share: float) -> list[torch.Tensor]:
    """The weight updates after the first step: of the published step with the rows masked, then of each arm."""
    keep = bench_train.keep(plan().size, share)
    ready = train_loaders.prepared(
        (3, 8, 8), classes=7, size=plan().size, batch=10, distinct=2, batches=2, device=CPU, selected=keep
    )
    pair = train_steps.make_pair(CASE, CPU, ready.batches[0].images)
    cache = train_steps.cached_logits(pair.teacher, ready.batches, plan().size)
    found = []
    for arm in [dataclasses.replace(bench_train.BASELINE, selected=share), *arms]:
        made = train_steps.make_contender(arm, CASE, pair, CPU, plan().size, keep, cache if arm.cached else None)
        found.append(train_steps.first_update(made, ready.batches[0]))
    return found


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_our_step_equals_the_published_step(arm: Arm) -> None:
    wanted, got = updates([arm], arm.selected)
    assert wanted.norm() > 0
    assert train_steps.distance(got, wanted) < 1e-5


def test_the_check_detects_another_loss() -> None:
    """Rows under the wrong objective, a missing teacher and a wrong weight all differ by more than the tolerance."""
    arm = ARMS[1]
    wanted, got = updates([arm], SHARE)
    everyone = updates([], 1.0)[0]
    assert train_steps.distance(everyone, wanted) > 10 * bench_train.EQUAL
    assert train_steps.distance(1.01 * got, wanted) > bench_train.EQUAL


def test_a_case_is_prepared_timed_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From arms to rows to tables and the page, on networks of a millisecond; pictures from memory."""
    monkeypatch.setattr(train_loaders, "cifar_kinds", lambda: (["in memory"], ["nothing published here"]))
    monkeypatch.delenv("LRDS_DATA", raising=False)
    case = dataclasses.replace(CASE, size=32, classes=100)
    said: list[str] = []
    arms = [bench_train.BASELINE, dataclasses.replace(bench_train.OURS, compiled=False, amp="off")]
    turns = bench_train.prepare(case, arms, plan(), tmp_path, said.append)
    bench_train.measure(turns, plan())
    rows = bench_train.rows_of(case, turns, plan())
    assert [(row["arm"], row["loader"]) for row in rows] == [
        ("baseline", "synthetic"),
        ("ours", "synthetic"),
        ("ours", "in memory"),
    ]
    assert said == [f"{case}: without nothing published here"]
    assert rows[0]["vs_baseline"] == 1.0 and rows[0]["checked"] == ""
    assert rows[1]["checked"] < 1e-5 and rows[1]["vs_low"] <= rows[1]["vs_baseline"] <= rows[1]["vs_high"]
    assert rows[2]["vs_baseline"] == "" and 0.1 < rows[2]["ceiling"] < 10
    for row in rows:
        assert row["rounds"] == 2 and row["images_s"] == pytest.approx(1e3 * 10 / row["median_ms"])
        parts = {name: row[f"share_{name}"] for name in (*REGIONS, "other", "idle")}
        assert sum(parts.values()) == pytest.approx(1.0, abs=0.2), "medians of three"
        assert all(parts[name] > 0 for name in ("teacher", "student", "loss", "backward", "optimizer"))
        assert parts["idle"] == 0
    assert rows[2]["share_loader"] > rows[1]["share_loader"]

    pytest.importorskip("matplotlib")
    from benchmarks import render, tables

    stored = tmp_path / "train_test.csv"
    tables.write_csv(stored, [row | tables.facts("cpu") for row in rows])
    page = render.render(stored, tmp_path)
    text = page.read_text()
    assert f"## {case}, C = 100, batch 10" in text and "noise of CIFAR's shape" in text
    assert (tmp_path / "train_test.svg").read_text().rstrip().endswith("</svg>")
    assert "## Readers" not in text


def test_an_arm_with_wrong_results_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def astray(arm: Arm, case: Case, *rest: Any) -> Any:
        return train_steps_our_step(arm, dataclasses.replace(case, objective=Objective(kd_weight=0.95)), *rest)

    train_steps_our_step = train_steps.our_step
    monkeypatch.setattr(train_steps, "our_step", astray)
    with pytest.raises(AssertionError, match=r"a float32 step of ours is \S+ off the baseline's"):
        bench_train.prepare(CASE, [bench_train.BASELINE, OURS], plan(), tmp_path, lambda _: None)


def test_arms_beyond_the_time_budget_are_skipped_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "with_loaders", lambda *_: [])
    late = dataclasses.replace(plan(), until=(0.0, 0.0))
    said: list[str] = []
    turns = bench_train.prepare(CASE, [bench_train.BASELINE, *ARMS], late, tmp_path, said.append)
    assert [turn.contender.arm.name for turn in turns] == ["baseline", "ours", "selected"]
    assert said[-1] == f"{CASE}: channels_last is left out, the budget is used up"
    bench_train.measure(turns, late)
    assert all(len(turn.seconds) == 1 for turn in turns)


def test_on_the_cpu_only_the_small_pair_is_profiled() -> None:
    small, large = bench_train.CASES[0], bench_train.CASES[1]
    whole = bench_train.arms_of(small, CPU, quick=False, compile=True)
    assert whole == bench_train.MAIN + bench_train.ABLATIONS and any(arm.compiled for arm in whole)
    assert not any(arm.compiled for arm in bench_train.arms_of(small, CPU, quick=True, compile=False))
    photographs = bench_train.arms_of(large, CPU, quick=False, compile=True)
    assert [arm.name for arm in photographs] == [arm.name for arm in bench_train.MAIN]
    assert not any(arm.compiled for arm in photographs)
    names = [arm.name for arm in bench_train.arms_of(large, torch.device("cuda"), quick=False, compile=False)]
    assert "ours, NCHW" in names and "ours, not compiled" not in names, "it would be ours once more"


def launch(correlation: int, ts: float) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": ts, "dur": 1, "args": {"correlation": correlation}}


def kernel(correlation: int, ts: float, dur: float) -> dict[str, Any]:
    return {"cat": "kernel", "name": "k", "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def region(name: str, ts: float, dur: float, category: str = "user_annotation") -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": ts, "dur": dur, "tid": 1}


def test_kernels_count_in_the_region_that_launched_them() -> None:
    trace = [
        region("turn", 0, 100),
        region("teacher", 1, 4),
        region("student", 6, 4),
        region("backward", 12, 3),
        region("teacher", 40, 40, "gpu_user_annotation"),  # the device's side of a region is not another region
        launch(1, 2) | {"tid": 1},
        launch(2, 7) | {"tid": 1},
        launch(3, 13) | {"tid": 2},  # autograd's own thread
        launch(4, 20) | {"tid": 1},
        kernel(3, 60, 30),
        kernel(1, 20, 20),
        kernel(2, 40, 10),
        kernel(4, 90, 5),
        {"cat": "gpu_memcpy", "name": "copy", "ts": 95, "dur": 3, "args": {"correlation": 9}},
    ]
    found = train_steps.shares(trace)
    expected = dict.fromkeys((*REGIONS, "other", "idle"), 0.0)
    expected |= {"teacher": 0.2, "student": 0.1, "backward": 0.3, "other": 0.08, "idle": 0.32}
    assert found == pytest.approx(expected)


def test_without_kernels_regions_count_by_cpu_time() -> None:
    found = train_steps.shares([region("turn", 0, 10), region("loss", 1, 2), region("loss", 5, 1), region("x", 6, 4)])
    assert found["loss"] == pytest.approx(0.3) and found["other"] == pytest.approx(0.7) and found["idle"] == 0
    with pytest.raises(ValueError, match="no region 'turn'"):
        train_steps.shares([region("loss", 1, 2)])


def test_the_clock_counts_processes_that_ended() -> None:
    clock = train_steps.Clock(CPU)
    clock.start()
    child = os.fork()
    if child == 0:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        os._exit(0)
    os.waitpid(child, 0)
    assert 0.15 < clock.seconds() < 2.0


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_prepared_batches_begin_with_the_selected(share: float) -> None:
    keep = bench_train.keep(60, share)
    assert keep is None or int(keep.sum()) == 18
    ready = train_loaders.prepared(
        (3, 4, 4), classes=5, size=60, batch=10, distinct=2, batches=5, device=CPU, selected=keep
    )
    batches = list(ready.epoch(3, keep))
    assert len(batches) == len(ready) == 5
    assert torch.equal(batches[0].images, batches[2].images) and not torch.equal(batches[0].images, batches[1].images)
    for batch in batches:
        assert torch.equal(batch.targets, ready.labels[batch.indices])
        if keep is not None:
            mask = keep[batch.indices]
            assert int(mask.sum()) == 3 and mask[:3].all()


def test_the_teachers_activations_do_not_grow() -> None:
    pair = train_steps.make_pair(CASE, CPU, torch.randn(32, 3, 8, 8))
    logits = pair.teacher(torch.randn(32, 3, 8, 8))
    assert logits.abs().max() < 50 and logits.std() > 0.01
    assert not pair.teacher.training and pair.student.training


def test_missing_packages_are_reported_as_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    absent = {"torchvision", "timm"}
    monkeypatch.setattr(train_loaders, "missing", lambda *names: ", ".join(n for n in names if n in absent))
    monkeypatch.setattr(train_loaders, "has_dali", lambda: False)
    cases, reasons = bench_train.cases_here()
    assert [str(case) for case in cases] == ["resnet32x4 -> resnet8x4, 32 x 32"]
    assert reasons == [
        "resnet34 -> resnet18, 224 x 224: torchvision is not installed",
        "resnet50 -> mobilenetv1_100, 224 x 224: timm, torchvision is not installed",
    ]
    assert train_loaders.cifar_kinds()[0] == ["in memory"]
    kinds, reasons = train_loaders.photograph_kinds()
    assert kinds == [] and len(reasons) == 2
    said: list[str] = []
    assert train_readers.rows_of(Path(), device=CPU, count=4, workers=1, rounds=1, say=said.append) == []
    assert said == [
        "readers: without the published CIFAR loader: torchvision is not installed",
        "readers: without torchvision's loaders: torchvision is not installed",
        "readers: without DALI's loader: nvidia.dali is not installed",
    ]


def test_missing_lists_packages_that_cannot_be_imported() -> None:
    assert train_loaders.missing("torch", "no_such_module_at_all") == "no_such_module_at_all"
    assert train_loaders.missing("torch") == ""


def test_readers_agree_on_generated_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without real photographs JPEGs are generated; every reader yields the same pixels, for repeated samples too."""
    for name in ("torchvision", "nvidia.dali", "PIL"):
        pytest.importorskip(name)
    monkeypatch.delenv("LRDS_DATA", raising=False)
    monkeypatch.setattr(
        train_loaders, "generated_photographs", lambda folder, make=train_loaders.generated_photographs: make(folder, 8)
    )
    found = train_loaders.photographs(tmp_path)
    assert found.description == "made JPEGs" and len(list(found.root.rglob("*.jpg"))) == 8
    errors = train_readers.check_evaluated(found, 10, ["published", "torchvision", "DALI"], CPU)
    assert errors["published"] == 0.0 and errors["DALI"] <= 0.05
    assert train_readers.check_trained(found, 10, CPU) < 1.0
    loader = train_loaders.photograph_loader(
        "published", found, count=10, batch_size=4, train=True, workers=0, device=CPU, image_size=32
    )
    batches = list(loader.epoch(0))
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(10))
    assert all(torch.equal(loader.labels[batch.indices], batch.targets) for batch in batches)


def test_the_pixel_check_detects_another_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    found = train_loaders.Photographs(train_loaders.generated_photographs(tmp_path, 8), "made JPEGs")
    whole = train_readers.in_index_order
    calls: list[int] = []

    def shifted(loader: Any) -> torch.Tensor:
        calls.append(1)
        return whole(loader).roll(len(calls) - 1, dims=3)

    monkeypatch.setattr(train_readers, "in_index_order", shifted)
    with pytest.raises(AssertionError, match="torchvision: evaluated pictures are"):
        train_readers.check_evaluated(found, 8, ["published", "torchvision"], CPU)


def test_readers_alternate_and_every_row_has_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "nvidia.dali", "PIL"):
        pytest.importorskip(name)
    monkeypatch.delenv("LRDS_DATA", raising=False)
    monkeypatch.setattr(
        train_loaders, "generated_photographs", lambda folder, make=train_loaders.generated_photographs: make(folder, 8)
    )
    rows = train_readers.rows_of(tmp_path, device=CPU, count=8, workers=1, rounds=2, say=print)
    by_case = {(row["case"], row["loader"]): row for row in rows}
    assert [case for case, loader in by_case if loader == "published"] == [
        "train, 32 x 32",
        "train, 224 x 224",
        "eval, 224 x 224",
    ]
    for row in rows:
        assert row["vs_low"] <= row["vs_published"] <= row["vs_high"] and row["images_cpu_s"] > 0
    assert by_case["train, 32 x 32", "in memory"]["vs_published"] > 2
    assert by_case["eval, 224 x 224", "DALI"]["levels_off"] <= 0.05
    text = "\n".join(train_readers.table([row | {"threads": 1} for row in rows]))
    assert text.count("|\n") == len(rows) + 2 and "160 noise of CIFAR's shape, train, 32 x 32" in text


def test_the_published_cifar_loader_yields_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.delenv("LRDS_DATA", raising=False)
    pictures = train_loaders.cifar_pictures(20)
    loader = train_loaders.cifar_loader("published", pictures, batch_size=8, workers=0, device=CPU)
    batches = list(loader.epoch(0))
    assert [len(batch.indices) for batch in batches] == [8, 8, 4]
    assert all(torch.equal(batch.targets, pictures[1][batch.indices]) for batch in batches)
    assert batches[0].images.shape == (8, 3, 32, 32) and batches[0].images.dtype == torch.float32


def test_profiled_step_regions_are_complete() -> None:
    """A real profile: every region of both steps is found in the trace, in about its share."""
    slow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    pair = train_steps.Pair(slow.eval(), slow)
    ready = train_loaders.prepared((3, 64, 64), classes=7, size=40, batch=10, distinct=2, batches=2, device=CPU)
    for arm in (bench_train.BASELINE, OURS):
        made = train_steps.make_contender(arm, CASE, pair, CPU, 40, None, None)
        turn = bench_train.Turn(made, "synthetic", ready, "", None, None, 0.0, bench_train.Length(2))
        found = train_steps.shares(train_steps.profiled(lambda turn=turn: turn.run(0), CPU))  # type: ignore[misc]
        assert sum(found.values()) == pytest.approx(1.0)
        assert all(found[name] > 0 for name in REGIONS), arm.name
