from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import marlin
from halfbyte.tensor import QuantizedTensor
from tests.formats.weights import assert_same, nibbles, random_tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def test_golden_words() -> None:
    """Codes k % 16, the same for every output: a word shows which inputs of its tile a thread holds.

    Thread 0 holds the inputs 0, 1, 8, 9 of two outputs, in the order e = 0 … 7; nibble i shows e = ORDER[i]:
    e = 0 2 4 6 1 3 5 7 → k = 0 8 0 8 1 9 1 9, which is 0x91918080. Thread 1 holds 2, 3, 10, 11: 0xB3B3A2A2.
    """
    codes = torch.arange(128, dtype=torch.uint8).remainder(16).repeat(256, 1)
    tensor = QuantizedTensor(codes, torch.ones(256, 1), torch.full((256, 1), 8, dtype=torch.uint8), 4, 128)
    packed = marlin.pack(tensor)
    assert {key: (value.dtype, list(value.shape)) for key, value in packed.items()} == {
        "qweight": (torch.int32, [8, 512]), "scales": (torch.float16, [1, 256]),
    }  # fmt: skip
    words = [word & 0xFFFFFFFF for word in packed["qweight"][0].tolist()]
    assert words[0:4] == 4 * [0x91918080]  # the four groups of 16 outputs
    assert words[4:8] == 4 * [0xB3B3A2A2]
    assert words[16] == words[128] == 0x91918080  # thread 4, and the next tile


def test_golden_words_of_the_outputs() -> None:
    """Codes n % 16 for every input: thread 0 of group j holds the outputs 16j and 16j + 8.

    e // 4 = 0 0 1 1 0 0 1 1 for nibbles 0 … 7, so 0x88008800; thread 4 holds outputs 1 and 9: 0x99119911.
    """
    codes = torch.arange(256).remainder(16).to(torch.uint8).unsqueeze(1).repeat(1, 128)
    tensor = QuantizedTensor(codes, torch.ones(256, 1), torch.full((256, 1), 8, dtype=torch.uint8), 4, 128)
    words = [word & 0xFFFFFFFF for word in marlin.pack(tensor)["qweight"][0].tolist()]
    assert words[0:4] == 4 * [0x88008800]
    assert words[16:20] == 4 * [0x99119911]


def test_golden_scales() -> None:
    """Scales that name their output: the permutations written out from the two formulas."""
    grouped = torch.arange(256.0).unsqueeze(1).repeat(1, 2)
    tensor = QuantizedTensor(
        torch.zeros(256, 256, dtype=torch.uint8), grouped, torch.full((256, 2), 8, dtype=torch.uint8), 4, 128
    )
    # new[8i + j] = old[i + 8j] in runs of 64
    assert marlin.pack(tensor)["scales"][1, :12].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25]
    assert marlin.pack(tensor)["scales"][1, 64] == 64
    single = QuantizedTensor(
        torch.zeros(256, 256, dtype=torch.uint8),
        grouped[:, :1].contiguous(),
        torch.full((256, 1), 8, dtype=torch.uint8),
        4,
        256,
    )
    # new[8i + t] = old[2i + (0, 1, 8, 9, 16, 17, 24, 25)[t]] in runs of 32
    expected = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13]
    assert marlin.pack(single)["scales"][0, :20].tolist() == expected
    assert marlin.pack(single)["scales"][0, 32] == 32


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    tensor = random_tensor(0, 256, 128, 128, symmetric=True)
    words = marlin.pack(tensor)["qweight"]
    codes = tensor.codes.tolist()
    for kt in range(8):
        for nt in range(4):
            for t in range(32):
                rows = (2 * (t % 4), 2 * (t % 4) + 1, 2 * (t % 4) + 8, 2 * (t % 4) + 9)
                for j in range(4):
                    found = nibbles(int(words[kt, 128 * nt + 4 * t + j]))
                    assert found == [
                        codes[64 * nt + 16 * j + t // 4 + 8 * (e // 4)][16 * kt + rows[e % 4]] for e in ORDER
                    ]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.sampled_from([256, 512]),
    inputs=st.sampled_from([128, 256, 384]),
    whole=st.booleans(),
    bias=st.booleans(),
    ist=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(
    seed: int, outputs: int, inputs: int, whole: bool, bias: bool, ist: bool
) -> None:
    size = inputs if whole else 128
    tensor = random_tensor(seed, outputs, inputs, size, bias=bias, symmetric=True)
    packed = marlin.pack(tensor)
    assert set(packed) <= set(marlin.KEYS)
    stored = dict(zip(marlin.IST_KEYS, map(packed.get, marlin.KEYS), strict=True)) if ist else packed
    found = marlin.unpack({k: t for k, t in stored.items() if t is not None}, group_size=-1 if whole else 128)
    assert_same(found, tensor)
    assert all(torch.equal(value, packed[key]) for key, value in marlin.pack(found).items())


def test_one_group_is_one_however_the_config_says_it() -> None:
    tensor = random_tensor(0, 256, 128, 128, symmetric=True)
    for size in (-1, 128, 256):
        assert_same(marlin.unpack(marlin.pack(tensor), group_size=size), tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (random_tensor(0, 128, 128, 128, symmetric=True), "has 128 outputs; .* multiple of 256"),
        (random_tensor(0, 256, 192, 192, symmetric=True), "has 192 inputs; .* multiple of 128"),
        (random_tensor(0, 256, 256, 64, symmetric=True), "not groups of 64"),
        (random_tensor(0, 256, 128, 128), "has zero points other than 8"),
        (random_tensor(0, 256, 256, 128, symmetric=True, group_index=True), "groups of columns"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tensor: QuantizedTensor, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
        marlin.pack(tensor, "layer")


INT = torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: missing; the Marlin layout needs qweight and scales"),
        ({"scales": None}, "scales: missing"),
        ({"qweight": torch.zeros(16, 512)}, r"qweight: expected int32 \[in/16, 2·out\], found float32"),
        ({"qweight": torch.zeros(16, 500, dtype=INT)}, "qweight: expected whole tiles of 64 outputs"),
        ({"qweight": torch.zeros(17, 512, dtype=INT)}, "qweight: 272 inputs are not whole groups of 128"),
        ({"scales": torch.zeros(1, 256).half()}, r"scales: expected .* \[2, 256\], found float16 \[1, 256\]"),
        ({"scales": torch.full((2, 256), float("nan")).half()}, "scales: holds values that are not finite"),
        ({"bias": torch.zeros(7).half()}, r"bias: expected .* \[256\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    packed = {**marlin.pack(random_tensor(0, 256, 256, 128, symmetric=True)), **change}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}"):
        marlin.unpack({key: t for key, t in packed.items() if t is not None}, group_size=128, name="layer")
