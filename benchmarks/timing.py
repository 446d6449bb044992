"""Timers, memory meters and the bandwidth of memory, for the benchmarks."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

#: float32 elements of each of the triad's arrays: 128 MB, more than the caches of CPUs and the L2 of GPUs hold.
TRIAD_ELEMENTS = 32_000_000


def cpu_clock() -> float:
    """Seconds: CPU time of the process if torch uses one thread, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_cpu(run: Callable[[], object], least_s: float = 0.005) -> Callable[[], float]:
    """A timer: each call returns the seconds of one `run`, the mean over so many runs that they take `least_s` or
    more."""
    begin = cpu_clock()
    run()
    once = cpu_clock() - begin
    repeats = max(1, math.ceil(least_s / max(once, 1e-6)))

    def seconds() -> float:
        # One untimed run first: another contender has just left the allocator and the page tables in its own state,
        # which a training loop would not meet. On a virtual machine the first touch of a page that the host has taken
        # back costs microseconds.
        run()
        begin = cpu_clock()
        for _ in range(repeats):
            run()
        return (cpu_clock() - begin) / repeats

    return seconds


def _between_events(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one `run` on the CUDA device, the mean over `repeats` queued runs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / repeats


def time_cuda(run: Callable[[], object]) -> Callable[[], float]:
    """A timer: each call returns the seconds of one `run` on the device, the mean of five, after one untimed run."""

    def seconds() -> float:
        run()
        return _between_events(run, 5)

    return seconds


def time_cuda_graph(run: Callable[[], object]) -> Callable[[], float]:
    """A timer like time_cuda that replays `run` from a CUDA graph, so that the host leaves no gaps between kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: _between_events(graph.replay, 10)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discards what is written to file descriptor 2: some builds of the profiler report every start and stop there."""
    stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def peak_mib_cpu(run: Callable[[], object]) -> float:
    """The most memory that PyTorch's allocator holds during `run`, in MiB above what it holds before."""
    with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    assert profile.kineto_results is not None
    allocated = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most / 2**20


def triad(device: str, elements: int = TRIAD_ELEMENTS) -> Callable[[], object]:
    """STREAM's triad a = b + s * c in float32, written into memory that is there already: 12 bytes an element."""
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=3.0, out=a)


def bandwidths(device: str) -> dict[str, float]:
    """Bytes a second of the triad; on a CUDA device, where arrays have a gigabyte, of a copy too."""
    if device == "cpu":
        return {"triad": 12 * TRIAD_ELEMENTS / _median(time_cpu(triad("cpu")))}
    elements = 256 << 20
    a, b = (torch.ones(elements, device=device) for _ in range(2))
    return {
        "copy": 8 * elements / _median(time_cuda_graph(lambda: a.copy_(b))),
        "triad": 12 * elements / _median(time_cuda_graph(triad(device, elements))),
    }


def _median(timer: Callable[[], float]) -> float:
    return statistics.median(timer() for _ in range(7))
