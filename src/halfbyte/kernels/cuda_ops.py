"""`DecoderOps` on an NVIDIA GPU: rms_norm.cu, rotate_append.cu and gated.cu of native/cuda."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Protocol

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda_build import unavailable
from halfbyte.kernels.cuda_module import TYPES, Argument, CudaModule, EntryPoint
from halfbyte.kernels.decoder_ops import ACTIVATIONS, DecoderOps, Heads, Norm, TorchOps, check_activation

# Entry point → its file, and threads of a block.
KERNELS = {
    "rms_norm": ("rms_norm.cu", 512),
    "rms_norm_narrow": ("rms_norm.cu", 512),
    "rotate_append": ("rotate_append.cu", 256),
    "gated": ("gated.cu", 256),
    "gated_narrow": ("gated.cu", 256),
}
# Numbers in a load of 16 bytes; numbers of a head that a lane has; lanes of a warp.
WIDTH, SLOT, LANES = 8, 16, 32


class Launchable(Protocol):
    """An entry point with the shared memory of its blocks, as `EntryPoint` is one."""

    def launch(self, blocks: int, *arguments: Argument) -> None:
        """Run it."""


class CudaOps:
    """The kernels behind the functions, for one dtype.

    Args:
        entry: name of an entry point, bytes of shared memory of a block → what launches it.
    """

    def __init__(self, entry: Callable[[str, int], Launchable]):
        self._entry = entry

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `DecoderOps`."""
        return self._norm(x, None, 0.0, norm)

    def add_rms_norm(self, x: torch.Tensor, branch: torch.Tensor, scale: float, norm: Norm) -> torch.Tensor:
        """See `DecoderOps`."""
        return self._norm(x, branch, scale, norm)

    def _norm(self, x: torch.Tensor, branch: torch.Tensor | None, scale: float, norm: Norm) -> torch.Tensor:
        rows, channels = x.shape
        width = _width(channels, x, branch, norm.weight)
        name = "rms_norm" if width == WIDTH else "rms_norm_narrow"
        y = torch.empty_like(x)
        self._entry(name, norm_shared_bytes(channels, width)).launch(
            rows, x, branch, norm.weight, y,
            ctypes.c_int(channels), *map(ctypes.c_float, (scale, norm.epsilon, norm.offset)),
            ctypes.c_int(norm.round_first),
        )  # fmt: skip
        return y

    def rotate_append(
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, heads: Heads
    ) -> None:
        """See `DecoderOps`; `why_not_rotate` says which heads the kernel takes."""
        rows, (sequences, kv_heads, capacity, head_dim) = qkv.shape[0], keys.shape
        pairs, q_norm, k_norm = heads.cosines.shape[1], heads.q_norm, heads.k_norm
        lanes = head_lanes(head_dim)
        threads = KERNELS["rotate_append"][1]
        blocks = -(-rows * (heads.heads + 2 * kv_heads) * lanes // threads)
        numbers = (rows, rows // sequences, heads.heads, kv_heads, head_dim, pairs, capacity, lanes)
        epsilon, offset = (1.0, 0.0) if q_norm is None else (q_norm.epsilon, q_norm.offset)
        self._entry("rotate_append", 0).launch(
            blocks, qkv, keys, values, positions, heads.cosines, heads.sines,
            None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
            *map(ctypes.c_int, numbers), ctypes.c_float(epsilon), ctypes.c_float(offset),
        )  # fmt: skip

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """See `DecoderOps`."""
        check_activation(activation)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        step = _width(width, gate_up)
        name = "gated" if step == WIDTH else "gated_narrow"
        out = gate_up.new_empty(rows, width)
        blocks = -(-rows * (width // step) // KERNELS[name][1])
        numbers = (rows, width, ACTIVATIONS.index(activation))
        self._entry(name, 0).launch(blocks, gate_up, out, *map(ctypes.c_int, numbers))
        return out


def _width(columns: int, *tensors: torch.Tensor | None) -> int:
    """Numbers that a thread takes at a time: 8, or 1 where rows do not begin at multiples of 16 bytes."""
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors if tensor is not None)
    return WIDTH if columns % WIDTH == 0 and aligned else 1


def norm_shared_bytes(channels: int, width: int) -> int:
    """What a block of rms_norm.cu keeps: a float a warp, and a row rounded up to what all threads take at once."""
    threads = KERNELS["rms_norm"][1]
    return 4 * (threads // LANES) + 2 * threads * width * -(-channels // (threads * width))


def head_lanes(head_dim: int) -> int:
    """Lanes of a warp that share a head: a power of two."""
    return 1 << (head_dim // SLOT - 1).bit_length()


def why_not_rotate(head_dim: int, pairs: int) -> str | None:
    """What keeps rotate_append.cu from such heads; None if nothing does."""
    if head_dim % SLOT or head_dim > SLOT * LANES:
        return f"heads of {head_dim} numbers; the CUDA kernel takes multiples of {SLOT} up to {SLOT * LANES}"
    return f"{pairs} pairs of a head turn; the CUDA kernel takes multiples of {WIDTH}" if pairs % WIDTH else None


@functools.cache
def _cuda_ops(device: torch.device, dtype: torch.dtype) -> CudaOps:
    """Compiled once a process."""
    macros = {"DECODER_TYPE": TYPES[dtype]}
    modules = {source: CudaModule(device, source, macros) for source, _ in KERNELS.values()}

    @functools.cache
    def entry(name: str, shared_bytes: int) -> EntryPoint:
        source, threads = KERNELS[name]
        return modules[source].entry(name, threads=threads, shared_bytes=shared_bytes)

    return CudaOps(entry)


def decoder_ops(device: torch.device, dtype: torch.dtype, head_dim: int, pairs: int) -> tuple[DecoderOps, str | None]:
    """The operations for a device, and why they are torch's; None where they are not.

    Args:
        device: where the decoder computes; on a GPU with its index.
        dtype: of its activations.
        head_dim: numbers of a head.
        pairs: of a head that turn.
    """
    reason = f"no GPU, {device.type}" if device.type != "cuda" else unavailable(device)
    if reason is None and dtype not in TYPES:
        reason = f"activations in {dtype}"
    reason = reason or why_not_rotate(head_dim, pairs)
    if reason is None:
        try:
            return _cuda_ops(device, dtype), None
        except UnsupportedError as error:
            reason = str(error)
    return TorchOps(), reason
