"""Which of the kernels in native/cuda/w4a16_gemm.cu runs a product, on how many blocks, with what memory."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda_build import compile_cubin
from halfbyte.kernels.cuda_layout import PAIR, TILE, CudaWeight

SOURCE = "w4a16_gemm.cu"
THREADS = 256
TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat"}
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


class TorchStream:
    """A stream of torch's, in the protocol of cuda.core."""

    def __init__(self, handle: int):
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and the stream."""
        return 0, self._handle


class CudaKernels:
    """The compiled kernels of one variant on one GPU.

    Attributes:
        max_blocks: that are ever launched at once, for flags.
    """

    def __init__(self, device: torch.device, macros: dict[str, str], *, pair: bool, zeros: bool):
        index = _index(device)
        major, minor = torch.cuda.get_device_capability(index)
        cubin = compile_cubin(SOURCE, macros, f"sm_{major}{minor}")
        self._shared = {geometry: geometry.shared_bytes(pair=pair, zeros=zeros) for geometry in GEOMETRIES}
        with torch.cuda.device(index):
            self._kernels, self._resident = self._load(cubin, index)
        self.max_blocks = max(self._resident.values())

    def _load(self, cubin: bytes, index: int) -> tuple[dict[Geometry, Any], dict[Geometry, int]]:
        """The entry points, and how many blocks of each the GPU holds at once."""
        from cuda.core import Device, ObjectCode

        torch.zeros(1, device="cuda")  # torch makes the context that the kernels are loaded into
        Device(index).set_current()
        code = ObjectCode.from_cubin(cubin, name=SOURCE)
        processors = torch.cuda.get_device_properties(index).multi_processor_count
        kernels, resident = {}, {}
        for geometry, shared in self._shared.items():
            kernels[geometry] = kernel = code.get_kernel(geometry.name)
            _allow_shared_memory(kernel, shared, index)
            resident[geometry] = processors * kernel.occupancy.max_active_blocks_per_multiprocessor(THREADS, shared)
            if not resident[geometry]:
                name = torch.cuda.get_device_name(index)
                raise UnsupportedError(f"{geometry.name}: a block does not fit a multiprocessor of {name}; use torch")
        return kernels, resident

    def multiply(self, weight: CudaWeight, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        """x [M, K] · Wᵀ + bias → [M, N], on torch's current stream; N and K as padded.

        Args:
            weight: on the GPU.
            x: contiguous, its first byte at a multiple of 16, of the variant's dtype.
            flags: int32 [max_blocks], zeros, and zeros again when the kernel is done. Not for two launches at a time.
        """
        from cuda.core import LaunchConfig, launch

        m, (n, k) = x.shape[0], (weight.rows, weight.columns)
        geometry = geometry_for(m)
        blocks = min(self._resident[geometry], geometry.steps(m, n, k))
        y = x.new_empty(m, n)
        # Of torch's allocator and on its stream, so that a captured graph has its own.
        partials = torch.empty(blocks * geometry.sum_bytes // 4, dtype=torch.float32, device=x.device)
        pointers = (
            x, weight.weights, weight.scales, weight.zeros, weight.row_scale, weight.bias, y, partials, flags,
        )  # fmt: skip
        with torch.cuda.device(x.device):
            launch(
                TorchStream(torch.cuda.current_stream().cuda_stream),
                LaunchConfig(grid=blocks, block=THREADS, shmem_size=self._shared[geometry]),
                self._kernels[geometry],
                *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
                *map(ctypes.c_int, (m, n, k, weight.group_shift)),
            )
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
    device = torch.device("cuda", _index(weight.weights.device))
    return kernels_for(device, dtype, pair=weight.group_shift == PAIR, zeros=bool(weight.zeros.numel()))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _allow_shared_memory(kernel: Any, nbytes: int, device: int) -> None:
    """Let a kernel's blocks have more than the 48 KiB that need no leave."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, nbytes, kernel.handle, driver.CUdevice(device))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise UnsupportedError(f"{nbytes:,} bytes of shared memory a block are refused ({status}); use backend torch")
