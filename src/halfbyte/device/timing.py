"""Timing that is right on a CPU and on a GPU: spread and all, from memory and not from a cache.

    benchmarker = Benchmarker(num_iterations=50)
    benchmarker.benchmark_function(lambda: x @ w, "bf16")
    benchmarker.benchmark_function(lambda: linear(x), "int4")
    benchmarker.print_results()

A GPU works on its own: a clock on the CPU shows when work was handed over, not when it was done. Events on the GPU's
stream show the latter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from halfbyte.device.cpu import BandwidthProbe
from halfbyte.device.torch_device import pick_device
from halfbyte.device.torch_probe import last_level_cache
from halfbyte.errors import ConfigError
from halfbyte.notebook import html_table

_MOST = 1_000_000


class Timer:
    """Seconds between two places, as a context manager or by `start` and `stop`.

    On a GPU the time is that between two events on its current stream; reading `seconds` waits for the second.
    """

    def __init__(self, device: str | torch.device = "auto"):
        """Choose the clock.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N", or a torch device; others (mps, xpu) are waited for at both ends.

        Raises:
            ConfigError: no such device.
        """
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        self._begin: Any = None
        self._end: Any = None

    def start(self) -> None:
        """Begin, or begin again."""
        self._begin, self._end = self._now(), None

    def stop(self) -> None:
        """End.

        Raises:
            ConfigError: it was not started.
        """
        if self._begin is None:
            raise ConfigError("timer: stopped without having been started")
        self._end = self._now()

    @property
    def seconds(self) -> float:
        """Between `start` and `stop`.

        Raises:
            ConfigError: it was not stopped.
        """
        if self._end is None:
            raise ConfigError("timer: has no time yet; start and stop it")
        if self.device.type != "cuda":
            return float(self._end - self._begin)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3

    def __enter__(self) -> Timer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


class CUDATimer(Timer):
    """A `Timer` on a GPU."""

    def __init__(self, device: str | torch.device = "cuda"):
        """Choose the GPU.

        Args:
            device: "cuda" or "cuda:N", or a torch device.

        Raises:
            ConfigError: no GPU, or no such one.
        """
        super().__init__(device)
        if self.device.type != "cuda":
            raise ConfigError(f"CUDATimer: expected a CUDA device, got {self.device}")


@dataclass(frozen=True)
class Timing:
    """How long one function took.

    Attributes:
        name: as given.
        seconds: of each iteration, in order.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds that a quarter and three quarters of the iterations did not exceed."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "median": self.median,
            "quartiles": self.quartiles,
            "best": min(self.seconds),
            "iterations": len(self.seconds),
        }


class Benchmarker:
    """Times functions one after the other, with the caches flushed between iterations.

    Attributes:
        results: of what was timed, in order.
    """

    def __init__(
        self,
        num_iterations: int = 100,
        warmup: int = 10,
        *,
        device: str | torch.device = "auto",
        flush_cache: bool = True,
    ):
        """Prepare.

        Args:
            num_iterations: that count, of each function.
            warmup: that do not, before them.
            device: that the functions work on.
            flush_cache: read or write twice the last-level cache before each iteration, so that what a function reads
                comes from memory, as in a model whose layers take turns.

        Raises:
            ConfigError: a number out of range, or no such device.
        """
        for name, value, least in (("num_iterations", num_iterations, 1), ("warmup", warmup, 0)):
            if not least <= value <= _MOST:
                raise ConfigError(f"{name}: expected {least} to {_MOST:,}, got {value}")
        self._timer = Timer(device)
        self._iterations, self._warmup = num_iterations, warmup
        self._flush = _flusher(self._timer.device) if flush_cache else None
        self.results: list[Timing] = []

    @property
    def device(self) -> torch.device:
        """That is timed."""
        return self._timer.device

    def benchmark_function(self, function: Callable[[], object], name: str | None = None) -> Timing:
        """Time a function without arguments; its result is dropped.

        Args:
            function: what to call.
            name: in the table; its own name if None.
        """
        for _ in range(self._warmup):
            function()
        seconds = []
        for _ in range(self._iterations):
            if self._flush is not None:
                self._flush()
            with self._timer:
                function()
            seconds.append(self._timer.seconds)
        timing = Timing(name or str(getattr(function, "__name__", "function")), tuple(seconds))
        self.results.append(timing)
        return timing

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: times in microseconds, and how many times as fast as the first."""
        columns = ["function", "median µs", "quartiles", "best", "iterations", "speed"]
        rows = []
        for result in self.results:
            low, high = result.quartiles
            times = [f"{1e6 * value:,.1f}" for value in (result.median, low, high, min(result.seconds))]
            speed = self.results[0].median / result.median if result.median else float("inf")
            rows.append(
                [result.name, times[0], f"{times[1]}–{times[2]}", times[3], f"{len(result.seconds)}", f"{speed:.2f} ×"]
            )
        return columns, rows

    def print_results(self) -> None:
        """Print the table."""
        print(self)

    def __str__(self) -> str:
        columns, rows = self.table()
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        lines = []
        for cells in (columns, *rows):
            first, *rest = (
                f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            lines.append("  ".join([first, *rest]))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(*self.table(), title=f"on {self.device}")


def _flusher(device: torch.device) -> Callable[[], object]:
    """What pushes everything else out of the caches."""
    size = 2 * last_level_cache(device)
    if device.type == "cpu":
        return BandwidthProbe(size).take
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


@contextmanager
def profile_scope(name: str, device: str | torch.device = "auto") -> Iterator[Timer]:
    """Time a block of code and give it a name in traces: torch.profiler's, and on a GPU Nsight's (NVTX).

    Args:
        name: in the traces.
        device: that works.

    Yields:
        The timer, whose `seconds` can be read behind the block.

    Raises:
        ConfigError: no such device.
    """
    timer = Timer(device)
    on_gpu = timer.device.type == "cuda"
    if on_gpu:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
    try:
        with torch.profiler.record_function(name), timer:
            yield timer
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
