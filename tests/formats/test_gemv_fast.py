from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import gemv_fast
from halfbyte.tensor import QuantizedTensor
from tests.formats.weights import assert_same, random_tensor


def test_golden_words() -> None:
    """Row n holds the codes k // 4 + n (mod 16), 64 inputs.

    Word 0 of row 0 holds the columns 0, 8, 16, 24, whose codes are 0, 2, 4, 6: 0x6420. Word 1 holds 1, 9, 17, 25 with
    the same codes; word 4 holds 4, 12, 20, 28 with 1, 3, 5, 7: 0x7531. Word 8 begins the second run of 32: columns 32,
    40, 48, 56 with 8, 10, 12, 14: 0xECA8, negative as int16. Word 16 is word 0 of row 1, each code one more: 0x7531.
    """
    codes = (torch.arange(64) // 4 + torch.arange(8).unsqueeze(1)).remainder(16).to(torch.uint8)
    zeros = torch.tensor([[5], [0], [0], [0], [0], [0], [0], [15]], dtype=torch.uint8)
    packed = gemv_fast.pack(QuantizedTensor(codes, torch.full((8, 1), 0.5), zeros, 4, 64))
    assert {key: (value.dtype, list(value.shape)) for key, value in packed.items()} == {
        "qweight": (torch.int16, [2, 64]), "qzeros": (torch.float16, [16, 8]), "scales": (torch.float16, [16, 8]),
    }  # fmt: skip
    words = packed["qweight"][0].tolist()
    assert [words[u] & 0xFFFF for u in (0, 1, 4, 8, 16)] == [0x6420, 0x6420, 0x7531, 0xECA8, 0x7531]
    assert words[8] == 0xECA8 - 2**16
    assert packed["qweight"][1, 0].item() & 0xFFFF == 0xA864  # row 4: 4, 6, 8, 10
    assert packed["scales"].tolist() == [8 * [0.5]] + 15 * [8 * [0.0]]
    # 0.5 · 5 and 0.5 · 15, negated
    assert packed["qzeros"].tolist() == [[-2.5, 0, 0, 0, 0, 0, 0, -7.5]] + 15 * [8 * [0.0]]


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    tensor = random_tensor(0, 8, 128, 32)
    words = gemv_fast.pack(tensor)["qweight"]
    for r4 in range(2):
        for kb in range(2):
            for u in range(64):
                for v in range(4):
                    p = 4 * (u % 16) + v
                    t = p % 32
                    b, c, a = t // 8, t // 4 % 2, t % 4
                    k = 64 * kb + 32 * (p // 32) + 8 * a + 2 * b + c
                    assert int(words[r4, 64 * kb + u]) >> 4 * v & 15 == tensor.codes[4 * r4 + u // 16, k]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.integers(1, 3).map(lambda n: 8 * n),
    groups=st.integers(1, 5).map(lambda n: 2 * n),
    group_size=st.sampled_from([32, 64, 128]),
    bias=st.booleans(),
    llm_awq=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(
    seed: int, outputs: int, groups: int, group_size: int, bias: bool, llm_awq: bool
) -> None:
    tensor = random_tensor(seed, outputs, groups * group_size, group_size, bias=bias)
    packed = gemv_fast.pack(tensor, llm_awq=llm_awq)
    assert set(packed) <= set(gemv_fast.LLM_AWQ_KEYS if llm_awq else gemv_fast.KEYS)
    found = gemv_fast.unpack(packed, group_size=group_size)
    assert_same(found, tensor)
    assert all(torch.equal(value, packed[key]) for key, value in gemv_fast.pack(found, llm_awq=llm_awq).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_zero_point_comes_back_from_its_rounded_product(dtype: torch.dtype) -> None:
    """All zero points beside a thousand scales from fp16's smallest number to its largest that can take them."""
    scales = torch.cat([torch.arange(1, 500) * 2.0**-24, torch.logspace(-6, 3.6, 501)]).half().float()
    if dtype is torch.bfloat16:
        scales = scales.bfloat16().float()
    zeros = torch.arange(16, dtype=torch.uint8).repeat(1000, 1)
    tensor = QuantizedTensor(
        torch.zeros(1000, 512, dtype=torch.uint8), scales.unsqueeze(1).expand(-1, 16).contiguous(), zeros, 4, 32
    )
    packed = gemv_fast.pack(tensor) if dtype is torch.float16 else None
    if packed is None:
        packed = gemv_fast.pack(random_tensor(0, 1000, 512, 32))
        packed["qweight"].zero_()
        for key, values in (("scales", tensor.scales), ("qzeros", -(tensor.scales * zeros))):
            packed[key] = torch.nn.functional.pad(values.to(dtype), (0, 16)).T.contiguous()
    assert_same(gemv_fast.unpack(packed, group_size=32), tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (random_tensor(0, 12, 64, 32), "has 12 outputs; .* multiple of 8"),
        (random_tensor(0, 8, 96, 32), "has 96 inputs; .* multiple of 64"),
        (random_tensor(0, 8, 64, 16), "not of 16"),
        (replace(random_tensor(0, 8, 64, 64, lowest_zero=15), scales=torch.full((8, 1), 8192.0)), "above 65504"),
        (replace(random_tensor(0, 8, 64, 64, lowest_zero=1), scales=torch.zeros(8, 1)), "has a scale of 0"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tensor: QuantizedTensor, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
        gemv_fast.pack(tensor, "layer")


def test_a_scale_of_zero_beside_a_zero_point_of_zero_is_held() -> None:
    tensor = random_tensor(0, 8, 64, 64)
    tensor.scales.zero_()
    tensor.zeros.zero_()
    assert_same(gemv_fast.unpack(gemv_fast.pack(tensor), group_size=64), tensor)


HALF = torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: missing; the AWQ GEMV_FAST layout needs qweight, qzeros and scales"),
        ({"qzeros": None}, "qzeros: missing"),
        ({"scales": None}, "scales: missing"),
        ({"qweight": torch.zeros(2, 64, dtype=torch.int32)}, r"qweight: expected int16 \[out/4, in\], found int32"),
        ({"qweight": torch.zeros(2, 96, dtype=torch.int16)}, "qweight: expected a multiple of 64 inputs, found 96"),
        ({"qzeros": torch.zeros(16, 8, dtype=torch.int32)}, r"qzeros: expected .* \[32, 8\], found int32"),
        ({"qzeros": torch.zeros(8, 8, dtype=HALF)}, r"qzeros: expected .* \[32, 8\], found float16 \[8, 8\]"),
        ({"scales": torch.full((32, 8), float("inf"), dtype=HALF)}, "scales: holds values that are not finite"),
        ({"qzeros": torch.full((32, 8), float("nan"), dtype=HALF)}, "qzeros: holds values that are not finite"),
        ({"qzeros": torch.ones(32, 8, dtype=HALF)}, "qzeros: expected a scale times a zero point of 0 to 15, negated"),
        ({"scales": torch.zeros(32, 8, dtype=HALF)}, "qzeros: .* where the scale is 0"),
        ({"bias": torch.zeros(7, dtype=HALF)}, r"bias: expected .* \[8\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    packed = {**gemv_fast.pack(random_tensor(0, 8, 64, 32, lowest_zero=1)), **change}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}"):
        gemv_fast.unpack({key: t for key, t in packed.items() if t is not None}, group_size=32, name="layer")


@pytest.mark.parametrize("zero", [-1.0, -0.5, 0.3, 15.5, 16.0])
def test_a_product_that_no_zero_point_explains_is_refused(zero: float) -> None:
    packed = gemv_fast.pack(random_tensor(0, 8, 64, 64))
    packed["qzeros"][0, 5] = -zero * packed["scales"][0, 5].float()
    with pytest.raises(CheckpointError, match="tensor layer.qzeros: expected a scale times a zero point"):
        gemv_fast.unpack(packed, group_size=64, name="layer")
