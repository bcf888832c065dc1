"""GPUs as their maker describes them, and how much of one a kernel can keep busy; no GPU is looked at.

Limits of a streaming multiprocessor (SM): CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability". Granularities: registers go to warps in units of 256, and to warps of four schedulers from a quarter each;
shared memory in units of 128 bytes (256 before sm_80), of which the system keeps 1 KiB a block from sm_80 on (CUDA
Occupancy Calculator). The rest of a GPU: its data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.errors import ConfigError

WARP = 32
REGISTER_UNIT = 256
SCHEDULERS = 4
SHARED_UNIT, SHARED_RESERVED = 128, 1024
BLOCK_THREADS = 1024
THREAD_REGISTERS = 255
# Shared memory has 32 banks, each of which gives 4 bytes a clock.
SHARED_BYTES_PER_CLOCK = 128


@dataclass(frozen=True)
class Gpu:
    """One GPU of each architecture.

    Attributes:
        name: of the product.
        architecture: "sm_80" and so on.
        registers: 32-bit registers of an SM.
        shared: bytes of shared memory of an SM that kernels can have.
        block_shared: bytes of it that one block can have.
        warps: resident at most on an SM.
        blocks: likewise.
        sms: SMs of this product.
        l2: bytes of second-level cache.
        bandwidth: bytes per second from memory.
        shared_unit: bytes that shared memory is given out in.
        shared_reserved: bytes of it that the system takes of each block.
    """

    name: str
    architecture: str
    registers: int
    shared: int
    block_shared: int
    warps: int
    blocks: int
    sms: int
    l2: int
    bandwidth: float
    shared_unit: int = SHARED_UNIT
    shared_reserved: int = SHARED_RESERVED


KIB, MIB = 1 << 10, 1 << 20
GPUS = (
    Gpu("T4", "sm_75", 65536, 64 * KIB, 64 * KIB, 32, 16, 40, 4 * MIB, 320e9, 256, 0),
    Gpu("A100 SXM 80 GB", "sm_80", 65536, 164 * KIB, 163 * KIB, 64, 32, 108, 40 * MIB, 2039e9),
    Gpu("RTX 3090", "sm_86", 65536, 100 * KIB, 99 * KIB, 48, 16, 82, 6 * MIB, 936e9),
    Gpu("Jetson AGX Orin 64 GB", "sm_87", 65536, 164 * KIB, 163 * KIB, 48, 16, 16, 4 * MIB, 204.8e9),
    Gpu("RTX 4090", "sm_89", 65536, 100 * KIB, 99 * KIB, 48, 24, 128, 72 * MIB, 1008e9),
    Gpu("H100 SXM", "sm_90", 65536, 228 * KIB, 227 * KIB, 64, 32, 132, 50 * MIB, 3352e9),
    Gpu("B200", "sm_100", 65536, 228 * KIB, 227 * KIB, 64, 32, 148, 126 * MIB, 8000e9),
    Gpu("RTX 5090", "sm_120", 65536, 100 * KIB, 99 * KIB, 48, 24, 170, 96 * MIB, 1792e9),
)


def known_gpu(architecture: str) -> Gpu:
    """The GPU that stands for an architecture, such as "sm_90" (or "sm_90a", "90", "9.0").

    Raises:
        ConfigError: its facts are not known here.
    """
    wanted = "sm_" + architecture.lower().removeprefix("sm_").replace(".", "").rstrip("af")
    for gpu in GPUS:
        if gpu.architecture == wanted:
            return gpu
    known = ", ".join(gpu.architecture for gpu in GPUS)
    raise ConfigError(f"architecture {architecture}: its limits are not known here; known are {known}")


@dataclass(frozen=True)
class Occupancy:
    """What of a kernel is resident on one SM.

    Attributes:
        blocks: resident blocks; 0 if not even one fits.
        share: of the warps that could be resident.
        limits: what allows no further block: "warps", "registers", "shared memory" or "blocks".
    """

    blocks: int
    share: float
    limits: tuple[str, ...]


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> Occupancy:
    """Resident blocks of a kernel.

    Args:
        gpu: with its limits.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block.
    """
    warps = -(-threads // WARP)
    # Registers go to warps, and a scheduler has a quarter of them for its own.
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    held = gpu.registers // SCHEDULERS // of_warp * SCHEDULERS
    of_block = -(-(shared + gpu.shared_reserved) // gpu.shared_unit) * gpu.shared_unit
    room = {
        "warps": gpu.warps // warps,
        "registers": held // warps,
        "shared memory": 0 if shared > gpu.block_shared else gpu.shared // of_block if of_block else gpu.blocks,
        "blocks": gpu.blocks,
    }
    blocks = min(room.values())
    return Occupancy(blocks, blocks * warps / gpu.warps, tuple(name for name, most in room.items() if most == blocks))
