"""Where data can be, from registers to memory: how much fits, and how fast it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.device.cpu import (
    Cache,
    caches,
    cpu_info,
    peak_flops,
    pick_tier,
    private_read_bandwidth,
    thread_count,
)
from halfbyte.device.gpu_facts import SHARED_BYTES_PER_CLOCK, Gpu
from halfbyte.device.snapshot import binary, decimal, plural

# Bytes of a core's vector registers: how many times how wide.
_VECTOR_REGISTERS = {
    "avx2": (16, 32),
    "avx_vnni": (16, 32),
    "avx512_vnni": (32, 64),
    "amx": (32, 64),
    "neon": (32, 16),
}
_LEAST_MEMORY, _MOST_MEMORY = 32 << 20, 1 << 30


@dataclass(frozen=True)
class Level:
    """One place where data can be.

    Attributes:
        name: such as "L2".
        nbytes: of one of them.
        owner: what has one: "core", "3 cores", "machine", "SM", "GPU".
        total: bytes of all of them together; None where it is not known how many there are.
        buffer: bytes that each thread read over and over to measure it; None if it was not measured so.
        one: bytes per second that one thread reads; None if not measured.
        together: likewise, of all threads, or of the whole GPU.
        note: where the numbers are from, if not from reading a buffer.
    """

    name: str
    nbytes: int
    owner: str
    total: int | None = None
    buffer: int | None = None
    one: float | None = None
    together: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Hierarchy:
    """The levels of a device, nearest to the arithmetic first.

    Attributes:
        device: its name.
        source: where the numbers are from.
        threads: that read together; None of a GPU.
        levels: nearest first.
    """

    device: str
    source: str
    threads: int | None
    levels: tuple[Level, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def cpu_hierarchy() -> Hierarchy:
    """Registers, caches and memory of the CPU, each read by one thread and by all of them, in about a second.

    A level is read through a buffer of half the thread's share of it, more than the level before.
    """
    info, tier, threads, found = cpu_info(), pick_tier(), thread_count(), caches()
    levels = []
    if tier in _VECTOR_REGISTERS:
        count, width = _VECTOR_REGISTERS[tier]
        # A multiply-add reads three operands of four bytes, and counts as two operations.
        one, together = (6 * peak_flops(threads=number) for number in (1, threads))
        note = f"{count} of {width} bytes; as the multiply-adds of fp32 read their three operands"
        levels.append(
            Level("registers", count * width, "core", count * width * info.physical_cores, None, one, together, note)
        )
    before = 0
    for cache in found:
        total = cache.nbytes * -(-info.physical_cores // cache.cores)
        owner = "core" if cache.cores == 1 else plural(cache.cores, "core")
        levels.append(_measured(Level(cache.name, cache.nbytes, owner, total), before, cache.cores, threads))
        before = cache.nbytes
    levels.append(_memory(info.memory_bytes, found, threads))
    return Hierarchy(info.model, f"measured here, tier {tier}", threads, tuple(levels))


def _measured(level: Level, before: int, cores: int, threads: int) -> Level:
    shared_by = min(cores, threads)
    alone, share = before + level.nbytes // 2, before + level.nbytes // (2 * shared_by)
    return _read(level, alone, share, threads)


def _memory(nbytes: int, found: list[Cache], threads: int) -> Level:
    import psutil

    last = found[-1] if found else Cache("", _LEAST_MEMORY // 4, 1)
    most = min(_MOST_MEMORY, psutil.virtual_memory().available // 4)
    alone = min(max(4 * last.nbytes, _LEAST_MEMORY), most)
    share = min(max(4 * last.nbytes // min(last.cores, threads), _LEAST_MEMORY // threads), most // threads)
    return _read(Level("memory", nbytes, "machine", nbytes), alone, share, threads)


def _read(level: Level, alone: int, share: int, threads: int) -> Level:
    one = private_read_bandwidth(alone, threads=1)
    together = one if threads == 1 else private_read_bandwidth(share, threads=threads)
    return Level(level.name, level.nbytes, level.owner, level.total, share, one, together)


def gpu_hierarchy(gpu: Gpu, *, measured: bool) -> Hierarchy:
    """Registers, shared memory, L2 and memory of a GPU, from its facts.

    Args:
        gpu: of `known_gpu`, or of `found_gpu`.
        measured: whether its bandwidth is that of a copy made here.
    """
    shared_note = (
        f"32 banks of 4 bytes: {SHARED_BYTES_PER_CLOCK} bytes a clock and SM, "
        f"{SHARED_BYTES_PER_CLOCK * gpu.sms:,} together; "
        f"a block has {binary(gpu.block_shared)} at most"
    )
    levels = (
        Level("registers", 4 * gpu.registers, "SM", 4 * gpu.registers * gpu.sms, note=f"{gpu.registers:,} of 4 bytes"),
        Level("shared memory", gpu.shared, "SM", gpu.shared * gpu.sms, note=shared_note),
        Level("L2", gpu.l2, "GPU", gpu.l2),
        Level(
            "memory",
            0,
            "GPU",
            None,
            together=gpu.bandwidth,
            note="a copy, reads and writes" if measured else "data sheet",
        ),
    )
    source = (
        "its facts, and a copy measured here" if measured else "data sheet and programming guide; nothing was measured"
    )
    return Hierarchy(f"{gpu.name} ({gpu.architecture}, {gpu.sms} SMs)", source, None, levels)


def describe(level: Level) -> str:
    """Size and owner of a level: "512 KiB a core"."""
    if not level.nbytes:
        return ""
    size = f"{decimal(level.nbytes)}B" if level.name == "memory" else binary(level.nbytes)
    return size if level.owner in ("machine", "GPU") else f"{size} per {level.owner}"
