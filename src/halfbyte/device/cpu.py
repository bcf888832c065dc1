"""What the CPU is, which of its cores are ours, and what it can do at most."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from halfbyte.errors import ConfigError, UnsupportedError

_VECTOR_FLAGS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "i8mm", "bf16")


@dataclass(frozen=True)
class CpuInfo:
    """A snapshot.

    Attributes:
        model: as the system names it.
        tiers: instruction-set tiers of the native core that run here, fastest first.
        flags: the vector and matrix extensions the system reports.
        cache_bytes: size of each cache one core sees, such as {"L1d": 32768, "L2": 524288}; empty if unknown.
        logical_cores: of the machine.
        physical_cores: of the machine.
        usable_cores: physical cores within this process's affinity and cgroup quota: the default thread count.
        memory_bytes: installed.
    """

    model: str
    tiers: tuple[str, ...]
    flags: tuple[str, ...]
    cache_bytes: dict[str, int]
    logical_cores: int
    physical_cores: int
    usable_cores: int
    memory_bytes: int


def cpu_info() -> CpuInfo:
    """Ask the system."""
    import psutil

    from halfbyte import _native

    return CpuInfo(
        model=_model_name(),
        tiers=tuple(_native.available_tiers()),
        flags=tuple(sorted(flag for flag in _flags() if flag.startswith(_VECTOR_FLAGS))),
        cache_bytes=cache_sizes(Path("/sys/devices/system/cpu/cpu0/cache")),
        logical_cores=os.cpu_count() or 1,
        physical_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
    )


def pick_tier() -> str:
    """The instruction-set tier to use: `HALFBYTE_ISA` if set, else the fastest this CPU has.

    Raises:
        UnsupportedError: `HALFBYTE_ISA` names no tier, or one this CPU lacks.
    """
    return _tier(os.environ.get("HALFBYTE_ISA"))


@cache
def _tier(forced: str | None) -> str:
    from halfbyte import _native

    available = _native.available_tiers()
    if not forced:
        return available[0]
    if forced not in _native.known_tiers():
        raise UnsupportedError(f"HALFBYTE_ISA={forced}: no such tier; known are {', '.join(_native.known_tiers())}")
    if forced not in available:
        raise UnsupportedError(f"HALFBYTE_ISA={forced}: this CPU lacks it; it has {', '.join(available)}")
    return forced


MOST_THREADS = 1024
# What `use_threads` was told last.
_chosen: int | None = None


def use_threads(count: int) -> None:
    """Let this process compute with so many threads from now on, the native core and torch.

    Raises:
        ConfigError: not from 1 to 1,024.
    """
    import torch

    from halfbyte import _native

    global _chosen
    if not 1 <= count <= MOST_THREADS:
        raise ConfigError(f"threads: expected 1 to {MOST_THREADS}, got {count}")
    _chosen = count
    _native.set_threads(count)
    torch.set_num_threads(count)


def thread_count() -> int:
    """What `use_threads` was told, else `HALFBYTE_THREADS` if set, else `usable_cores`.

    Raises:
        ConfigError: `HALFBYTE_THREADS` is no number from 1 to 1,024.
    """
    if _chosen is not None:
        return _chosen
    forced = os.environ.get("HALFBYTE_THREADS")
    if not forced:
        return usable_cores()
    if not forced.isdecimal() or not 1 <= int(forced) <= MOST_THREADS:
        raise ConfigError(f"HALFBYTE_THREADS={forced}: expected a number from 1 to {MOST_THREADS}")
    return int(forced)


def usable_cores() -> int:
    """Physical cores within affinity and cgroup quota, at least 1.

    Two hardware threads of a core share the units a matrix product is bound by, so they count once.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    quota = cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _siblings(cpu: int) -> str:
    """A name for the physical core a logical CPU belongs to."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cgroup_quota(root: Path) -> float | None:
    """CPUs the control group at `root` may use at a time, version 2 or 1; None if unlimited."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def has_bf16_arithmetic() -> bool:
    """Whether the CPU multiplies bf16 numbers itself (AVX512-BF16, AMX-BF16, or Arm's BF16 extension)."""
    return bool(_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Cache:
    """A data or unified cache of a core.

    Attributes:
        name: "L1d", "L2" and so on.
        nbytes: its size.
        cores: physical cores that share it, 1 where the system does not say.
    """

    name: str
    nbytes: int
    cores: int


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[Cache]:
    """The data and unified caches described in `folder`, sysfs's `cache` of one CPU, nearest first."""
    found: list[Cache] = []
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                nbytes = int(size.rstrip("KMG")) * units.get(size[-1], 1)
                found.append(Cache(f"L{level}" + ("d" if kind == "Data" else ""), nbytes, _sharing_cores(index)))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _sharing_cores(index: Path) -> int:
    try:
        ranges = [part.split("-") for part in (index / "shared_cpu_list").read_text().strip().split(",")]
        return len({_siblings(cpu) for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)})
    except (OSError, ValueError):
        return 1


def cache_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each cache of `caches`, by name."""
    return {cache.name: cache.nbytes for cache in caches(folder)}


def _flags() -> set[str]:
    return set(_cpuinfo("flags", "Features").split())


def _model_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The first value of any of the keys in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in keys), "")


@contextmanager
def native_threads(threads: int) -> Iterator[None]:
    """Let the native core work with so many threads, and afterwards with as many as before.

    Raises:
        ConfigError: fewer than one.
    """
    from halfbyte import _native

    if threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}")
    before = _native.threads()
    _native.set_threads(threads)
    try:
        yield
    finally:
        _native.set_threads(before)


class BandwidthProbe:
    """Measures reading a buffer of a given size beside whatever is to be held against it.

    Passes are as noisy as what they stand beside, so it takes turns with them, and both are medians.
    """

    def __init__(self, nbytes: int):
        """Allocate and fill the buffer, placed as weights are."""
        from halfbyte import _native

        self._native = _native.ReadProbe(nbytes, pick_tier())
        self._seconds: list[float] = []

    def take(self) -> None:
        """Read it twice with the threads there are now, the first time to find it in the caches it fits, if any."""
        self._native.seconds()
        self._seconds.append(self._native.seconds())

    @property
    def bandwidth(self) -> float:
        """Bytes per second the threads together read; the median of the passes."""
        return self._native.nbytes / statistics.median(self._seconds)


def read_bandwidth(nbytes: int, *, repeats: int = 7, threads: int | None = None) -> float:
    """Bytes per second the threads together read from a buffer of `nbytes`, median of `repeats` passes."""
    probe = BandwidthProbe(nbytes)
    with native_threads(threads or thread_count()):
        for _ in range(repeats):
            probe.take()
    return probe.bandwidth


def peak_flops(*, threads: int | None = None) -> float:
    """float32 operations per second the threads together reach in a loop of nothing but fused multiply-adds."""
    return cast(float, measured_peak("fp32", threads=threads))  # every tier has them


def measured_peak(kind: str, *, threads: int | None = None) -> float | None:
    """Operations per second the threads together reach in a loop of nothing but multiply-adds, each of which is two.

    Args:
        kind: "fp32"; "int8" for products of bytes, summed as halfbyte's own kernels sum them; "bf16" for products of
            bf16 numbers summed in fp32.
        threads: `thread_count` if None.

    Returns:
        None where the tier in use, or this CPU, has no instruction for it.
    """
    from halfbyte import _native

    with native_threads(threads or thread_count()):
        return _native.measure_peak(kind, pick_tier())


def private_read_bandwidth(nbytes: int, *, threads: int | None = None, seconds: float = 0.01) -> float:
    """Bytes per second the threads together read, each over and over from `nbytes` of its own.

    From the second pass on a buffer is in the cache that it fits. The best of three times, each of at least `seconds`.
    """
    from halfbyte import _native

    with native_threads(threads or thread_count()):
        return _native.measure_read(nbytes, pick_tier(), seconds)
