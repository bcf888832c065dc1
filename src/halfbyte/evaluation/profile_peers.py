"""Who is timed on a linear: every way to multiply by one and the same weight, each with copies that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from halfbyte.device.cpu import pick_tier
from halfbyte.kernels.decoder_linear import half_linear, quantized_linear
from halfbyte.kernels.w4a16 import prepare
from halfbyte.tensor import QuantizedTensor


@dataclass(frozen=True)
class Peer:
    """One implementation, with its copies of the weight.

    Attributes:
        name: of the implementation.
        bits: of a weight.
        copies: of the weight.
        weight_bytes: of one copy.
        item_bytes: of a number in x and y.
        bind: x, float32 [M, in] → a call that multiplies it by every copy and returns the last product [M, out].
    """

    name: str
    bits: int
    copies: int
    weight_bytes: int
    item_bytes: int
    bind: Callable[[torch.Tensor], Callable[[], torch.Tensor]]


def random_weight(rows: int, columns: int, group_size: int) -> QuantizedTensor:
    """4-bit codes [rows, columns] with scales that are exact in fp16, the same ones in every process."""
    generator = torch.Generator().manual_seed(0)
    groups = columns // group_size
    scales = torch.rand(rows, groups, generator=generator).mul_(0.005).add_(0.005)
    return QuantizedTensor(
        torch.randint(16, (rows, columns), dtype=torch.uint8, generator=generator),
        scales.half().float(),
        torch.randint(16, (rows, groups), dtype=torch.uint8, generator=generator),
        bits=4,
        group_size=group_size,
    )


def make_peers(weight: QuantizedTensor, device: torch.device, least_bytes: int) -> list[Peer]:
    """Everyone who can multiply by a weight on a device, 16 bit first.

    Args:
        weight: on the CPU.
        device: to compute on.
        least_bytes: the copies of each peer together are at least as large.
    """
    dense = weight.dequantize().bfloat16()
    if device.type != "cpu":
        return [_torch_peer(dense, device, least_bytes), _kernel_peer(weight, device, least_bytes)]
    tier = pick_tier()
    return [
        _torch_peer(dense, device, least_bytes),
        _native_peer("bf16", 16, lambda: half_linear(dense, None, tier), least_bytes),
        _native_peer("int4-a16", 4, lambda: quantized_linear(weight, "a16", tier), least_bytes),
        _native_peer("int4-a8", 4, lambda: quantized_linear(weight, "a8", tier), least_bytes),
    ]


def _more(nbytes: int, least_bytes: int) -> int:
    """Copies that are needed besides the first."""
    return max(0, -(-least_bytes // nbytes) - 1)


def _torch_peer(dense: torch.Tensor, device: torch.device, least_bytes: int) -> Peer:
    copies = [dense.to(device, copy=True) for _ in range(1 + _more(2 * dense.numel(), least_bytes))]
    calls = [partial(torch.nn.functional.linear, weight=copy) for copy in copies]
    return _called_peer("torch-bf16", 16, 2 * dense.numel(), calls, device)


def _kernel_peer(weight: QuantizedTensor, device: torch.device, least_bytes: int) -> Peer:
    kernel, first = prepare(weight, device=device)
    copies = [first, *(kernel.prepare(weight, device) for _ in range(_more(first.nbytes, least_bytes)))]
    return _called_peer(f"int4-{kernel.name}", weight.bits, first.nbytes, copies, device)


def _called_peer(
    name: str, bits: int, nbytes: int, copies: Sequence[Callable[[torch.Tensor], torch.Tensor]], device: torch.device
) -> Peer:
    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        narrow = x.to(device, torch.bfloat16)

        def call() -> torch.Tensor:
            for copy in copies:
                y = copy(narrow)
            return y

        return call

    return Peer(name, bits, len(copies), nbytes, 2, bind)


def _native_peer(name: str, bits: int, make: Callable[[], Any], least_bytes: int) -> Peer:
    """All copies in one native call, the way a step of the decoder goes through its linears."""
    from halfbyte import _native

    first = make()
    copies = [first, *(make() for _ in range(_more(first.nbytes, least_bytes)))]

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        y = torch.empty(x.shape[0], first.rows)

        def call() -> torch.Tensor:
            _native.multiply_each(copies, x.numpy(), y.numpy())
            return y

        return call

    return Peer(name, bits, len(copies), first.nbytes, 4, bind)
