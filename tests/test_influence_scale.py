"""Scoring large data: shards on disk, resumption after kill -9, several processes, constant memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lrds_fast
from lrds_fast import KDLoss, influence
from lrds_fast.influence import shards

CLASSES, WIDTH, SAMPLES = 5, 12, 131
NAMES = ("kd_gain", "teacher_harm", "self_influence", "param_shift:delta", "el2n", "random:4", "mismatch")
LAYERS = ("last", "all")


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, CLASSES))


class Samples(Dataset[tuple[Tensor, int]]):
    """Samples made from their index. dies_at: reading this sample kills the process with SIGKILL."""

    def __init__(self, count: int, seed: int, dies_at: int = -1) -> None:
        self._count, self._seed, self._dies_at = count, seed, dies_at
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads.append(index)
        # The forward passes of the earlier shards have been through; a later pass may be the one that dies.
        if index == self._dies_at and self.reads.count(index) == int(os.environ.get("DIES_AT_PASS", "1")):
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(self._seed * 100_003 + index)
        return torch.randn(WIDTH, generator=generator), index * 7 % CLASSES


def scored(out: Path | None = None, *, dies_at: int = -1, **change: Any) -> influence.Scores:
    keywords: dict[str, Any] = {"scores": NAMES, "loss": KDLoss(temperature=2.0), "batch_size": 8, "layers": "last"}
    data = {"train_data": Samples(SAMPLES, 1, dies_at), "val_data": Samples(30, 2)}
    return influence.score(model(0), model(1), out=out, **(data | keywords | change))


def run(folder: Path, code: str, *, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in new processes that see this module as `scale` and a folder as `folder`."""
    script = folder / "script.py"
    head = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
    script.write_text(
        head + f"import torch\nimport test_influence_scale as scale\nfolder = Path({str(folder)!r})\n{code}"
    )
    command = [sys.executable, str(script)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several shards of few samples; one thread, as the processes of `run` have: products round by threads."""
    monkeypatch.setattr(shards, "SHARD_BATCHES", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layers", LAYERS)
def test_scores_in_a_folder_equal_scores_in_memory(tmp_path: Path, layers: str) -> None:
    found = scored(tmp_path / "scores", layers=layers)
    expected = scored(layers=layers)
    assert list(found) == list(NAMES) and found.meta == json.loads(json.dumps(expected.meta))
    for name in NAMES:
        assert torch.equal(found[name], expected[name])
    again = influence.load_scores(tmp_path / "scores")
    assert torch.equal(again["kd_gain"], found["kd_gain"]) and torch.equal(again.target, found.target)
    table = pd.read_parquet(tmp_path / "scores").sort_values("index")
    errors = ["kd_gain_standard_error", "teacher_harm_standard_error"] if layers == "last" else []
    assert set(table.columns) == {"index", "label", "teacher_pred", *NAMES, *errors} and len(table) == SAMPLES
    assert table["kd_gain"].tolist() == found["kd_gain"].tolist()
    # What resuming would have needed is gone.
    files = {path.name for path in (tmp_path / "scores").iterdir() if path.suffix != ".parquet"}
    assert files == {"_plan.json", "_complete.json"}


@pytest.mark.parametrize(
    ("layers", "dies_at", "dies_at_pass"),
    [("last", 100, 1), ("all", 20, 1), ("all", 60, 2), ("all", 60, 3), ("all", 100, 4)],
    ids=["features", "factors", "eigenvalues", "mismatch", "scores"],
)
def test_a_killed_run_resumes_to_the_same_scores(tmp_path: Path, layers: str, dies_at: int, dies_at_pass: int) -> None:
    out = tmp_path / "scores"
    code = f"""
from lrds_fast.influence import shards
shards.SHARD_BATCHES = 3
scale.scored(folder / "scores", dies_at={dies_at}, layers={layers!r})
"""
    killed = run(tmp_path, code, DIES_AT_PASS=str(dies_at_pass))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ValueError, match="not complete; run influence.score again with resume=True"):
        influence.load_scores(out)
    with pytest.raises(ValueError, match="holds scores already: continue them with resume=True"):
        scored(out, layers=layers)
    begun = {path.name for path in out.iterdir()}
    data = Samples(SAMPLES, 1)
    resumed = scored(out, layers=layers, resume=True, train_data=data)
    if dies_at == 100:
        # Shards of 24 samples: the first four were finished, and only the data's first batch is read again of them.
        wanted = "_rows-00000003.safetensors" if layers == "last" else "part-00000003.parquet"
        assert wanted in begun and data.reads[:8] == list(range(8)) and min(data.reads[8:]) == 96
    expected = scored(layers=layers)
    for name in NAMES:
        assert torch.equal(resumed[name], expected[name])
    # Once complete, resuming reads the first batch alone, to compare the data.
    silent = Samples(SAMPLES, 1)
    assert torch.equal(scored(out, layers=layers, resume=True, train_data=silent)["kd_gain"], expected["kd_gain"])
    assert silent.reads == list(range(8))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_samples(tmp_path: Path, processes: int) -> None:
    code = """
import torch.distributed as dist
dist.init_process_group("gloo")
for layers in scale.LAYERS:
    data = scale.Samples(scale.SAMPLES, 1)
    memory = scale.scored(layers=layers, train_data=data)
    on_disk = scale.scored(folder / layers, layers=layers)
    for name in scale.NAMES:
        assert torch.equal(memory[name], on_disk[name]), name
    assert (dist.get_rank() == 0) == (0 in data.reads)
    torch.save((dict(memory), memory.target, data.reads), folder / f"{layers}{dist.get_rank()}.pt")
dist.destroy_process_group()
"""
    done = run(tmp_path, code, processes=processes)
    assert done.returncode == 0, done.stderr
    for layers, passes in (("last", 1), ("all", 4)):
        expected = scored(layers=layers)
        reads: list[int] = []
        for rank in range(processes):
            found, target, own = torch.load(tmp_path / f"{layers}{rank}.pt")
            reads += own
            assert torch.equal(target, expected.target)
            for name in NAMES:
                # Sums over the data are added up in another order: float64 factors, float32 scores.
                torch.testing.assert_close(found[name], expected[name], rtol=2e-5, atol=2e-6)
        # Each process has read its first batch, of 8, once more.
        assert len(reads) == passes * SAMPLES + 8 * processes and set(reads) == set(range(SAMPLES))
        assert sorted(pd.read_parquet(tmp_path / layers)["index"]) == list(range(SAMPLES))


def test_processes_share_conjugate_gradients_and_selections(tmp_path: Path) -> None:
    code = """
import torch.distributed as dist
from lrds_fast.selection import SelectedDataset
dist.init_process_group("gloo")
exact = dict(scores="kd_gain", layers="all", curvature="exact", damping_scale=1.0)
selected = SelectedDataset(
    scale.Samples(scale.SAMPLES, 1), scale.model(1), scale.Samples(30, 2), rule={"ratio": 0.7},
    loss=scale.KDLoss(temperature=2.0), batch_size=8,
)
selected.update(scale.model(0))
flags = torch.tensor([selected[row][-1] for row in range(scale.SAMPLES)])
torch.save((scale.scored(**exact)["kd_gain"], flags), folder / f"{dist.get_rank()}.pt")
dist.destroy_process_group()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), f"{threads}: nobody may keep the destroyed group"
"""
    done = run(tmp_path, code, processes=2)
    assert done.returncode == 0, done.stderr
    expected = scored(scores="kd_gain", layers="all", curvature="exact", damping_scale=1.0)["kd_gain"]
    mask = lrds_fast.select(scored(scores="teacher_harm"), ratio=0.7).mask
    for rank in range(2):
        gain, flags = torch.load(tmp_path / f"{rank}.pt")
        # The solutions of 1e-4 in the residual.
        torch.testing.assert_close(gain, expected, rtol=1e-3, atol=float(1e-3 * expected.abs().max()))
        assert torch.equal(flags, mask)


def test_more_processes_than_batches(tmp_path: Path) -> None:
    code = """
import torch.distributed as dist
dist.init_process_group("gloo")
found = scale.scored(train_data=scale.Samples(20, 1))
if dist.get_rank() == 3:
    torch.save(dict(found), folder / "found.pt")
dist.destroy_process_group()
"""
    done = run(tmp_path, code, processes=4)
    assert done.returncode == 0, done.stderr
    expected = scored(train_data=Samples(20, 1))
    for name, found in torch.load(tmp_path / "found.pt").items():
        torch.testing.assert_close(found, expected[name], rtol=2e-5, atol=2e-6)


class Stream:
    """An iterable of batches of various sizes, without a length."""

    def __iter__(self) -> Any:
        data = Samples(SAMPLES, 1)
        sizes = [3, 20, 1, 50, 57]
        start = 0
        for size in sizes:
            rows = [data[i] for i in range(start, start + size)]
            start += size
            yield torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


@pytest.mark.parametrize("layers", LAYERS)
def test_streams_and_loaders_with_workers(tmp_path: Path, layers: str) -> None:
    expected = scored(layers=layers)
    stream = scored(tmp_path / "stream", layers=layers, train_data=Stream())
    names = NAMES if layers == "last" else ("el2n", "random:4", "mismatch")  # draws of labels depend on the batches
    loader = DataLoader(Samples(SAMPLES, 1), 8, num_workers=1)
    workers = scored(tmp_path / "workers", layers=layers, train_data=loader)
    for name in NAMES:
        assert torch.equal(workers[name], expected[name])
    for name in names:
        torch.testing.assert_close(stream[name], expected[name], rtol=2e-5, atol=2e-6)


def test_one_other_target_of_data_in_memory_is_another_run(tmp_path: Path) -> None:
    x, y = torch.randn(SAMPLES, WIDTH), torch.arange(SAMPLES) % CLASSES
    changed = y.clone()
    changed[-1] = 3
    scored(tmp_path / "scores", train_data=TensorDataset(x, y), val_data=TensorDataset(x, y))
    for name, part in (("train_data", "train"), ("val_data", "val")):
        data: dict[str, Any] = {"train_data": TensorDataset(x, y), "val_data": TensorDataset(x, y)}
        data[name] = TensorDataset(x, changed)
        with pytest.raises(ValueError, match=f"was started with {part}_targets = "):
            scored(tmp_path / "scores", resume=True, **data)


def test_folders_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "scores"
    scored(out)
    for change, message in (
        ({"loss": KDLoss(temperature=3.0)}, "was started with loss = "),
        ({"batch_size": 9}, "was started with batches = 17, not 15"),
        ({"scores": ("el2n",)}, "was started with scores = "),
        ({"train_data": Samples(50, 1)}, "was started with batches = 17, not 7"),
        ({"train_data": Samples(SAMPLES, 3)}, "was started with train_inputs = "),
        ({"val_data": Samples(30, 3)}, "was started with val_inputs = "),
    ):
        with pytest.raises(ValueError, match=message):
            scored(out, resume=True, **change)
    other = tmp_path / "other"
    other.mkdir()
    (other / "._plan.json.d11ebd1b.partial").write_text("{")  # of a process that was killed at once
    scored(other, loss=KDLoss(temperature=3.0))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        scored(tmp_path / "file")
    with pytest.raises(ValueError, match="not empty and holds no scores"):
        scored(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no scores"):
        influence.load_scores(tmp_path)

    part = out / "part-00000002.parquet"
    good = part.read_bytes()
    part.write_bytes((other / part.name).read_bytes())
    with pytest.raises(ValueError, match=r"part-00000002.parquet belongs to another run"):
        influence.load_scores(out)
    part.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"part-00000002.parquet is truncated or damaged"):
        influence.load_scores(out)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00000003.parquet begins at sample 72, where 48 is next"):
        influence.load_scores(out)
    # Only the missing part is computed again, as the message says.
    (out / "_complete.json").unlink()
    expected = scored()
    assert torch.equal(scored(out, resume=True)["kd_gain"], expected["kd_gain"])
    last = sorted(out.glob("*.parquet"))[-1]
    last.rename(tmp_path / last.name)
    with pytest.raises(ValueError, match=r"has 120 of 131 samples: a part is missing"):
        influence.load_scores(out)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """Peak resident memory of 4,000 and of 32,000 samples differs by the rows of scores only."""
    code = """
import resource, sys
from lrds_fast.influence import shards
shards.SHARD_BATCHES = 8
class Wide(torch.utils.data.IterableDataset):
    def __init__(self, count): self.count = count
    def __iter__(self):
        for start in range(0, self.count, 250):
            g = torch.Generator().manual_seed(start)
            yield torch.randn(250, 1024, generator=g), torch.randint(10, (250,), generator=g)
def net(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(1024, 10)
layers, count = sys.argv[1], int(sys.argv[2])
loader = torch.utils.data.DataLoader(Wide(count), batch_size=None)
out = folder / f"{layers}{count}"
scale.influence.score(net(0), net(1), loader, loader, layers=layers if layers == "last" else [""], out=out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

    def peak(layers: str, count: int) -> float:
        done = run(tmp_path, f"import sys\nsys.argv[1:] = [{layers!r}, '{count}']\n{code}")
        assert done.returncode == 0, done.stderr
        return int(done.stdout) / 1024

    for layers in LAYERS:
        growth = peak(layers, 32_000) - peak(layers, 4_000)
        assert growth < 50, (layers, growth)  # 28,000 samples more are 109 MiB of inputs
