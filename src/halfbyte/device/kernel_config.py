"""What a launch of a CUDA kernel does to a GPU: blocks, warps, waves, occupancy; arithmetic on public facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from halfbyte.device.gpu_facts import BLOCK_THREADS, THREAD_REGISTERS, WARP, Gpu, Occupancy, occupancy
from halfbyte.errors import ConfigError

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)
# As many as never limit: 64 warps of 32 threads share 65,536.
DEFAULT_REGISTERS = 32
_FORM = '"GRID;BLOCK", such as "128,4,1;256,1,1" or "128;256;registers=96;shared=49152"'


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel is launched.

    Attributes:
        grid: blocks along x, y, z.
        block: threads along x, y, z.
        registers: 32-bit registers of a thread.
        shared: bytes of shared memory of a block, static and dynamic.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    registers: int = DEFAULT_REGISTERS
    shared: int = 0


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch does on a GPU.

    Attributes:
        gpu: the GPU.
        config: the launch.
        blocks: in the grid.
        threads: of a block.
        warps: of a block.
        idle_lanes: of a block's last warp, without a thread.
        occupancy: of an SM.
        wave_blocks: that the whole GPU holds at a time.
        waves: of blocks; the last one may not fill the GPU.
        last_wave_blocks: in the last wave.
    """

    gpu: Gpu
    config: KernelConfig
    blocks: int
    threads: int
    warps: int
    idle_lanes: int
    occupancy: Occupancy
    wave_blocks: int
    waves: int
    last_wave_blocks: int

    @property
    def last_wave_share(self) -> float:
        """Of the GPU's places for blocks that the last wave fills."""
        return self.last_wave_blocks / self.wave_blocks

    @property
    def efficiency(self) -> float:
        """Share of all waves' places that have a block: what the last wave costs, if blocks take equal time."""
        return self.blocks / (self.waves * self.wave_blocks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        derived = {"last_wave_share": self.last_wave_share, "efficiency": self.efficiency}
        return {**asdict(self), **derived}


def parse_kernel_config(text: str) -> KernelConfig:
    """Read "128,4,1;256,1,1", with ";registers=96" and ";shared=49152" behind it if they are known.

    Raises:
        ConfigError: not of that form.
    """
    grid, block, *others = [*text.split(";"), ""] if ";" not in text else text.split(";")
    settings = {}
    for other in filter(None, map(str.strip, others)):
        name, _, value = (part.strip() for part in other.partition("="))
        if name not in ("registers", "shared") or not value.isdecimal():
            raise ConfigError(f"kernel config {other!r}: expected registers=NUMBER or shared=BYTES")
        settings[name] = int(value)
    return KernelConfig(_three(grid, "grid"), _three(block, "block"), **settings)


def _three(text: str, name: str) -> tuple[int, int, int]:
    parts = [part.strip() for part in text.split(",")]
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(f"kernel config: the {name} {text.strip()!r} is not 1 to 3 whole numbers; expected {_FORM}")
    x, y, z = [*map(int, parts), 1, 1][:3]
    return x, y, z


def plan_launch(gpu: Gpu, config: KernelConfig) -> LaunchPlan:
    """What a launch does on a GPU.

    Raises:
        ConfigError: CUDA would refuse it; says which limit it is over.
    """
    threads = prod(config.block)
    _check(gpu, config, threads)
    found = occupancy(gpu, threads, config.registers, config.shared)
    if not found.blocks:  # what else there is to run out of was checked
        raise ConfigError(
            f"kernel config: {threads} threads of {config.registers} registers are more than the "
            f"{gpu.registers:,} registers of an SM ({gpu.architecture}); use fewer threads or registers"
        )
    blocks, wave_blocks = prod(config.grid), found.blocks * gpu.sms
    waves = -(-blocks // wave_blocks)
    warps = -(-threads // WARP)
    return LaunchPlan(
        gpu=gpu,
        config=config,
        blocks=blocks,
        threads=threads,
        warps=warps,
        idle_lanes=warps * WARP - threads,
        occupancy=found,
        wave_blocks=wave_blocks,
        waves=waves,
        last_wave_blocks=blocks - (waves - 1) * wave_blocks,
    )


def _check(gpu: Gpu, config: KernelConfig, threads: int) -> None:
    for name, sizes, limits in (("grid", config.grid, _GRID_LIMITS), ("block", config.block, _BLOCK_LIMITS)):
        for axis, size, limit in zip("xyz", sizes, limits, strict=True):
            if size > limit:
                raise ConfigError(f"kernel config: {name} {axis} is {size:,}; CUDA allows at most {limit:,}")
    if threads > BLOCK_THREADS:
        shape = " × ".join(map(str, config.block))
        raise ConfigError(
            f"kernel config: a block of {shape} has {threads:,} threads; CUDA allows at most {BLOCK_THREADS:,}"
        )
    if not 1 <= config.registers <= THREAD_REGISTERS:
        raise ConfigError(f"kernel config: registers={config.registers}: a thread has 1 to {THREAD_REGISTERS}")
    if config.shared > gpu.block_shared:
        raise ConfigError(
            f"kernel config: shared={config.shared}: a block of {gpu.architecture} has at most "
            f"{gpu.block_shared:,} bytes of shared memory"
        )
