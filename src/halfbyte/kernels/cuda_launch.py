"""Which of the kernels in native/cuda/w4a16_gemm.cu runs a product, on how many blocks, with what memory."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from halfbyte.kernels.cuda_layout import PAIR, TILE, CudaWeight
from halfbyte.kernels.cuda_module import TYPES, CudaModule, device_index

SOURCE = "w4a16_gemm.cu"
THREADS = 256
_TILE_BYTES, _X_ROW_BYTES, _SCALE_BYTES, _ZERO_BYTES = 2048, 128, 128, 32


@dataclass(frozen=True)
class Geometry:
    """How one kernel divides the work; the numbers are those of its source, and a test holds them together.

    Attributes:
        rows: of x in a block's tile.
        strips: of 64 rows of W in it.
        slices: warps along K.
        stages: of the pipeline.
    """

    rows: int
    strips: int
    slices: int
    stages: int

    @property
    def name(self) -> str:
        """Of the entry point."""
        return f"w4a16_rows{self.rows}"

    @property
    def sum_bytes(self) -> int:
        """Of a block's tile in fp32."""
        return 4 * self.rows * self.strips * TILE

    def shared_bytes(self, *, pair: bool, zeros: bool) -> int:
        """Dynamic shared memory of a block."""
        groups, sums = (2 if pair else 1), (self.slices - 1) * self.sum_bytes
        if self.strips == 1:  # each thread has its own 32 bytes, and a word of scales or zero points a group
            return self.stages * THREADS * (32 + 4 * groups) + sums
        tiles = self.strips * self.slices
        lines = tiles * groups * (_SCALE_BYTES + (_ZERO_BYTES if zeros else 0))
        return self.stages * (tiles * _TILE_BYTES + self.slices * self.rows * _X_ROW_BYTES + lines) + sums

    def steps(self, m: int, n: int, k: int) -> int:
        """Of all tiles of y together: no more blocks than that have work."""
        tiles = -(-n // (self.strips * TILE)) * -(-m // self.rows)
        return tiles * -(-k // (self.slices * TILE))


GEOMETRIES = (Geometry(8, 1, 4, 4), Geometry(16, 2, 2, 5), Geometry(32, 2, 2, 4), Geometry(64, 4, 1, 5))


def geometry_for(m: int) -> Geometry:
    """The narrowest kernel that takes m rows of x at once, or the widest."""
    return next((geometry for geometry in GEOMETRIES if m <= geometry.rows), GEOMETRIES[-1])


class CudaKernels:
    """The compiled kernels of one variant on one GPU.

    Attributes:
        max_blocks: that are ever launched at once, for flags.
    """

    def __init__(self, device: torch.device, macros: dict[str, str], *, pair: bool, zeros: bool):
        module = CudaModule(device, SOURCE, macros)
        self._entries = {
            geometry: module.entry(
                geometry.name, threads=THREADS, shared_bytes=geometry.shared_bytes(pair=pair, zeros=zeros)
            )
            for geometry in GEOMETRIES
        }
        self.max_blocks = max(entry.resident for entry in self._entries.values())

    def multiply(self, weight: CudaWeight, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        """x [M, K] · Wᵀ + bias → [M, N], on torch's current stream; N and K as padded.

        Args:
            weight: on the GPU.
            x: contiguous, its first byte at a multiple of 16, of the variant's dtype.
            flags: int32 [max_blocks], zeros, and zeros again when the kernel is done. Not for two launches at a time.
        """
        m, (n, k) = x.shape[0], (weight.rows, weight.columns)
        geometry = geometry_for(m)
        entry = self._entries[geometry]
        blocks = min(entry.resident, geometry.steps(m, n, k))
        y = x.new_empty(m, n)
        # Of torch's allocator and on its stream, so that a captured graph has its own.
        partials = torch.empty(blocks * geometry.sum_bytes // 4, dtype=torch.float32, device=x.device)
        tensors = (
            x, weight.weights, weight.scales, weight.zeros, weight.row_scale, weight.bias, y, partials, flags,
        )  # fmt: skip
        entry.launch(blocks, *tensors, *map(ctypes.c_int, (m, n, k, weight.group_shift)))
        return y


@functools.cache
def kernels_for(device: torch.device, dtype: torch.dtype, *, pair: bool, zeros: bool) -> CudaKernels:
    """The kernels of a variant, compiled and loaded once a process.

    Args:
        device: a GPU.
        dtype: of x: fp16 or bf16.
        pair: a tile has two groups of 32.
        zeros: there are zero points.

    Raises:
        UnsupportedError: they cannot be compiled, or a block needs more shared memory than the GPU has.
    """
    macros = {"W4A16_TYPE": TYPES[dtype], "W4A16_PAIR": str(int(pair)), "W4A16_ZEROS": str(int(zeros))}
    return CudaKernels(device, macros, pair=pair, zeros=zeros)


def kernels_of(weight: CudaWeight, dtype: torch.dtype) -> CudaKernels:
    """The kernels that take a weight and activations of a dtype."""
    device = torch.device("cuda", device_index(weight.weights.device))
    return kernels_for(device, dtype, pair=weight.group_shift == PAIR, zeros=bool(weight.zeros.numel()))
