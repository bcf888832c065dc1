from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import gptq
from halfbyte.formats.gptq import GptqConfig
from halfbyte.tensor import QuantizedTensor
from tests.formats.weights import assert_same, nibbles, random_tensor

INT = torch.int32


def test_golden_words() -> None:
    """Output n has the codes k + n (mod 16) and the zero point n + 1, 16 inputs in groups of 8.

    Inputs 0 to 7 of output 0 are 0x76543210, of output 1 0x87654321; inputs 8 to 15 of output 0 are 0xFEDCBA98. The
    zero points 1 … 8 are 0x87654321 in version 2 and, each less one, 0x76543210 in version 1.
    """
    codes = (torch.arange(16) + torch.arange(8).unsqueeze(1)).remainder(16).to(torch.uint8)
    zeros = torch.arange(1, 9, dtype=torch.uint8).unsqueeze(1).repeat(1, 2)
    tensor = QuantizedTensor(codes, torch.tensor([[0.5, 0.25]]).repeat(8, 1), zeros, 4, 8)
    packed = gptq.pack(tensor)
    assert {key: (value.dtype, list(value.shape)) for key, value in packed.items()} == {
        "qweight": (INT, [2, 8]), "qzeros": (INT, [2, 1]), "scales": (torch.float16, [2, 8]), "g_idx": (INT, [16]),
    }  # fmt: skip
    assert packed["qweight"][0, :2].tolist() == [0x76543210, 0x87654321 - 2**32]
    assert packed["qweight"][1, 0].item() == 0xFEDCBA98 - 2**32
    assert packed["qzeros"].tolist() == 2 * [[0x87654321 - 2**32]]
    assert gptq.pack(tensor, version=1)["qzeros"].tolist() == 2 * [[0x76543210]]
    assert packed["scales"].tolist() == [8 * [0.5], 8 * [0.25]]
    assert packed["g_idx"].tolist() == 8 * [0] + 8 * [1]


def test_a_symmetric_weight_of_version_1_has_sevens() -> None:
    tensor = random_tensor(0, 8, 16, 8, symmetric=True)
    assert gptq.pack(tensor, version=1)["qzeros"].unique().tolist() == [0x77777777]
    assert gptq.pack(tensor)["qzeros"].unique().tolist() == [0x88888888 - 2**32]


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    tensor = random_tensor(0, 16, 24, 8, lowest_zero=1)
    packed, first = gptq.pack(tensor), gptq.pack(tensor, version=1)
    for n in range(16):
        assert [q for word in packed["qweight"][:, n].tolist() for q in nibbles(word)] == tensor.codes[n].tolist()
        for g in range(3):
            assert nibbles(int(packed["qzeros"][g, n // 8]))[n % 8] == tensor.zeros[n, g]
            assert nibbles(int(first["qzeros"][g, n // 8]))[n % 8] == tensor.zeros[n, g] - 1


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.integers(1, 4).map(lambda n: 8 * n),
    inputs=st.integers(1, 9).map(lambda n: 8 * n),
    group_size=st.sampled_from([3, 8, 20, 32]),
    version=st.sampled_from([1, 2]),
    bias=st.booleans(),
    group_index=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(
    seed: int, outputs: int, inputs: int, group_size: int, version: int, group_index: bool, bias: bool
) -> None:
    tensor = random_tensor(
        seed, outputs, inputs, min(group_size, inputs), bias=bias, group_index=group_index, lowest_zero=2 - version
    )
    packed = gptq.pack(tensor, version=version)
    assert set(packed) <= set(gptq.KEYS)
    found = gptq.unpack(packed, config=GptqConfig(group_size, version, group_index))
    assert_same(found, tensor)
    assert all(torch.equal(value, packed[key]) for key, value in gptq.pack(found, version=version).items())


def test_a_zero_point_of_0_borrows_from_its_neighbour_in_version_1_and_comes_back() -> None:
    """0x87654320 - 0x11111111 = 0x7654320F: the nibble of output 0 is 15 and that of output 1 is 0, not 1."""
    packed = gptq.pack(replace(random_tensor(0, 8, 8, 8), zeros=torch.ones(8, 1, dtype=torch.uint8)), version=1)
    packed["qzeros"][0, 0] = 0x7654320F
    found = gptq.unpack(packed, config=GptqConfig(8, 1, False))
    assert found.zeros.flatten().tolist() == [0, 2, 3, 4, 5, 6, 7, 8]


def test_whole_rows_and_a_missing_index() -> None:
    tensor = random_tensor(0, 8, 24, 24)
    packed = gptq.pack(tensor)
    del packed["g_idx"]
    assert_same(gptq.unpack(packed, config=GptqConfig(-1, 2, False)), tensor)
    assert_same(gptq.unpack(packed, config=GptqConfig(128, 2, False)), tensor)


@pytest.mark.parametrize(
    ("tensor", "version", "message"),
    [
        (random_tensor(0, 12, 16, 8), 2, "has 12 outputs; .* multiple of 8"),
        (random_tensor(0, 8, 12, 12), 2, "has 12 inputs; .* multiple of 8"),
        (replace(random_tensor(0, 8, 16, 8), zeros=torch.zeros(8, 2, dtype=torch.uint8)), 1, "zero points of 0; .* 2"),
        (replace(random_tensor(0, 8, 16, 8), scales=torch.full((8, 2), 0.1)), 2, "fp16 cannot hold exactly"),
        (replace(random_tensor(0, 8, 16, 8), input_scale=torch.ones(16)), 2, "a scale on its input"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tensor: QuantizedTensor, version: int, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
        gptq.pack(tensor, "layer", version=version)


def test_values_that_would_run_into_their_neighbours_are_refused() -> None:
    tensor = random_tensor(0, 8, 16, 8)
    tensor.zeros[3, 1] = 16
    with pytest.raises(ConfigError, match="^layer: zeros: expected values below 16, got 16"):
        gptq.pack(tensor, "layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: missing; the GPTQ layout needs qweight, qzeros, scales and g_idx"),
        ({"qzeros": None}, "qzeros: missing"),
        ({"scales": None}, "scales: missing"),
        ({"g_idx": None}, "g_idx: missing"),
        ({"qweight": torch.zeros(2, 8)}, r"qweight: expected int32 \[in/8, out\], found float32 \[2, 8\]"),
        ({"qweight": torch.zeros(2, 9, dtype=INT)}, "qweight: .* multiple of 8 outputs, found 9"),
        ({"qweight": torch.zeros(0, 8, dtype=INT)}, "qweight: expected inputs"),
        ({"qweight": torch.zeros(3, 8, dtype=INT)}, r"qzeros: expected int32 \[3, 1\]"),
        ({"qzeros": torch.zeros(2, 1)}, "qzeros: .* found float32"),
        ({"scales": torch.ones(2, 7).half()}, r"scales: expected .* \[2, 8\]"),
        ({"scales": torch.full((2, 8), float("inf")).half()}, "scales: holds values that are not finite"),
        ({"g_idx": torch.zeros(15, dtype=INT)}, r"g_idx: expected int32 \[16\]"),
        ({"g_idx": torch.full((16,), 2, dtype=INT)}, r"g_idx: expected numbers in \[0, 2\), found 2 to 2"),
        ({"bias": torch.zeros(7).half()}, r"bias: expected .* \[8\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    packed = {**gptq.pack(random_tensor(0, 8, 16, 8, group_index=True)), **change}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}"):
        gptq.unpack({k: t for k, t in packed.items() if t is not None}, config=GptqConfig(8, 2, True), name="layer")


# ---- config.json


@pytest.mark.parametrize("version", [1, 2])
def test_config_goes_round(version: int) -> None:
    section = gptq.quantization_config(
        group_size=64, modules_to_not_convert=["mlp.gate"], desc_act=True, version=version
    )
    assert section["dynamic"] == {r"-:.*mlp\.gate.*": {}}
    assert gptq.read_quantization_config(section) == GptqConfig(64, version, True)


def test_the_first_sections_say_no_version() -> None:
    assert gptq.read_quantization_config({"bits": 4, "group_size": -1, "desc_act": False}) == GptqConfig(-1, 1, False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "bits None"),
        ({"bits": 8}, "bits 8: of GPTQ checkpoints, those of 4 bits are read"),
        ({"bits": 4, "checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas': expected gptq or gptq_v2"),
        ({"bits": 4, "group_size": 0}, "group_size 0"),
        ({"bits": 4, "desc_act": "yes"}, "desc_act 'yes': expected true or false"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=f"^config.json: {message}"):
        gptq.read_quantization_config(section)
