"""The command line: every command on real (small) work, and every mistake in one line with a way out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lrds_fast import _build, _ops
from lrds_fast.cli import main as cli
from lrds_fast.cli.doctor import cpu_level
from lrds_fast.notes import first_process, note
from lrds_fast.recipe.options import SelectionOptions
from lrds_fast.selection import Selection, select
from lrds_fast.train import load_recipe, rescoring, run

SMALL = ["--set", "schedule.epochs=2", "--set", "data.train_limit=120", "--set", "run.device=cpu", "--quiet"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def succeeds(*arguments: str) -> None:
    assert cli.main(arguments) == cli.OK


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = cli.MISUSED) -> str:
    """The one line on stderr of a command that must fail with `code`."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("lrds-fast: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_from_teacher_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    """All commands in order on a tenth of the data: each reads the files of the one before."""
    succeeds("train", "digits_teacher", *SMALL)
    succeeds("train", "digits_kd_lr", *SMALL)
    succeeds("score", "digits_kd_lr", *SMALL)
    succeeds("select", "runs/digits_kd_lr/scores.parquet", "--by", "kd_gain", "--ratio", "0.5", "--report", "s.html")
    succeeds("train", "digits_kd_lr_ds", *SMALL)
    capsys.readouterr()
    succeeds("report", "runs/digits_kd_lr", "runs/digits_kd_lr_ds", "--baseline", "digits_kd_lr", "--out", "r.html")
    table = capsys.readouterr().out
    assert re.search(r"^digits_kd_lr_ds +1 .* 60$", table, re.MULTILINE), "60 of 120 samples are denied the teacher"
    page = Path("r.html").read_text()
    assert "<svg" in page
    assert "keeps the teacher" in page
    assert Path("s.html").read_text().count("<img src=") == 48

    scores = Selection.load("runs/digits_kd_lr/scores.parquet")
    assert bool(scores.mask.all())
    assert set(scores.scores) == {
        "teacher_harm", "teacher_harm_standard_error", "kd_gain", "kd_gain_standard_error", "teacher_correct", "random",
    }  # fmt: skip
    chosen = Selection.load("runs/digits_kd_lr/selection.parquet")
    assert int(chosen.mask.sum()) == 60
    assert chosen.fingerprint == scores.fingerprint
    assert chosen.scores["kd_gain"][chosen.mask].max() <= chosen.scores["kd_gain"][~chosen.mask].min()
    last = json.loads(Path("runs/digits_kd_lr_ds/log.jsonl").read_text().splitlines()[-1])
    assert last["n_selected"] == 60 <= last["teacher_rows"] <= 60 + last["step"] / last["epoch"]


def test_a_selection_of_other_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    succeeds("train", "digits_teacher", *SMALL)
    succeeds("train", "digits_kd", *SMALL)
    succeeds("score", "digits_kd", *SMALL)
    succeeds("select", "runs/digits_kd/scores.parquet", "--threshold", "0")
    error = fails(capsys, "train", "digits_kd_ds", *SMALL, "--set", "data.split_seed=1")
    assert "selection.parquet was made for another dataset" in error
    assert not Path("runs/digits_kd_ds").exists()
    content = Path("runs/digits_kd/selection.parquet").read_bytes()
    Path("runs/digits_kd/selection.parquet").write_bytes(content[:100])
    assert "selection.parquet" in fails(capsys, "train", "digits_kd_ds", *SMALL)


def test_a_sweep_reads_finished_runs_that_it_may_not_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeds("train", "digits_alone", *SMALL)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    succeeds("sweep", "digits_alone", *SMALL)
    assert "cannot be written" in fails(capsys, "sweep", "digits_alone", *SMALL, "--set", "seed=5", "--set", "name=b")


def test_resume_and_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    succeeds("train", "digits_alone", *SMALL)
    log = Path("runs/digits_alone/log.jsonl").read_text()
    assert "runs/digits_alone holds a run already" in fails(capsys, "train", "digits_alone", *SMALL)
    succeeds("train", "digits_alone", *SMALL, "--resume")
    assert Path("runs/digits_alone/log.jsonl").read_text() == log
    Path("runs/digits_alone/log.jsonl").write_text("")
    assert "log.jsonl has 0 of the" in fails(capsys, "train", "digits_alone", *SMALL, "--resume")
    Path("runs/digits_alone/recipe.json").write_text("[]")
    assert "must hold a recipe's tables; got list" in fails(capsys, "sweep", "digits_alone", *SMALL)
    succeeds("train", "digits_alone", *SMALL, "--overwrite", "--set", "seed=1")
    assert Path("runs/digits_alone/log.jsonl").read_text() != log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.toml"], "there is no recipe file absent.toml; lrds-fast recipes lists"),
        (["train", "digits_allone"], "there is no recipe 'digits_allone'; did you mean 'digits_alone'?"),
        (["train", "digits_alone", "--set", "loss.etta=1"], "unknown key 'loss.etta'; did you mean 'loss.eta'?"),
        (["train", "digits_alone", "--set", "seed=x"], "seed must be int; got 'x' (str)"),
        (["train", "digits_alone", "--set", "student.model=mpl"], "unknown model 'mpl'; did you mean 'mlp'?"),
        (
            ["train", "digits_alone", "--set", "data.name=cifar"],
            "data.name must be 'digits', 'two_digit_numbers', 'cifar100', 'cifar10', 'npz'",
        ),
        (["train", "digits_alone", "--set", "run.device=tpu9"], "run.device must be auto, cpu, cuda or cuda:N"),
        (["train", "digits_kd"], "teacher.checkpoint: there is no file runs/digits_teacher/last.pt; train it first"),
        (["train", "digits_alone", "--set", "data.name=npz", "--set", "data.root=c.npz"], "there is no file c.npz"),
        (["train", "imagenet_resnet34_resnet18", "--set", "data.root=in1k"], "there is no folder in1k/train"),
        (["train", "digits_kd", "--set", "teacher.checkpoint="], "would teach with random weights"),
        (["score", "digits_alone"], "score.base: there is no file runs/digits_alone/last.pt"),
        (
            ["select", "absent.parquet", "--threshold", "0"],
            "there is no file absent.parquet; lrds-fast score writes one",
        ),
        (["select", ".", "--threshold", "0"], "there is no file .; lrds-fast score writes one"),
        (["report", "runs/absent"], "there is no folder runs/absent"),
        (["recipes", "show", "nothing_like_it"], "there is no recipe 'nothing_like_it'; lrds-fast recipes lists them"),
        (["demo", "--seeds", "0"], "seeds must be at least 1"),
    ],
)
def test_errors_are_one_line_with_a_remedy(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    assert message in fails(capsys, *arguments)
    assert list(Path().iterdir()) == [], "nothing half-written"


def test_an_error_names_the_command_that_writes_the_damaged_file_again(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {name: torch.tensor([0.5, -0.5, 0.25]) for name in ("kd_gain", "el2n")}
    select(scores, "kd_gain", ratio=1.0).save("scores.parquet")
    Path("damaged.parquet").write_bytes(Path("scores.parquet").read_bytes()[:-100])
    error = fails(capsys, "select", "damaged.parquet", "--threshold", "0")
    assert "damaged.parquet is truncated, damaged or not Parquet" in error
    assert error.endswith("; run lrds-fast score again\n")
    pq.write_table(pa.table({"index": [0, 1, 2]}), "other.parquet")
    error = fails(capsys, "select", "other.parquet", "--threshold", "0")
    assert error.endswith("other.parquet is Parquet but not a score file; name another file\n")
    with pytest.raises(ValueError, match=r"not Parquet .*; write it again with lrds-fast select or Selection.save$"):
        Selection.load("damaged.parquet")
    selections = Path("run", "selections")
    selections.mkdir(parents=True)
    Path("damaged.parquet").rename(selections / "epoch_0001.parquet")
    with pytest.raises(ValueError, match=r"not Parquet .*; restore it from a copy, or start again with --overwrite$"):
        rescoring.latest(Path("run"), SelectionOptions(after=1), 2)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "absent.toml", "--debug"]) == cli.MISUSED
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("lrds-fast: error: there is no recipe file")


def test_runs_survive_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training works when stdout and stderr are closed, as in a daemon."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["train", "digits_alone", *SMALL]) == cli.OK
    assert Path("runs/digits_alone/last.pt").exists()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["train", "digits_alone", *SMALL]) == cli.MISUSED


def test_a_run_with_a_bar_needs_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    result = run.fit(load_recipe("digits_alone", SMALL[1:-1:2]), progress=True)
    assert len(result.records) == 2
    note("nothing is said, and nothing breaks")


def test_divergence_exits_with_another_code_and_names_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "train", "digits_alone", *SMALL, "--set", "optimizer.lr=1e30", code=cli.FAILED)
    assert re.search(r"the loss is not finite at step \d+ .*lower optimizer.lr", error)
    assert not Path("runs/digits_alone/last.pt").exists()


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "runs/digits_alone/last.pt")

    monkeypatch.setattr(torch, "save", full)
    error = fails(capsys, "train", "digits_alone", *SMALL, code=cli.FAILED)
    assert "runs/digits_alone/last.pt: No space left on device" in error


def test_an_interrupt_prints_how_to_resume(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert cli.main(["train", "digits_alone", *SMALL]) == cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().err


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    succeeds("recipes")
    listed = capsys.readouterr().out
    assert re.search(r"^digits_kd_lr +digits_kd with label revision$", listed, re.MULTILINE)
    succeeds("recipes", "show", "digits_kd_lr")
    text = capsys.readouterr().out
    assert 'extends = "digits_kd"' in text
    # What is shown is a recipe: saved to a file, it is the same one.
    Path("copy.toml").write_text(text)
    succeeds("recipes", "show", "digits_kd_lr", "--resolved")
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["loss"]["eta"] == 0.8
    assert resolved["optimizer"]["lr"] == 0.1


def doctor(capsys: pytest.CaptureFixture[str], *, code: int = cli.OK) -> str:
    capsys.readouterr()
    assert cli.main(["doctor"]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("recorded", [True, False])
def test_doctor_reports_the_build(
    recorded: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = _ops.build_info()
    if recorded:
        monkeypatch.setattr(_build, "record", lambda: info)
    else:
        monkeypatch.setattr(_build, "record", lambda: None)
        # Then it asks the extension itself, in another process.
        monkeypatch.setattr(subprocess, "run", lambda command, **_: answered(command, json.dumps(info)))
    monkeypatch.setenv("LRDS_DATA", "/nowhere")
    out = doctor(capsys)
    for fact in (info["torch_version"], info["cpu_isa"], torch.__version__, *info["cpu_isas"], *info["cuda_archs"]):
        assert fact in out
    assert re.search(rf"^ok +cpu kernels .*this CPU runs {info['cpu_isa']};", out, re.MULTILINE)
    assert re.search(r"^- +LRDS_DATA +/nowhere is not a folder", out, re.MULTILINE)
    missing = [line for line in out.splitlines() if line.startswith(("- ", "MISSING"))]
    for line in missing:
        assert re.search(r"install|set|correct|driver|CPU|GPU", line), f"no way out in: {line}"


def answered(command: Sequence[str], output: str) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 0, stdout=output, stderr="")


def test_doctor_runs_without_the_extension_or_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the extension, with another torch or without torch, doctor prints a line and its exit code is 1."""
    cpu = {"version": "2.15.0+cpu", "cuda": None}
    monkeypatch.setattr(_build, "installed_torch", lambda: cpu)
    package = tmp_path / "mine" / "lrds_fast"
    package.mkdir(parents=True)
    (package.parent / "setup.py").touch()
    (package.parent / "csrc").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(_build, "_HERE", package)
        patch.setattr(sys, "path", [])
        out = doctor(capsys, code=cli.FAILED)
        assert re.search(r"^MISSING +lrds-fast +.*never built in \S+mine; build it there: make venv", out, re.MULTILINE)
        assert re.search(r"^ok +torch +2.15.0\+cpu, a CPU build", out, re.MULTILINE)
    facts = {**_ops.build_info(), "cuda": False}
    with monkeypatch.context() as patch:
        patch.setattr(_build, "record", lambda: {**facts, "torch_version": "2.13.0"})
        assert "built for torch 2.13.0, this is torch 2.15.0+cpu" in doctor(capsys, code=cli.FAILED)
        patch.setattr(_build, "installed_torch", lambda: None)
        out = doctor(capsys, code=cli.FAILED)
        assert "pip install 'torch==2.13.*'" in out and re.search(r"^MISSING +torch", out, re.MULTILINE)
    monkeypatch.setattr(_build, "record", lambda: {**facts, "torch_version": "2.15.0+cpu"})
    out = doctor(capsys)
    assert "LRDS_FAST_CUDA" not in out and "install a CUDA build of torch first" in out


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "no such level"])
def test_doctor_reports_the_cpu_level_of_the_kernels(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = _ops.build_info()
    order = info["cpu_isas"]
    monkeypatch.delenv("LRDS_FAST_CPU_ISA", raising=False)
    best = cpu_level(order)
    monkeypatch.setenv("LRDS_FAST_CPU_ISA", level)
    lower = level in order and order.index(level) < order.index(best)
    assert cpu_level(order) == (level if lower else best)


def test_help_and_usage_errors_do_not_import_torch() -> None:
    """Help, recipes, doctor and usage errors work where torch, NumPy and the extension cannot be imported."""
    code = """
import sys
for name in ("torch", "numpy", "lrds_fast._C"):
    sys.modules[name] = None
from lrds_fast.cli import main as cli
def run(*arguments):
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code
done = [run("--help"), run("--version"), run("train", "--help"), run("recipes"), run("recipes", "show", "digits_kd")]
done += [run("recipes", "show", "imagenet-modern/resnet50sb-resnet18/kd", "--resolved")]
done += [run("sweep", "digits_alone", "--grid", "loss.eta=0.1,0.2", "--seeds", "0", "1", "--list")]
assert done == [0] * 7, done
assert [run("fly"), run("train", "digits_alone", "--batch-size", "3"), run("train", "absent.toml")] == [2, 2, 2]
run("doctor")
print("torch import fails:", run("train", "digits_alone"))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"torch import fails: {cli.FAILED}\n")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lrds-fast: error: ")


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    paths = [str(tmp_path), str(Path(cli.__file__).parents[2])]
    process = subprocess.Popen(
        [sys.executable, "-m", "lrds_fast", "train", "digits_alone"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        # Tests that run in a shell's background inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert error.startswith("lrds-fast: interrupted") and error.count("\n") == 1


@pytest.mark.parametrize("command", [command.__name__.rpartition(".")[2] for command in cli.COMMANDS])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"example:\n  lrds-fast {command}", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see lrds-fast --help)"),
        (["train"], "the following arguments are required: RECIPE (see lrds-fast train --help)"),
        (["select", "x.parquet"], "one of the arguments --confidence --outliers --threshold --ratio is required"),
        (["trian", "digits_alone"], "there is no command 'trian'; did you mean 'train'?"),
        (["fly"], "there is no command 'fly'; there are demo, train, cache"),
        (["score", "digits_kd", "--epochs", "3"], "unknown argument --epochs; a recipe's values are set with --set"),
        (["score", "digits_kd", "--epochs=3"], "--set schedule.epochs=... (see lrds-fast score --help)"),
        (["train", "digits_alone", "--batch-size", "3"], "--set data.batch_size=..."),
        (["report", "runs/a", "--epochs", "3"], "unknown argument --epochs (see lrds-fast report --help)"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == cli.MISUSED
    error = capsys.readouterr().err
    assert message in error and error.startswith("lrds-fast: error: ") and error.count("\n") == 1


def test_python_m_lrds_fast_is_the_same_program_and_survives_a_closed_pipe() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    pipe = f"{sys.executable} -m lrds_fast recipes show digits_kd --resolved"
    done = subprocess.run(
        ["bash", "-c", f"{pipe} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    failed = subprocess.run(
        [sys.executable, "-m", "lrds_fast", "report", "absent"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert failed.returncode == cli.MISUSED
    assert failed.stderr.startswith("lrds-fast: error: there is no folder absent")


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL at a random moment, then --resume: every number but the time equals the uninterrupted run."""
    settings = ["--set", "schedule.epochs=200", "--set", "run.device=cpu", "--set", "data.train_limit=200", "--quiet"]
    succeeds("train", "digits_alone", *settings, "--set", "run.out=whole")
    # As many threads as here: sums are in another order with another number.
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "lrds_fast", "train", "digits_alone", *settings, "--set", "run.out=killed"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    log = Path("killed/log.jsonl")
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = len(log.read_text().splitlines())
    assert done < 200, "the run ended before it could be killed"
    Path("killed/.last.pt.left.partial").write_bytes(b"what a kill in the middle of writing leaves")
    succeeds("train", "digits_alone", *settings, "--set", "run.out=killed", "--resume")

    def records(folder: str) -> list[dict[str, object]]:
        lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert records("killed") == records("whole")
    names = sorted(path.name for path in Path("killed").iterdir() if path.is_file())
    assert names == ["best.safetensors", "last.pt", "log.jsonl", "recipe.json", "student.json", "summary.json"]
    weights = [torch.load(f"{folder}/last.pt", weights_only=True)["student"] for folder in ("killed", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"RANK": "1"}, True),
    ],
)
def test_a_rank_without_torchrun_is_ignored(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    """A scheduler may set RANK for other reasons; the processes join by WORLD_SIZE (lrds_fast.ranks.joined)."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert first_process() is first
