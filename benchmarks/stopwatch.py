"""Clocks for work on a GPU. They also run on the CPU, to try the code, not to measure."""

import json
import tempfile
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

MAX_ROUNDS = 40
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a profiler's trace


class Timed(NamedTuple):
    """``run(prepare())`` is timed, without the ``prepare()``."""

    run: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


class Spread(NamedTuple):
    """Seconds: median, lower and upper quartile and shortest of all rounds."""

    median: float
    low: float
    high: float
    shortest: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        low, middle, high = quantiles(seconds, n=4, method="inclusive") if seconds[1:] else seconds * 3
        return cls(*(float(f"{s:.4g}") for s in (middle, low, high, min(seconds))), len(seconds))


class Launch(NamedTuple):
    """One piece of device work in a profile: a kernel, a copy or a fill."""

    name: str
    seconds: float
    details: dict


class Stopwatch:
    """Measures calls on one device.

    Args:
        device: where the calls put their work.
        seconds: roughly how long each contender of a comparison is run for.
    """

    def __init__(self, device: torch.device, seconds: float = 0.05):
        self.device, self.seconds, self.on_gpu = device, seconds, device.type == "cuda"
        self.least_rounds = 7 if self.on_gpu else 2
        # Three times the L2, as caches do not drop what is oldest first.
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
        rows = 8192 if self.on_gpu else 1  # enough for a block each: no second step, so one kernel
        self.other_data = torch.ones(rows, max(128 << 20, 3 * l2) // 4 // 8192, device=device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _empty_l2(self) -> None:
        # By reading: lines that are written here would have to be written back in the time of what is measured.
        self.other_data.amin(1)

    def device_times(self, contenders: Mapping[str, Timed]) -> dict[str, Spread]:
        """Seconds on the device, from a cold L2; the contenders take turns."""
        rounds, queueing = {}, {}
        for name, contender in contenders.items():
            start = perf_counter()
            state = contender.prepare()
            self.synchronize()
            before = perf_counter()
            contender.run(state)
            queueing[name] = perf_counter() - before
            self.synchronize()
            cost = perf_counter() - start + queueing[name] + 5e-4
            rounds[name] = max(self.least_rounds, min(MAX_ROUNDS, int(self.seconds / cost)))
        seconds = {name: [] for name in contenders}
        for turn in range(max(rounds.values(), default=0)):
            for name, contender in contenders.items():
                if turn < rounds[name]:
                    seconds[name].append(self._device_time(contender, queueing[name]))
        return {name: Spread.of(found) for name, found in seconds.items()}

    def _device_time(self, contender: Timed, queueing: float) -> float:
        state = contender.prepare()
        self._empty_l2()
        if not self.on_gpu:
            before = perf_counter()
            contender.run(state)
            return perf_counter() - before
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits (2 GHz) until all work is queued: it is to be timed, not the calls that queue it.
        torch.cuda._sleep(int(2e9 * 1.5 * queueing) + 20_000)
        start.record()
        contender.run(state)
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall_times(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, Spread]:
        """Seconds per call on the host's clock, of many calls one after the other; the contenders take turns."""
        calls = {}
        for name, run in contenders.items():
            run()
            self.synchronize()
            start = perf_counter()
            run()
            self.synchronize()
            calls[name] = max(1, min(500, int(self.seconds / self.least_rounds / (perf_counter() - start))))
        seconds = {name: [] for name in contenders}
        for _ in range(self.least_rounds):
            for name, run in contenders.items():
                start = perf_counter()
                for _ in range(calls[name]):
                    run()
                self.synchronize()
                seconds[name].append((perf_counter() - start) / calls[name])
        return {name: Spread.of(found) for name, found in seconds.items()}

    def copy_bandwidth(self, size: int = 2 << 30) -> float:
        """Bytes per second, read and written, of a copy of ``size`` bytes; by default far larger than any cache."""
        source = torch.ones(size if self.on_gpu else 1 << 24, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * source.nbytes / self.device_times({"copy": Timed(lambda _: target.copy_(source))})["copy"].median

    @lru_cache  # noqa: B019 (there is one stopwatch in a process)
    def copy_seconds(self, moved: int) -> float | None:
        """Of a copy that moves so many bytes, half of them read, as a profile sees it: without its launch."""
        source = torch.ones(max(1, moved // 2), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        calls = self.launches(lambda: target.copy_(source), rounds=11)
        return median(sum(launch.seconds for launch in call) for call in calls) if calls else None

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """The most memory that a call held at once, beyond what was held before; None on the CPU."""
        if not self.on_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def graph(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """The replay of a call captured in a CUDA graph; None on the CPU."""
        if not self.on_gpu:
            return None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def launches(self, run: Callable[[], object], rounds: int) -> list[list[Launch]]:
        """The device work of each of some calls, from a cold L2; nothing where the profiler sees none."""
        run()
        return calls_in(self._device_work(run, rounds), self._emptying())

    @lru_cache  # noqa: B019
    def _emptying(self) -> frozenset[str]:
        """The names of the kernels that empty the L2."""
        return frozenset(launch.name for launch in self._device_work(lambda: None, rounds=1))

    def _device_work(self, run: Callable[[], object], rounds: int) -> list[Launch]:
        self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            with self._profile() as recorded:
                for _ in range(rounds):
                    self._empty_l2()
                    run()
                    self.synchronize()
            recorded.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        work = sorted((event for event in events if event.get("cat") in DEVICE_WORK), key=lambda event: event["ts"])
        return [Launch(event["name"], event["dur"] / 1e6, event.get("args", {})) for event in work]

    def _profile(self) -> AbstractContextManager:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        return profile(activities=activities)


def calls_in(work: list[Launch], emptying: Set[str]) -> list[list[Launch]]:
    """Cut device work into calls, each of which follows what empties the L2."""
    calls: list[list[Launch]] = []
    between = True
    for launch in work:
        if launch.name in emptying:
            between = True
            continue
        if between:
            calls.append([])
            between = False
        calls[-1].append(launch)
    return calls
