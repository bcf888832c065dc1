"""GGUF's Q4_0 and Q4_1, against bytes by hand and against the package that llama.cpp's authors publish."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import native
from halfbyte.formats.gguf_blocks import (
    CODED,
    Q4_0,
    Q4_1,
    cannot_hold,
    pack,
    rounding_error,
    unpack,
    with_integer_zeros,
    with_joined_groups,
)
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


def test_five_and_eight_bits_by_hand() -> None:
    """0.5 is 0x3800. Fifth bits: 0b1000…0010 for inputs 1 and 31. int8 of 3 and -128 are codes 131 and 0."""
    nibbles = [0x21] * 16  # code 1 for inputs 0 to 15, 2 for 16 to 31
    five = torch.tensor([[0x00, 0x38, 0x02, 0, 0, 0x80, *nibbles]], dtype=torch.uint8)
    tensor = unpack(five, "Q5_0")
    assert tensor.codes.tolist() == [[1, 17, *[1] * 14, *[2] * 15, 18]]
    assert tensor.dequantize()[0, :2].tolist() == [0.5 * (1 - 16), 0.5 * (17 - 16)]
    minimum = torch.tensor([[0x00, 0x38, 0x00, 0xC4, 0x02, 0, 0, 0x80, *nibbles]], dtype=torch.uint8)
    assert unpack(minimum, "Q5_1").dequantize()[0, :2].tolist() == [0.5 * 1 - 4, 0.5 * 17 - 4]
    eight = unpack(torch.tensor([[0x00, 0x38, 3, 0x80, *[0] * 30]], dtype=torch.uint8), "Q8_0")
    assert eight.codes[0, :3].tolist() == [131, 0, 128]
    assert eight.dequantize()[0, :3].tolist() == [1.5, -64.0, 0.0]


def random_blocks(kind: str, seed: int, rows: int = 3, blocks: int = 2) -> torch.Tensor:
    """Any bytes, but for fp16 fields, which are kept finite."""
    found = torch.randint(0, 256, (rows, blocks, CODED[kind]), generator=torch.Generator().manual_seed(seed)).byte()
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0,) if kind.endswith("_0") else (0, 2))
    for place in halves:
        found[:, :, place + 1] &= 0xBB
    return found.reshape(rows, -1)


@pytest.mark.parametrize("kind", CODED)
@given(seed=st.integers(0, 1 << 30))
def test_codes_of_any_bytes_are_the_package_s_weights_to_the_bit(kind: str, seed: int) -> None:
    blocks = random_blocks(kind, seed)
    found = unpack(blocks, kind)
    theirs = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(found.dequantize(), theirs)
    assert int(found.codes.max()) < 1 << found.bits
    back = native.unpack(native.pack(found))
    assert torch.equal(back.dequantize(), theirs)


def test_integer_zero_points_are_found_again() -> None:
    tensor = random_tensor(5, 256, 64)
    tensor.scales[0, 0], tensor.zeros[0, 0] = 0.0, 0
    back = with_joined_groups(with_integer_zeros(unpack(pack(tensor, Q4_1), Q4_1)))
    assert back.group_size == 64
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, part), getattr(tensor, part)), part
    # One minimum that is no multiple, by a single bit of fp16, and all stay as they are.
    packed = pack(tensor, Q4_1)
    packed[3, 22] ^= 1
    other = unpack(packed, Q4_1)
    assert with_integer_zeros(other) is other
    assert with_joined_groups(random_tensor(5, 256, 32)).group_size == 32
    assert with_joined_groups(back, limit=64).group_size == 64


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
