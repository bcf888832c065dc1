"""Random weights for the tests of every layout, and what makes two of them the same."""

from __future__ import annotations

from dataclasses import fields

import torch

from halfbyte.tensor import QuantizedTensor


def random_tensor(
    seed: int,
    outputs: int,
    inputs: int,
    group_size: int,
    *,
    bias: bool = False,
    symmetric: bool = False,
    group_index: bool = False,
    lowest_zero: int = 0,
) -> QuantizedTensor:
    """A weight of 4 bits whose scales fp16 holds."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group_size)
    zeros = torch.randint(lowest_zero, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    index = torch.arange(inputs, dtype=torch.int32) // group_size
    return QuantizedTensor(
        codes=torch.randint(16, (outputs, inputs), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(outputs, groups, generator=generator) + 0.01).half().float(),
        zeros=torch.full_like(zeros, 8) if symmetric else zeros,
        bits=4,
        group_size=group_size,
        bias=torch.randn(outputs, generator=generator).half() if bias else None,
        # Flipped, so that it is in no order of neighbours whatever the seed.
        group_index=index.flip(0).contiguous() if group_index and groups > 1 else None,
    )


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    """Every field, and what the weight stands for."""
    for field in fields(QuantizedTensor):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name
    assert torch.equal(found.dequantize(), expected.dequantize())


def nibbles(word: int) -> list[int]:
    """The eight of a 32-bit word, lowest first."""
    return [word >> 4 * i & 15 for i in range(8)]
