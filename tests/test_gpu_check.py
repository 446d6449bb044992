"""tools/gpu_check.sh with stub programs, and tools/gpu_smoke.py on the CPU: a failed step does not end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"

# Says yes to everything; FAKE_<word> of the command line decides otherwise: "fail" or "hang".
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 9.0a; exit 0 ;;
  *setup.py*) word=build ;;
  *gpu_smoke*) word=smoke ;;
  *bench_kd_loss*) word=bench ;;
  *"-m pytest"*) word=tests ;;
  *bench_*) word=other ;;
  *"import lrds_fast"*) word=import ;;
  *) exit 0 ;;
esac
echo "fake $*"
name=FAKE_$word
case "${!name:-}" in
  fail) exit 1 ;;
  hang) exec sleep 60 ;;
esac
exit 0
"""


def gpu_check(folder: Path, *steps: str, **environment: str) -> tuple[int, str, Path]:
    programs = folder / "programs"
    programs.mkdir()
    for name, text in {"python": PYTHON, "nvcc": "#!/bin/sh\nexit 1\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    out = folder / "out"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LRDS_")}
    path = f"{programs}:/usr/bin:/bin"
    done = subprocess.run(
        [str(SCRIPT), *steps],
        env=kept | {"PATH": path, "PYTHON": str(programs / "python"), "OUT": str(out)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    return done.returncode, done.stdout, out


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    code, text, _ = gpu_check(tmp_path, "build", "smok")
    assert code == 2
    assert "no step 'smok'; there are: facts build smoke tests memcheck racecheck bench profile" in text


def test_the_exit_code_counts_failed_steps(tmp_path: Path) -> None:
    code, text, _ = gpu_check(tmp_path, "build", "smoke", "tests", "bench", FAKE_smoke="fail", FAKE_bench="fail")
    assert code == 2, text
    assert "== build: ok" in text and "== smoke: FAILED" in text and "== tests: ok" in text
    assert "== bench: FAILED" in text and "bench_bandwidth" in text  # the suites after the failed one
    assert "2 step(s) failed" in text


def test_a_hanging_step_is_ended(tmp_path: Path) -> None:
    code, text, _ = gpu_check(tmp_path, "smoke", "build", FAKE_smoke="hang", LRDS_GPU_LIMIT="1")
    assert code == 1, text
    assert "stopped at its limit of 1 s" in text and "== build: ok" in text


def test_a_used_up_budget_leaves_the_rest_out(tmp_path: Path) -> None:
    code, text, _ = gpu_check(tmp_path, "smoke", "tests", "build", FAKE_smoke="hang", LRDS_GPU_BUDGET="2")
    assert code == 1, text
    assert "== tests: left out, the budget of 2 s is used up" in text and "== build: left out" in text


def test_without_a_build_there_is_nothing_to_import(tmp_path: Path) -> None:
    code, text, _ = gpu_check(tmp_path, "build", "smoke", "tests", FAKE_build="fail", FAKE_import="fail")
    assert code == 3, text
    assert "== smoke: FAILED, there is nothing to import" in text


@pytest.mark.skipif(
    any(Path(folder, name).exists() for name in ("ncu", "compute-sanitizer") for folder in ("/usr/bin", "/bin")),
    reason="the tools are here",
)
def test_absent_tools_are_a_line(tmp_path: Path) -> None:
    code, text, out = gpu_check(tmp_path, "facts", "memcheck", "racecheck", "profile")
    assert code == 1, text  # facts: the pretended nvcc fails
    assert text.count("left out, compute-sanitizer was not found") == 2
    assert "left out, ncu was not found" in text
    assert "ncu: absent" in (out / "facts.txt").read_text()


def smoke(tmp_path: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, object]], str]:
    out = tmp_path / "smoke.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "gpu_smoke.py"), "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return done.returncode, {(line["work"], line["case"]): line for line in lines}, done.stdout + done.stderr


def test_smoke_reports_each_fault_and_goes_on(tmp_path: Path) -> None:
    faults = ["wrong=warp vector float32", "crash=warp vector bfloat16", "hang=warp vector float16"]
    code, lines, text = smoke(
        tmp_path,
        *("--cases", "warp vector,scale_gradient float32", "--limit", "8"),
        *(part for fault in faults for part in ("--inject", fault)),
    )
    assert code == 3, text
    found = {case: line["status"] for (work, case), line in lines.items() if work == "check"}
    assert found == {
        "warp vector float32": "wrong",
        "warp vector bfloat16": "crashed",
        "warp vector float16": "hung",
        "scale_gradient float32": "ok",
    }
    assert [case for work, case in lines if work == "time"] == ["scale_gradient float32"]


def test_uninitialised_operator_outputs_hold_nan() -> None:
    """at::empty inside the operators is filled with NaN, so that an unwritten element is NaN."""
    code = (
        "import torch; from torch.profiler import profile; import lrds_fast.functional\n"
        "torch.use_deterministic_algorithms(True)\n"
        "z = torch.randn(4, 10); factor = torch.tensor(2.0)\n"
        "with profile() as events: torch.ops.lrds_fast.scale_gradient(z, factor, None)\n"
        "print(sum('fill' in event.name for event in events.events()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout.split()[-1]) >= 1, done.stdout
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize("has_commit", [True, False])
def test_benchmarks_need_no_git(has_commit: bool) -> None:
    code = "from benchmarks.tables import facts; print(facts('cpu')['commit'])"
    environment = {key: value for key, value in os.environ.items() if key != "LRDS_COMMIT"}
    environment |= {"PATH": "/nonexistent"} | ({"LRDS_COMMIT": "abc123"} if has_commit else {})
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert done.stdout.strip() == ("abc123" if has_commit else "unknown")


def test_a_part_of_a_benchmark(tmp_path: Path) -> None:
    stored = tmp_path / "part.csv"
    command = [sys.executable, "-m", "benchmarks.bench_kd_loss", "--quick", "--csv", str(stored)]
    command += ["--contenders", "eager", "--shapes", "128x100,256x1000", "--rounds", "1", "--budget", "1e-9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not stored.exists(), done.stderr
    assert "the budget of 1e-09 s is used up: 2 cases left out" in done.stdout
    done = subprocess.run([*command, "--budget", "100"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = stored.read_text().splitlines()
    assert len(lines) == 5 and ",eager," in lines[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "cub"], "--contenders: there is no 'cub'; there are: ours, eager"),
        (["--shapes", "7x7"], "--shapes: no case has any of '7x7' in its name"),
    ],
)
def test_mistakes_in_the_part_are_named(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bench_kd_loss

    monkeypatch.setattr(sys, "argv", ["bench_kd_loss.py", "--quick", *arguments])
    with pytest.raises(SystemExit):
        bench_kd_loss.main()
    assert message in capsys.readouterr().err
