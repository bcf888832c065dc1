from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import gemm
from halfbyte.formats.bits import (
    pack_nibbles,
    pack_nibbles_transposed,
    unpack_nibbles,
    unpack_nibbles_transposed,
)
from halfbyte.formats.runs import word_bytes
from halfbyte.tensor import QuantizedTensor


def random_tensor(seed: int, outputs: int, groups: int, group_size: int, *, bias: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return QuantizedTensor(
        codes=torch.randint(16, (outputs, groups * group_size), generator=generator, dtype=torch.uint8),
        scales=torch.rand(outputs, groups, generator=generator).half().float(),
        zeros=torch.randint(16, (outputs, groups), generator=generator, dtype=torch.uint8),
        bits=4,
        group_size=group_size,
        bias=torch.randn(outputs, generator=generator).half() if bias else None,
    )


def test_the_word_of_outputs_0_to_7() -> None:
    """Worked by hand from the formula: nibble i holds output ORDER[i], lowest nibble first."""
    codes = torch.arange(8, dtype=torch.uint8).reshape(1, 8)
    assert pack_nibbles_transposed(codes.T, gemm.ORDER).item() == 0x75316420
    assert pack_nibbles(codes).item() == 0x76543210
    assert pack_nibbles(torch.full((1, 8), 8, dtype=torch.uint8)).item() == -2004318072  # 0x88888888


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    tensor = random_tensor(0, 16, 2, 8)
    packed = gemm.pack(tensor)
    for k in range(16):
        for c in range(2):
            word = packed["qweight"][k, c].item() & 0xFFFFFFFF
            for i in range(8):
                assert (word >> 4 * i) & 15 == tensor.codes[8 * c + gemm.ORDER[i], k]
    for g in range(2):
        word = packed["qzeros"][g, 1].item() & 0xFFFFFFFF
        assert [(word >> 4 * i) & 15 for i in range(8)] == [int(tensor.zeros[8 + o, g]) for o in gemm.ORDER]
    assert torch.equal(packed["scales"], tensor.scales.T.half())


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.integers(1, 6).map(lambda n: 8 * n),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 8, 32]),
    bias=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(seed: int, outputs: int, groups: int, group_size: int, bias: bool) -> None:
    tensor = random_tensor(seed, outputs, groups, group_size, bias=bias)
    packed = gemm.pack(tensor)
    found = gemm.unpack(packed, group_size=group_size)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(tensor, name))
    assert (found.bias is None) == (tensor.bias is None)
    assert all(torch.equal(value, packed[key]) for key, value in gemm.pack(found).items())


@settings(max_examples=50)
@given(order=st.permutations(range(8)), seed=st.integers(0, 2**31))
def test_nibbles_go_round_in_any_order_and_as_the_lessons_show_them(order: list[int], seed: int) -> None:
    codes = torch.randint(16, (5, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_nibbles_transposed(codes.T, order)
    assert torch.equal(words.unsqueeze(-1).view(torch.uint8), word_bytes(codes.view(5, 2, 8), order))
    assert torch.equal(unpack_nibbles_transposed(words, order), codes.T)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    # As a part of something else, where it begins at no multiple of a lane.
    inside = codes.flatten()[1:9]
    assert torch.equal(pack_nibbles(inside).view(torch.uint8), word_bytes(inside))


def test_one_group_per_row() -> None:
    tensor = random_tensor(0, 8, 1, 24)
    assert torch.equal(gemm.unpack(gemm.pack(tensor), group_size=-1).codes, tensor.codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(12, 16, dtype=torch.uint8)}, "has 12 outputs"),
        ({"bits": 3}, "not 3-bit ones"),
        ({"zeros": torch.zeros(8, 2)}, "floating minima"),
        ({"scales": torch.full((8, 2), 1e-9)}, r"fp16 cannot hold exactly \(1e-09, which is 0 in fp16"),
        ({"scales": torch.full((8, 2), 1e6)}, r"fp16 cannot hold exactly \(1e\+06, above fp16's largest"),
        ({"scales": torch.full((8, 2), 0.1)}, r"fp16 cannot hold exactly \(0.1\d*, which fp16 rounds to 0.09997"),
        ({"scales": torch.full((8, 2), 1e-7)}, "which fp16 rounds to 1.19"),
        ({"scales": torch.full((8, 2), float("nan"))}, r"\(nan, which is not finite"),
        ({"scales": torch.full((8, 2), float("inf"))}, r"\(inf, which is not finite"),
        ({"bias": torch.full((8,), 1e5)}, "bias that fp16 cannot hold"),
        ({"group_size": 12}, "whole groups of 12"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(change: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "codes": torch.zeros(8, 16, dtype=torch.uint8), "scales": torch.ones(8, 2),
        "zeros": torch.zeros(8, 2, dtype=torch.uint8), "bits": 4, "group_size": 8, **change,
    }  # fmt: skip
    if parts["codes"].shape[0] != 8:
        parts["scales"], parts["zeros"] = torch.ones(12, 2), torch.zeros(12, 2, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
        gemm.pack(QuantizedTensor(**parts), "layer")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qweight", torch.zeros(16, 2), r"qweight: expected int32 \[in, out/8\], found float32"),
        ("qweight", None, "qweight: missing"),
        ("qzeros", torch.zeros(2, 3, dtype=torch.int32), r"qzeros: expected int32 \[2, 2\], found int32 \[2, 3\]"),
        ("scales", torch.zeros(16, 2).half(), r"scales: expected .* \[2, 16\]"),
        ("scales", torch.full((2, 16), float("nan")).half(), "not finite"),
        ("bias", torch.full((16,), float("inf")).half(), "bias: holds values that are not finite"),
        ("bias", torch.zeros(15).half(), r"bias: expected .* \[16\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(key: str, value: torch.Tensor | None, message: str) -> None:
    packed = {k: v for k, v in {**gemm.pack(random_tensor(0, 16, 2, 8)), key: value}.items() if v is not None}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}|^tensor layer.*{message}"):
        gemm.unpack(packed, group_size=8, name="layer")


@pytest.mark.parametrize("part", ["codes", "zeros"])
def test_values_that_would_run_into_their_neighbours_are_refused(part: str) -> None:
    tensor = random_tensor(0, 8, 2, 8)
    getattr(tensor, part)[3, 1] = 16
    with pytest.raises(ConfigError, match=f"^layer: {part}: expected values below 16, got 16"):
        gemm.pack(tensor, "layer")


def test_denormal_scales_survive() -> None:
    tensor = random_tensor(0, 8, 2, 8)
    tensor.scales.fill_(2.0**-24)
    assert torch.equal(gemm.unpack(gemm.pack(tensor), group_size=8).scales, tensor.scales)


def test_the_dequantized_weight_follows_the_formula_of_the_file() -> None:
    """W[n, k] = s[g, n] · (q - z[g, n]), taken straight from the stored words."""
    tensor = random_tensor(1, 16, 2, 8)
    packed = gemm.pack(tensor)
    inverse = (0, 4, 1, 5, 2, 6, 3, 7)
    expected = torch.empty(16, 16)
    for k in range(16):
        for n in range(16):
            c, shift, g = n // 8, 4 * inverse[n % 8], k // 8
            q = int(packed["qweight"][k, c]) >> shift & 15
            z = int(packed["qzeros"][g, c]) >> shift & 15
            expected[n, k] = float(packed["scales"][g, n]) * (q - z)
    assert torch.equal(gemm.unpack(packed, group_size=8).dequantize(), expected)


def test_a_symmetric_weight_has_zeros_of_eight_in_every_nibble() -> None:
    tensor = random_tensor(0, 8, 2, 8)
    tensor.zeros.fill_(8)
    assert gemm.pack(tensor)["qzeros"].unique().tolist() == [-2004318072]  # 0x88888888
