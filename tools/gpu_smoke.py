"""Checks each kernel path and dtype once against float64, each case in its own process; then times the cases.

    python tools/gpu_smoke.py --out out/smoke.jsonl
    python tools/gpu_smoke.py --device cpu --cases "warp vector,dkd"     the same cases on the CPU

A case that crashes, hangs or corrupts its CUDA context is reported, and the other cases still run. Outputs hold NaN
before the operators run. A line of JSON is written as soon as a case ends. Exit code: the number of cases that were not
"ok" (at most 100).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# cuBLAS reads this when it is loaded, and needs it in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import path_cases  # noqa: E402
import torch  # noqa: E402
import torch._inductor.config  # noqa: E402  deterministic mode imports it: once here, not in every child

# Children are forked from this process, which therefore never touches CUDA itself.
context = multiprocessing.get_context("fork")


def poison_outputs(device: str) -> None:
    """From now on torch.empty and at::empty return memory filled with NaN (the largest value for integers)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if not torch.empty(1000, device=device).isnan().all():
        raise RuntimeError("torch.empty is not filled with NaN: unwritten outputs would pass")


def check_case(name: str, device: str, inject: str) -> dict[str, Any]:
    """Compares a case with float64. inject: "wrong", "crash" or "hang" to test this program, or ""."""
    if inject == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if inject == "hang":
        time.sleep(1e6)
    poison_outputs(device)
    path_cases.check(path_cases.CASES[name], device, wrong=inject == "wrong")
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


def time_case(name: str, device: str, inject: str) -> dict[str, Any]:
    """The time of a case, and its bandwidth next to that of a copy and a triad."""
    from benchmarks.timing import bandwidths, time_cpu, time_cuda_graph

    case = path_cases.CASES[name]
    rates = {f"{key}_gb_s": rate / 1e9 for key, rate in bandwidths("cuda").items()} if device == "cuda" else {}
    torch.cuda.empty_cache()
    rows = case.timed_rows if device == "cuda" else case.rows
    call, moved = path_cases.timed(case, device, rows)

    def run() -> None:
        call()

    timed = (time_cuda_graph if device == "cuda" else time_cpu)(run)
    seconds = statistics.median(timed() for _ in range(5))
    measured: dict[str, Any] = {"rows": rows, "us": round(seconds * 1e6, 2), **rates}
    if moved:
        measured["gb_s"] = moved / seconds / 1e9
        if rates:
            measured["percent_of_triad"] = 100 * measured["gb_s"] / rates["triad_gb_s"]
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in measured.items()}


def child(work: str, name: str, device: str, inject: str, answer: Connection) -> None:
    """The main function of a case's process: sends its result through `answer`."""
    try:
        torch.set_num_threads(1)
        result = {"status": "ok"} | {"check": check_case, "time": time_case}[work](name, device, inject)
    except AssertionError as error:
        result = {"status": "wrong", "detail": str(error)[:2000]}
    except BaseException:
        result = {"status": "error", "detail": traceback.format_exc()[-2000:]}
    answer.send(result)


@dataclass
class Running:
    name: str
    process: Any
    answer: Connection
    began: float


def run_all(work: str, names: list[str], options: argparse.Namespace, until: float, out: TextIO) -> list[str]:
    """Runs "check" or "time" of every case, checks in several processes at once; returns the names that are "ok"."""
    waiting = list(names)
    running: list[Running] = []
    ok: list[str] = []
    injected = dict(part.split("=", 1)[::-1] for part in options.inject)

    def report(name: str, result: dict[str, Any], seconds: float) -> None:
        line = {"work": work, "case": name, **result, "s": round(seconds, 2)}
        out.write(json.dumps(line) + "\n")
        out.flush()
        detail = result.get("detail", "").strip().splitlines()
        shown = [f"{key} {value}" for key, value in result.items() if key not in ("status", "detail")]
        print(f"{work} {name}: {result['status']}", *shown, *detail[-1:], sep="; ", flush=True)
        if result["status"] == "ok":
            ok.append(name)

    while waiting or running:
        if time.monotonic() > until and waiting:
            for name in waiting:
                report(name, {"status": "left out", "detail": "the budget is used up"}, 0.0)
            waiting.clear()
        while waiting and len(running) < (options.workers if work == "check" else 1):
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(work, name, options.device, injected.get(name, ""), sender))
            process.start()
            sender.close()
            running.append(Running(name, process, receiver, time.monotonic()))
        if not running:
            break
        next_limit = min(case.began for case in running) + options.limit
        ready = wait([case.answer for case in running], max(0.0, next_limit - time.monotonic()))
        for case in list(running):
            seconds = time.monotonic() - case.began
            if case.answer in ready:
                try:
                    result = case.answer.recv()
                except EOFError:
                    result = {}
                case.process.join(5)
                code = case.process.exitcode
                if code is None:
                    result = {"status": "hung", "detail": "at the end of the process, after: " + json.dumps(result)}
                elif code != 0 or not result:
                    result = {"status": "crashed", "detail": f"exit code {code}, after: " + json.dumps(result)}
            elif seconds >= options.limit:
                result = {"status": "hung", "detail": f"no answer within {options.limit:g} s"}
            else:
                continue
            if case.process.exitcode is None:
                case.process.kill()
                case.process.join(5)
            case.answer.close()
            running.remove(case)
            report(case.name, result, seconds)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", default="", help="only cases with one of these in their names, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="cases checked at once")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for a case")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no case starts")
    parser.add_argument("--no-times", action="store_true", help="check only")
    parser.add_argument("--inject", action="append", default=[], metavar="FAULT=CASE", help="wrong, crash or hang")
    parser.add_argument("--out", type=Path, help="write lines of JSON here")
    options = parser.parse_args()
    parts = [part.strip() for part in options.cases.split(",") if part.strip()]
    names = [name for name in path_cases.CASES if not parts or any(part in name for part in parts)]
    if options.list:
        print("\n".join(names))
        return 0
    if not names:
        parser.error(f"--cases: no case has any of {options.cases!r} in its name; --list prints them")
    for part in options.inject:
        fault, _, name = part.partition("=")
        if fault not in ("wrong", "crash", "hang") or name not in names:
            parser.error(f"--inject {part}: must be wrong, crash or hang, '=', and one of the chosen cases")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.budget
    with open(options.out or os.devnull, "w", encoding="utf-8") as out:
        ok = run_all("check", names, options, until, out)
        timed = [] if options.no_times else run_all("time", ok, options, until, out)
    missing = len(names) - len(ok) + (0 if options.no_times else len(ok) - len(timed))
    print(f"{len(ok)} of {len(names)} cases agree with float64" + ("" if options.no_times else f", {len(timed)} timed"))
    return min(100, missing)


if __name__ == "__main__":
    sys.exit(main())
