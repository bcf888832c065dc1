"""The kernels of native/cuda on a model of a GPU (cuda_machine.hpp), compiled by g++ and called from here."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_model import CUDA, HERE, build

from halfbyte.kernels.cuda_layout import PAIR, CudaWeight

# What ran past its slot, or was never written, is NaN.
NAN = float("nan")


class Counts(ctypes.Structure):
    """What the machine counted: mma instructions, loads from shared memory, passes too many, looks at a flag."""

    _fields_ = [(name, ctypes.c_longlong) for name in ("mma", "shared_loads", "bank_conflicts", "waits")]
    mma: int
    shared_loads: int
    bank_conflicts: int
    waits: int


@dataclass
class Machine:
    """The compiled model."""

    library: ctypes.CDLL

    @classmethod
    def build(cls, folder: Path, sources: Path = CUDA) -> "Machine":
        """Compile the kernels in `sources` into `folder`."""
        return cls(build(HERE / "cuda_kernels.cpp", folder, sources))

    def shared_bytes(self, rows: int, *, pair: bool, zeros: bool) -> int:
        size: int = self.library.shared_bytes(rows, pair, zeros)
        return size

    def dequantize(self, word: int, nibbles: int | None, subtile: int, dtype: torch.dtype) -> torch.Tensor:
        """The eight floats of a word, in the order of registers; symmetric without `nibbles`."""
        pairs = (ctypes.c_uint32 * 4)()
        self.library.dequantize_w4a16(
            dtype == torch.bfloat16, ctypes.c_uint32(word), nibbles is not None,
            ctypes.c_uint32(nibbles or 0), subtile, pairs,
        )  # fmt: skip
        return torch.tensor(list(pairs), dtype=torch.uint32).view(dtype)

    def run(
        self, weight: CudaWeight, x: torch.Tensor, rows: int,
        *, blocks: int, seed: int = 0, flags: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Counts]:  # fmt: skip
        """x [M, K] · Wᵀ + bias [M, N] by the kernel for `rows` rows, on `blocks` blocks."""
        y = torch.full((x.shape[0], weight.rows), NAN, dtype=x.dtype)
        partials = torch.full((blocks, 64 * 256), NAN)
        flags = torch.zeros(blocks, dtype=torch.int32) if flags is None else flags
        bias = torch.empty(0) if weight.bias is None else weight.bias
        tensors = [x, weight.weights, weight.scales, weight.zeros, weight.row_scale, bias, y, partials, flags]
        table = (ctypes.c_size_t * 18)(*(value for tensor in tensors for value in (tensor.data_ptr(), tensor.nbytes)))
        counts = Counts()
        failed = self.library.run_w4a16(
            rows, x.dtype == torch.bfloat16, weight.group_shift == PAIR, weight.zeros.numel() > 0, table,
            x.shape[0], weight.rows, x.shape[1], weight.group_shift, blocks, seed, ctypes.byref(counts),
        )  # fmt: skip
        if failed:
            raise RuntimeError(self.library.last_error().decode())
        assert not flags.any(), "a flag was left up"
        return y, counts
