"""GGUF's Q4_0 and Q4_1, against bytes by hand and against the package that llama.cpp's authors publish."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats.gguf_blocks import Q4_0, Q4_1, cannot_hold, pack, rounding_error, unpack
from halfbyte.tensor import QuantizedTensor


def random_tensor(rows: int, columns: int, size: int, seed: int = 0, *, symmetric: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // size
    zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(
        codes=torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(rows, groups, generator=generator) + 0.01).half().float(),
        zeros=torch.full_like(zeros, 8) if symmetric else zeros,
        bits=4,
        group_size=size,
    )


def test_a_block_by_hand() -> None:
    """Codes 0 1 … 15 15 … 0: byte j is j + 16 · (15 - j). 0.5 is 0x3800, -0.5 · 8 = -4 is 0xC400; low byte first."""
    codes = torch.tensor([[*range(16), *range(15, -1, -1)]], dtype=torch.uint8)
    tensor = QuantizedTensor(codes, torch.tensor([[0.5]]), torch.tensor([[8]], dtype=torch.uint8), 4, 32)
    nibbles = [j + 16 * (15 - j) for j in range(16)]
    assert pack(tensor, Q4_0).tolist() == [[0x00, 0x38, *nibbles]]
    assert pack(tensor, Q4_1).tolist() == [[0x00, 0x38, 0x00, 0xC4, *nibbles]]


@given(
    rows=st.integers(1, 5), blocks=st.integers(1, 4), per_group=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000)
)
def test_q4_0_and_back(rows: int, blocks: int, per_group: int, seed: int) -> None:
    tensor = random_tensor(rows, 32 * blocks * per_group, 32 * per_group, seed, symmetric=True)
    back = unpack(pack(tensor, Q4_0), Q4_0)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.scales, tensor.scales.repeat_interleave(per_group, dim=1))
    assert torch.equal(back.dequantize(), tensor.dequantize())


@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 1000))
def test_q4_1_and_back(rows: int, blocks: int, seed: int) -> None:
    tensor = random_tensor(rows, 64 * blocks, 64, seed)
    packed = pack(tensor, Q4_1)
    back = unpack(packed, Q4_1)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.zeros, tensor.offsets.half().float().repeat_interleave(2, dim=1))
    # A second time nothing is rounded any more.
    assert torch.equal(pack(back, Q4_1), packed)
    assert rounding_error(back) == 0
    error = float((back.dequantize() - tensor.dequantize()).norm() / tensor.dequantize().norm())
    assert rounding_error(tensor) == pytest.approx(error, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("kind", [Q4_0, Q4_1])
def test_the_gguf_package_reads_the_same_weights(kind: str) -> None:
    tensor = random_tensor(6, 192, 64, 3, symmetric=kind == Q4_0)
    packed = pack(tensor, kind)
    theirs = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs.copy()), unpack(packed, kind).dequantize())


@pytest.mark.parametrize("kind", [Q4_0, Q4_1])
def test_what_the_gguf_package_quantized_is_read(kind: str) -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    blocks = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]).copy())
    found = unpack(blocks, kind)
    theirs = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(found.dequantize(), torch.from_numpy(theirs.copy()))
    assert torch.equal(pack(found, kind), blocks)


def test_what_does_not_fit_is_refused() -> None:
    tensor = random_tensor(4, 64, 32)
    assert cannot_hold(tensor, Q4_1) is None
    assert "zero points other than 8" in (cannot_hold(tensor, Q4_0) or "")
    assert "blocks of 32 inputs" in (cannot_hold(random_tensor(4, 64, 16), Q4_1) or "")
    assert "blocks of 32 inputs" in (cannot_hold(random_tensor(4, 48, 48), Q4_1) or "")
    assert cannot_hold(random_tensor(4, 96, 96), Q4_1) is None
    assert "fp16 cannot hold exactly" in (cannot_hold(replace(tensor, scales=tensor.scales + 1e-5), Q4_1) or "")
    index = tensor.column_groups.flip(0).int()
    assert "no neighbours" in (cannot_hold(replace(tensor, group_index=index), Q4_1) or "")
    with pytest.raises(UnsupportedError, match=r"^model.up: has zero points other than 8"):
        pack(tensor, Q4_0, "model.up")
    with pytest.raises(ConfigError, match="codes: expected values below 16, got 31"):
        pack(replace(tensor, codes=tensor.codes + 16), Q4_1)


def test_damaged_blocks_are_refused() -> None:
    packed = pack(random_tensor(2, 64, 32), Q4_1)
    with pytest.raises(
        CheckpointError, match=r"tensor w: expected uint8 rows of 20-byte Q4_1 blocks, found uint8 \[2, 39\]"
    ):
        unpack(packed[:, :-1], Q4_1, "w")
    for place in (1, 3):  # the high bytes of d and m
        broken = packed.clone()
        broken[0, place - 1 : place + 1] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # NaN
        with pytest.raises(CheckpointError, match="not finite"):
            unpack(broken, Q4_1)
