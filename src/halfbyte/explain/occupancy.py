"""How much of a GPU a kernel can keep busy, from public facts; no GPU is looked at.

Limits of a streaming multiprocessor (SM): CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability". Granularities: registers go to warps in units of 256, and to warps of four schedulers from a quarter each;
shared memory in units of 128 bytes, of which the system keeps 1 KiB a block (CUDA Occupancy Calculator). The rest of a
GPU: its data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTER_UNIT = 256
SCHEDULERS = 4
SHARED_UNIT, SHARED_RESERVED = 128, 1024


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
        flops: per second, dense fp16 products on tensor cores summed in fp32.
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
    flops: float


KIB, MIB = 1 << 10, 1 << 20
GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 65536, 164 * KIB, 163 * KIB, 64, 32, 108, 40 * MIB, 2039e9, 312e12),
    Gpu("RTX 3090", "sm_86", 65536, 100 * KIB, 99 * KIB, 48, 16, 82, 6 * MIB, 936e9, 71e12),
    Gpu("RTX 4090", "sm_89", 65536, 100 * KIB, 99 * KIB, 48, 24, 128, 72 * MIB, 1008e9, 165e12),
    Gpu("H100 SXM", "sm_90", 65536, 228 * KIB, 227 * KIB, 64, 32, 132, 50 * MIB, 3352e9, 989e12),
)


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
    of_block = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    room = {
        "warps": gpu.warps // warps,
        "registers": held // warps,
        "shared memory": gpu.shared // of_block if shared <= gpu.block_shared else 0,
        "blocks": gpu.blocks,
    }
    blocks = min(room.values())
    return Occupancy(blocks, blocks * warps / gpu.warps, tuple(name for name, most in room.items() if most == blocks))
