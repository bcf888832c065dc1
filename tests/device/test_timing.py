"""Timers and benchmarks. What they say is held against numbers of the test's own making, never against a clock."""

from __future__ import annotations

import itertools

import pytest
import torch

import halfbyte
from halfbyte.device import timing
from halfbyte.device.timing import Benchmarker, CUDATimer, Timer, Timing, profile_scope
from halfbyte.errors import ConfigError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, one after the other."""
    shown: list[float] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: shown.pop(0))
    return shown


def test_a_timer_measures_between_start_and_stop(clock: list[float]) -> None:
    clock += [1.0, 3.5, 10.0, 10.25]
    with Timer("cpu") as timer:
        pass
    assert timer.seconds == 2.5
    timer.start()
    with pytest.raises(ConfigError, match="has no time yet"):
        _ = timer.seconds
    timer.stop()
    assert timer.seconds == 0.25


def test_a_timer_stops_whatever_happens_inside(clock: list[float]) -> None:
    clock += [1.0, 2.0]
    timer = Timer("cpu")
    with pytest.raises(ZeroDivisionError), timer:
        _ = 1 / 0
    assert timer.seconds == 1.0


def test_a_timer_that_was_not_started_says_so() -> None:
    with pytest.raises(ConfigError, match="without having been started"):
        Timer("cpu").stop()
    with pytest.raises(ConfigError, match='expected "auto", "cpu"'):
        Timer("toaster")
    with pytest.raises(ConfigError, match=r"CUDATimer: expected a CUDA device, got cpu"):
        CUDATimer("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_timer_says_so() -> None:
    with pytest.raises(ConfigError, match="this machine has 0 CUDA devices"):
        CUDATimer()


def test_iterations_are_counted_and_the_warm_up_is_not(clock: list[float]) -> None:
    calls = itertools.count()
    clock += [0, 1, 10, 13, 20, 22]  # 1, 3 and 2 seconds
    benchmarker = Benchmarker(3, 4, device="cpu", flush_cache=False)
    result = benchmarker.benchmark_function(lambda: next(calls), "counting")
    assert next(calls) == 7
    assert result == Timing("counting", (1, 3, 2))
    assert (result.median, result.quartiles) == (2, (1.5, 2.5))
    assert benchmarker.results == [result]


def test_the_caches_are_flushed_before_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 12)
    monkeypatch.setattr(timing.BandwidthProbe, "take", lambda self: seen.append("flush"))
    Benchmarker(2, 1, device="cpu").benchmark_function(lambda: seen.append("call"))
    assert seen == ["call", "flush", "call", "flush", "call"]


def test_the_table_compares_with_the_first(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    clock += [0, 0.002, 0, 0.0005]
    benchmarker = Benchmarker(1, 0, device="cpu", flush_cache=False)
    benchmarker.benchmark_function(lambda: None, "slow")
    benchmarker.benchmark_function(lambda: None, "<fast>")
    benchmarker.print_results()
    head, slow, fast = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["function", "median", "µs"]
    assert slow.split() == ["slow", "2,000.0", "2,000.0–2,000.0", "2,000.0", "1", "1.00", "×"]
    assert fast.split()[-2:] == ["4.00", "×"]
    assert len({len(line) for line in (head, slow, fast)}) == 1
    assert "&lt;fast&gt;" in benchmarker._repr_html_()


@pytest.mark.parametrize(("iterations", "warmup"), [(0, 1), (1, -1), (10**7, 0)])
def test_numbers_out_of_range_are_refused(iterations: int, warmup: int) -> None:
    with pytest.raises(ConfigError, match=r"expected \d to 1,000,000"):
        Benchmarker(iterations, warmup, device="cpu")


def test_a_scope_has_a_time_and_a_name_in_traces() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace, profile_scope("one of mine", "cpu") as scope:
        torch.ones(4).sum()
    assert scope.seconds > 0
    assert "one of mine" in {event.key for event in trace.key_averages()}


def test_they_are_part_of_the_public_api() -> None:
    assert halfbyte.Benchmarker is Benchmarker
    assert halfbyte.Timer is Timer
    assert halfbyte.CUDATimer is CUDATimer
    assert halfbyte.profile_scope is profile_scope


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    benchmarker = Benchmarker(5, 2, device="cuda")
    one = benchmarker.benchmark_function(lambda: x @ x, "one")
    four = benchmarker.benchmark_function(lambda: (x @ x, x @ x, x @ x, x @ x), "four")
    # Handing work over takes as long for a large product as for a small one; only the GPU's own clock sees four times.
    assert 2 < four.median / one.median < 8
