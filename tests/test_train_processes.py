"""Training in several processes and accumulation steps, with stopped, killed and hanging processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast import kd_loss
from lrds_fast.data import Batch, Data, in_memory
from lrds_fast.data.loader import Loader
from lrds_fast.files import read_records
from lrds_fast.models import Classifier
from lrds_fast.models.small import MLP
from lrds_fast.train import Recipe, train

#: 146 training samples in batches of 16: nine, and one of 2 rows, which two processes cannot divide.
SAMPLES, HELD_OUT, STEPS = 146, 29, 10


class Noisy(Classifier):
    """A network that draws from the global generator in training and keeps batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 12)
        self.norm = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 3)

    def features(self, images: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.hidden(images.flatten(1)))), 0.3, self.training)


class Train:
    """A training split that calls `event` before the batch of (epoch, step)."""

    def __init__(self, loader: Any, at: tuple[int, int], event: Any) -> None:
        self._loader, self._at, self._event = loader, at, event
        self.labels, self.num_classes = loader.labels, loader.num_classes

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, selected: Tensor | None = None, *, start: int = 0, **options: Any) -> Iterator[Batch]:
        for step, batch in enumerate(self._loader.epoch(epoch, selected, start=start, **options), start=start):
            if (epoch, step) == self._at:
                self._event()
            yield batch

    def picture(self, index: int) -> Tensor:
        return self._loader.picture(index)  # type: ignore[no-any-return]


def blobs(at: tuple[int, int] | None = None, event: Any = None) -> Data:
    """Pictures of 4 x 4 pixels around a mean per class. at, event: see Train."""
    draws = torch.Generator().manual_seed(0)
    count = SAMPLES + HELD_OUT
    targets = torch.randint(0, 3, (count + 37,), generator=draws)
    centres = torch.rand(3, 1, 4, 4, generator=draws)
    images = (centres[targets] + 0.35 * torch.randn(len(targets), 1, 4, 4, generator=draws)).clamp(0, 1)
    splits = images[:count], targets[:count], images[count:], targets[count:]
    data = in_memory(*splits, num_classes=3, batch_size=16, val_fraction=1 / 6, augment="shift", eval_batch_size=9)
    assert len(data.train.labels) == SAMPLES
    if at is None:
        return data
    return Data(data.name, cast(Loader, Train(data.train, at, event)), data.score, data.val, data.test)


def teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def selection() -> Tensor:
    return torch.rand(SAMPLES, generator=torch.Generator().manual_seed(4)) < 0.6


def trained(
    out: Path,
    *,
    data: Data | None = None,
    noisy: bool = False,
    resume: bool = False,
    values: dict[str, Any] | None = None,
) -> Any:
    """A run of three epochs and its network. noisy: one with dropout and batch statistics, else one without."""
    torch.manual_seed(1)
    student = Noisy() if noisy else MLP(3, inputs=16)
    chosen = Recipe().with_values(
        **{
            "schedule.epochs": 3,
            "optimizer.lr": 0.1,
            "run.device": "cpu",
            "data.batch_size": 16,
            "run.timeout": 20.0,
            "run.amp_emulated": True,
            "data.val_fraction": 1 / 6,
        }
        | (values or {})
    )
    selected = None if chosen.selection.after else selection()
    result = train(
        chosen,
        data or blobs(),
        student,
        teacher(),
        out=out,
        selected=selected,
        resume=resume,
        progress=False,
    )
    return result, student


def run(folder: Path, code: str, *, processes: int = 1, wait: bool = True, **environment: str) -> Any:
    """Runs code in new processes that see this module as `cases`; under torchrun where there are several."""
    script = folder / "script.py"
    head = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport os, signal, time, torch\n"
    script.write_text(
        head + "import test_train_processes as cases\nfrom pathlib import Path\n"
        f"torch.set_num_threads(1)\nfolder = Path({str(folder)!r})\nrank = int(os.environ.get('RANK', '0'))\n{code}"
    )
    command = [sys.executable, str(script)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    begun = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return begun
    out, err = begun.communicate(timeout=240)
    return subprocess.CompletedProcess(command, begun.returncode, out, err)


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal to 1e-6, or to the rounding of a float32 sum.

    In an accumulated batch each part may give the teacher one row more than are selected.
    """
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert b["teacher_rows"] <= a["teacher_rows"] <= b["teacher_rows"] + 4 * STEPS
        for key in a.keys() - {"teacher_rows"}:
            assert a[key] == pytest.approx(b[key], rel=1e-6, abs=2e-7), key


pytestmark = pytest.mark.usefixtures("one_thread")


SHARED: dict[str, dict[str, Any]] = {
    "selection": {},
    "mask, clipped, averaged": {"selection.compose": "mask", "run.clip_grad_norm": 0.5, "run.ema_decay": 0.9},
    "rescored, in two parts": {"selection.after": 1, "run.accumulate": 2},
    "dkd, adamw": {"loss.divergence": "dkd", "optimizer.name": "adamw", "optimizer.lr": 0.01},
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of SHARED by two processes, which are started once: a folder with each one's log and results."""
    folder = tmp_path_factory.mktemp("two")
    code = """
for name, values in cases.SHARED.items():
    result, student = cases.trained(folder / name, data=cases.blobs(), values=values)
    torch.save([result.records, result.teacher_pred, student.state_dict()], folder / f"{name} {rank}.pt")
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert not [thread for thread in threads if "gloo" in thread], f"a process group outlives its run: {threads}"
"""
    done = run(folder, code, processes=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_like_one(tmp_path: Path, two_processes: Path, name: str) -> None:
    """The same batches, gradients of the same mean: weights and logs equal those of one process to 1e-6."""
    whole, student = trained(tmp_path / "one", data=blobs(), values=SHARED[name])
    for rank in range(2):
        records, pred, state = torch.load(two_processes / f"{name} {rank}.pt")
        assert_close(numbers(records), numbers(whole.records))
        assert torch.equal(pred, whole.teacher_pred)
        for key, value in student.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6)
    assert_close(numbers(read_records(two_processes / name / "log.jsonl")), numbers(whole.records))


def test_num_valid_under_ddp_as_documented(tmp_path: Path) -> None:
    """README's three lines, run by two processes of 7 and 3 valid rows, in one part and in two: the gradient of the
    mean over all ten. With the undivided count it is half of that."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^count = .*\n.*all_reduce.*\n^loss = kd_loss\(.*$", readme, re.MULTILINE)
    assert found is not None
    lines = [line.split("  #")[0].strip() for line in found.group().splitlines()]
    assert lines == [line.strip() for line in str(kd_loss.__doc__).splitlines() if line.strip() in lines]
    code = f"""
import contextlib, copy
import torch.distributed.nn.functional  # before there is a group: see lrds_fast.ranks
from lrds_fast import kd_loss

other = os.fork()  # two processes for one start of torch, which has run nothing yet
rank = 0 if other else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
draws = torch.Generator().manual_seed(0)
x, v = (torch.randn(16, size, generator=draws, dtype=torch.float64) for size in (5, 4))
y = torch.randint(4, (16,), generator=draws)
y[[2, 8, 9, 11, 12, 15]] = -100
torch.manual_seed(0)
layer = torch.nn.Linear(5, 4).double()
parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
kd_loss(layer(x), v, y).backward()

def gradient(lines, parts):
    parallel.zero_grad()
    names = dict(torch=torch, kd_loss=kd_loss, target=y.view(2, 8)[rank])
    exec("\\n".join(lines[:2]), names)
    for part in range(parts):
        rows = slice(8 * rank + 8 // parts * part, 8 * rank + 8 // parts * (part + 1))
        with contextlib.nullcontext() if part + 1 == parts else parallel.no_sync():
            names.update(student_logits=parallel(x[rows]), teacher_logits=v[rows], target=y[rows])
            exec(lines[2], names)
            names["loss"].backward()
    return parallel.module.weight.grad

lines = {lines!r}
for parts in (1, 2):
    torch.testing.assert_close(gradient(lines, parts), layer.weight.grad)
undivided = [line.replace(" / torch.distributed.get_world_size()", "") for line in lines]
torch.testing.assert_close(2 * gradient(undivided, 1), layer.weight.grad)
torch.distributed.destroy_process_group()
assert rank == 1 or os.waitpid(other, 0)[1] == 0
"""
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr


def test_an_accumulated_batch_equals_the_whole_batch(tmp_path: Path) -> None:
    whole, student = trained(tmp_path / "whole")
    for count in (2, 3):
        divided, other = trained(tmp_path / f"in{count}", values={"run.accumulate": count})
        assert_close(numbers(divided.records), numbers(whole.records))
        for name, value in student.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_a_batch_must_have_rows_for_every_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.batch_size .* 16 rows are fewer than 2 for each of 1 process.* 9 step"):
        trained(tmp_path / "run", values={"run.accumulate": 9})
    assert not (tmp_path / "run").exists()


EXTRAS: list[dict[str, Any]] = [
    {},
    {"run.ema_decay": 0.9, "run.amp": "bf16", "optimizer.name": "adamw", "optimizer.lr": 0.02},
    {"run.amp": "fp16", "run.accumulate": 2, "run.save_every_steps": 3},
    {"selection.after": 1, "selection.every": 1, "run.save_every_steps": 2},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=["plain", "averaged, bf16, adamw", "fp16, in parts", "rescored"])
@pytest.mark.parametrize("at", [(0, 1), (1, 0), (1, 7), (2, 9)], ids=str)
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(tmp_path: Path, at: tuple[int, int], extra: Any) -> None:
    """A signal arrives before the step `at`: that step is done, the checkpoint written, and nothing is lost."""
    from lrds_fast.train.stopping import Stopped

    whole, expected = trained(tmp_path / "whole", noisy=True, data=blobs(), values=extra)
    stopping = blobs(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    if at == (2, 9):  # the very last step: there is nothing to go on with
        trained(tmp_path / "cut", noisy=True, data=stopping, values=extra)
    else:
        with pytest.raises(Stopped, match=r"stopped by SIGTERM after \d epochs.*last.pt is saved") as stopped:
            trained(tmp_path / "cut", noisy=True, data=stopping, values=extra)
        assert stopped.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    done = at[0] * STEPS + at[1] + 1
    assert state["epoch"] * STEPS + state["steps"] == done
    torch.manual_seed(12345)  # whatever ran in between
    resumed, found = trained(tmp_path / "cut", noisy=True, data=blobs(), resume=True, values=extra)
    assert numbers(resumed.records) == numbers(whole.records)
    assert numbers(read_records(tmp_path / "cut" / "log.jsonl")) == numbers(whole.records)
    assert torch.equal(resumed.teacher_pred, whole.teacher_pred)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    best = (tmp_path / "whole" / "best.safetensors").read_bytes()
    assert (tmp_path / "cut" / "best.safetensors").read_bytes() == best


@pytest.mark.parametrize(
    ("at", "every"), [((0, 0), 0), ((0, 5), 4), ((1, 3), 0), ((2, 6), 1)], ids=["first", "early", "middle", "late"]
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, at: tuple[int, int], every: int) -> None:
    """kill -9 at a step: the last checkpoint is whole, and going on from it gives the uninterrupted run."""
    values: dict[str, Any] = {"run.save_every_steps": every, "run.ema_decay": 0.9}
    code = f"""
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
cases.trained(folder / "cut", noisy=True, data=cases.blobs({at!r}, die), values={values!r})
"""
    killed = run(tmp_path, code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    checkpoint = tmp_path / "cut" / "last.pt"
    if at == (0, 0):
        assert not checkpoint.exists()
    else:
        state = torch.load(checkpoint, weights_only=True)
        done = at[0] * STEPS + (at[1] // every * every if every else 0)
        assert state["epoch"] * STEPS + state["steps"] == done
    resumed, found = trained(tmp_path / "cut", noisy=True, resume=True, values=values)
    whole, expected = trained(tmp_path / "whole", noisy=True, values=values)
    assert numbers(resumed.records) == numbers(whole.records)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_two_processes_stop_at_the_same_step_and_go_on(tmp_path: Path) -> None:
    """torchrun passes SIGTERM on, to each process at its own time; they agree on a step and write one checkpoint."""
    code = """
data = cases.blobs((0, 1), lambda: (folder / f"begun{rank}").touch())
slow = data.train._loader.epoch
def waiting(*args, **options):
    for batch in slow(*args, **options):
        time.sleep(0.05)
        yield batch
data.train._loader.epoch = waiting
try:
    cases.trained(folder / "two", data=data, values={"schedule.epochs": 40})
except cases.Exception_ as stopped:
    print(stopped)
""".replace("cases.Exception_", "__import__('lrds_fast.train.stopping', fromlist=['x']).Stopped")
    begun = run(tmp_path, code, processes=2, wait=False)
    for _ in range(600):
        if (tmp_path / "begun0").exists() and (tmp_path / "begun1").exists():
            break
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    out, err = begun.communicate(timeout=60)
    assert "last.pt is saved" in out, err[-3000:]
    state = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    done = state["epoch"] * STEPS + state["steps"]
    assert 0 < done < 40 * STEPS and done % STEPS in range(STEPS)
    resumed, _ = trained(tmp_path / "two", data=blobs(), resume=True, values={"schedule.epochs": 40})
    whole, _ = trained(tmp_path / "one", data=blobs(), values={"schedule.epochs": 40})
    assert resumed.records[-1]["train_loss"] == pytest.approx(whole.records[-1]["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_machines_of_two_processes(tmp_path: Path) -> None:
    """Two starts of torchrun that meet at an address, as docs/tasks/machines.md shows: the run of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["-m", "lrds_fast", "train", "digits_teacher", "--quiet", "--set", "schedule.epochs=2"]
    arguments += ["--set", "run.device=cpu", "--set", "data.batch_size=64"]
    together = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-id=run1"]
    together += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]

    def begun(folder: str, *before: str) -> Any:
        command = [sys.executable, *before, *arguments, "--set", f"run.out={tmp_path / folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    machines = [begun("four", *together, f"--node-rank={number}") for number in range(2)]
    outputs = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum(out.count("digits_teacher: test accuracy") for out, _ in outputs) == 1
    out, err = (alone := begun("one")).communicate(timeout=240)
    assert alone.returncode == 0, err
    four, one = (numbers(read_records(tmp_path / folder / "log.jsonl")) for folder in ("four", "one"))
    for found, expected in zip(four, one, strict=True):
        assert (found["step"], found["rows"]) == (expected["step"], expected["rows"])
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
        assert found["test_ce"] == pytest.approx(expected["test_ce"], rel=1e-6)


@pytest.mark.parametrize(
    "event",
    [pytest.param("os._exit(7)", id="dies"), pytest.param("time.sleep(600)", id="hangs", marks=pytest.mark.slow)],
)
def test_a_lost_process_ends_the_others_in_time_and_no_checkpoint_is_lost(tmp_path: Path, event: str) -> None:
    code = f"""
def lose():
    if rank == 1:
        {event}
cases.trained(folder / "two", data=cases.blobs((1, 4), lose), values={{"run.timeout": 5.0}})
"""
    started = time.monotonic()
    done = run(tmp_path, code, processes=2)
    assert done.returncode != 0
    # A hanging process fails after run.timeout; torchrun kills it half a minute after SIGTERM.
    assert time.monotonic() - started < 120, "it hung"
    state = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    assert (state["epoch"], state["steps"]) == (1, 0)
    resumed, _ = trained(tmp_path / "two", data=blobs(), resume=True)
    whole, _ = trained(tmp_path / "one", data=blobs())
    assert_close(numbers(resumed.records)[1:], numbers(whole.records)[1:])
