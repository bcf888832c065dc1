from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import gemv
from halfbyte.tensor import QuantizedTensor
from tests.formats.weights import assert_same, nibbles, random_tensor


@pytest.mark.parametrize(
    ("inputs", "group_size", "words"),
    # m of the width rule, then ceil(ceil(K/G / 8) / m) · m: (576, 64) has 9 groups, 2 words, m = 2 → 2.
    [(4096, 128, 4), (11008, 128, 11), (4096, 32, 16), (576, 64, 2), (1536, 64, 4), (576, 32, 4), (11008, 64, 22)],
)
def test_the_width_rule(inputs: int, group_size: int, words: int) -> None:
    assert gemv.padded_groups(inputs, group_size) == 8 * words


def test_golden_words() -> None:
    """Row n holds the codes k + n (mod 16): its first word has the nibbles n, n + 1, … n + 7, lowest first.

    64 inputs in groups of 32 are 2 groups; the rule gives m = 4 words of zero points, of which the two lowest nibbles
    of the first are used: groups 0 and 1 of output 0 have the zero points 5 and 9, so 0x95.
    """
    codes = (torch.arange(64) + torch.arange(8).unsqueeze(1)).remainder(16).to(torch.uint8)
    zeros = torch.tensor([[5, 9]] + 7 * [[0, 15]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 0.25]]).repeat(8, 1)
    packed = gemv.pack(QuantizedTensor(codes, scales, zeros, 4, 32))
    assert {key: (value.dtype, list(value.shape)) for key, value in packed.items()} == {
        "qweight": (torch.int32, [8, 8]), "qzeros": (torch.int32, [8, 4]), "scales": (torch.float16, [8, 32]),
    }  # fmt: skip
    assert packed["qweight"][0, 0].item() == 0x76543210
    assert packed["qweight"][1, 0].item() == 0x87654321 - 2**32  # its highest nibble is 8: negative
    assert packed["qweight"][0, 1].item() == 0xFEDCBA98 - 2**32
    assert packed["qzeros"].tolist() == [[0x95, 0, 0, 0]] + 7 * [[0xF0, 0, 0, 0]]
    assert packed["scales"][0].tolist() == [0.5, 0.25] + 30 * [0.0]


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    tensor = random_tensor(0, 8, 192, 64)
    packed = gemv.pack(tensor)
    for n in range(8):
        assert [q for word in packed["qweight"][n].tolist() for q in nibbles(word)] == tensor.codes[n].tolist()
        zeros = [z for word in packed["qzeros"][n].tolist() for z in nibbles(word)]
        assert zeros == tensor.zeros[n].tolist() + 13 * [0]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.integers(1, 4).map(lambda n: 8 * n),
    groups=st.integers(1, 10),
    group_size=st.sampled_from([32, 64, 128, 160]),
    bias=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(seed: int, outputs: int, groups: int, group_size: int, bias: bool) -> None:
    tensor = random_tensor(seed, outputs, groups * group_size, group_size, bias=bias)
    packed = gemv.pack(tensor)
    found = gemv.unpack(packed, group_size=group_size)
    assert_same(found, tensor)
    assert set(packed) <= set(gemv.KEYS)
    assert all(torch.equal(value, packed[key]) for key, value in gemv.pack(found).items())


def test_one_group_per_row() -> None:
    tensor = random_tensor(0, 8, 192, 192)
    assert_same(gemv.unpack(gemv.pack(tensor), group_size=-1), tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (random_tensor(0, 12, 64, 32), "has 12 outputs; .* multiple of 8"),
        (random_tensor(0, 8, 48, 48), "groups of 32, 64, and 128 or more, not of 48"),
        (random_tensor(0, 8, 96, 96), "groups of 32, 64, and 128 or more, not of 96"),
        (random_tensor(0, 8, 136, 136), "has 136 inputs; .* multiple of 32"),
        (random_tensor(0, 8, 96, 64), "96 inputs to be whole groups of 64"),
        (random_tensor(0, 8, 64, 32, group_index=True), "groups of columns that are no neighbours"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tensor: QuantizedTensor, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
        gemv.pack(tensor, "layer")


@pytest.mark.parametrize("part", ["codes", "zeros"])
def test_values_that_would_run_into_their_neighbours_are_refused(part: str) -> None:
    tensor = random_tensor(0, 8, 64, 32)
    getattr(tensor, part)[3, 1] = 16
    with pytest.raises(ConfigError, match=f"^layer: {part}: expected values below 16, got 16"):
        gemv.pack(tensor, "layer")


INT = torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: missing; the AWQ GEMV layout needs qweight, qzeros and scales"),
        ({"qzeros": None}, "qzeros: missing"),
        ({"scales": None}, "scales: missing"),
        ({"qweight": torch.zeros(8, 8)}, r"qweight: expected int32 \[out, in/8\], found float32 \[8, 8\]"),
        ({"qweight": torch.zeros(64, dtype=INT)}, "qweight: expected int32"),
        ({"qweight": torch.zeros(8, 6, dtype=INT)}, "qweight: 48 inputs are not whole groups of 32"),
        ({"qweight": torch.zeros(8, 0, dtype=INT)}, "qweight: 0 inputs are not whole groups"),
        ({"qzeros": torch.zeros(8, 2, dtype=INT)}, r"qzeros: expected int32 \[8, 4\]"),
        ({"scales": torch.zeros(8, 2).half()}, r"scales: expected .* \[8, 32\], found float16 \[8, 2\]"),
        ({"scales": torch.full((8, 32), float("nan")).half()}, "scales: holds values that are not finite"),
        ({"bias": torch.zeros(7).half()}, r"bias: expected .* \[8\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    packed = {**gemv.pack(random_tensor(0, 8, 64, 32)), **change}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}"):
        gemv.unpack({key: value for key, value in packed.items() if value is not None}, group_size=32, name="layer")


def test_a_group_size_the_layout_does_not_know_is_refused() -> None:
    with pytest.raises(CheckpointError, match="group_size 16: the AWQ GEMV layout knows groups of 32, 64"):
        gemv.unpack(gemv.pack(random_tensor(0, 8, 64, 32)), group_size=16, name="layer")
