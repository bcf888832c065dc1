from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import compressed_tensors
from halfbyte.formats.compressed_tensors import CompressedTensorsConfig
from halfbyte.tensor import QuantizedTensor
from tests.formats.weights import assert_same, nibbles, random_tensor

INT = torch.int32


def config(*sizes: int, symmetric: bool = False) -> CompressedTensorsConfig:
    return CompressedTensorsConfig(sizes, symmetric, ())


def test_golden_words() -> None:
    """Ten outputs of eleven inputs in one group; output n has the codes k + n (mod 16) and the zero point n + 3.

    Row 0 is 0 … 7, then 8, 9, 10 and five zero bits of padding: 0x76543210, 0x00000A98. The zero points of outputs 0 to
    7 are 3 … 10, those of 8 and 9 are 11 and 12: 0xA9876543, 0x000000CB, one below the other.
    In values from -8 to 7 row 0 is -8, -7, …: adding 8 to them gives these nibbles, as the library does.
    """
    codes = (torch.arange(11) + torch.arange(10).unsqueeze(1)).remainder(16).to(torch.uint8)
    zeros = (torch.arange(10) + 3).to(torch.uint8).unsqueeze(1)
    packed = compressed_tensors.pack(QuantizedTensor(codes, torch.full((10, 1), 0.5), zeros, 4, 11))
    assert {key: (value.dtype, list(value.shape)) for key, value in packed.items()} == {
        "weight_packed": (INT, [10, 2]), "weight_scale": (torch.bfloat16, [10, 1]),
        "weight_shape": (torch.int64, [2]), "weight_zero_point": (INT, [2, 1]),
    }  # fmt: skip
    assert packed["weight_packed"][0].tolist() == [0x76543210, 0x00000A98]
    assert packed["weight_packed"][1].tolist() == [0x87654321 - 2**32, 0x00000BA9]
    assert packed["weight_zero_point"].tolist() == [[0xA9876543 - 2**32], [0x000000CB]]
    assert packed["weight_shape"].tolist() == [10, 11]


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    tensor = random_tensor(0, 16, 48, 16)
    packed = compressed_tensors.pack(tensor)
    for n in range(16):
        assert [q for word in packed["weight_packed"][n].tolist() for q in nibbles(word)] == tensor.codes[n].tolist()
        for g in range(3):
            assert nibbles(int(packed["weight_zero_point"][n // 8, g]))[n % 8] == tensor.zeros[n, g]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.integers(1, 20),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 5, 8, 32]),
    bias=st.booleans(),
    symmetric=st.booleans(),
    group_index=st.booleans(),
)
def test_unpack_is_the_inverse_of_pack(
    seed: int, outputs: int, groups: int, group_size: int, symmetric: bool, **parts: bool
) -> None:
    tensor = random_tensor(seed, outputs, groups * group_size, group_size, symmetric=symmetric, **parts)
    packed = compressed_tensors.pack(tensor, symmetric=symmetric)
    assert set(packed) <= set(compressed_tensors.KEYS)
    assert ("weight_zero_point" in packed) == (not symmetric)
    found = compressed_tensors.unpack(packed, config=config(group_size, symmetric=symmetric))
    assert_same(found, tensor)
    again = compressed_tensors.pack(found, symmetric=symmetric)
    assert all(torch.equal(value, packed[key]) for key, value in again.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_and_bias_keep_the_dtype_they_came_in(dtype: torch.dtype) -> None:
    tensor = random_tensor(0, 8, 32, 32)
    scales = (1e-3 + torch.rand(8, 1)).to(dtype)
    tensor = replace(tensor, scales=scales.float(), bias=torch.randn(8).to(dtype))
    packed = compressed_tensors.pack(tensor)
    assert packed["weight_scale"].dtype == packed["bias"].dtype == dtype
    assert torch.equal(packed["weight_scale"], scales)
    assert_same(compressed_tensors.unpack(packed, config=config(-1)), tensor)


def test_a_linear_may_have_any_of_the_group_sizes() -> None:
    for size in (16, 64):
        tensor = random_tensor(0, 8, 64, size)
        assert_same(compressed_tensors.unpack(compressed_tensors.pack(tensor), config=config(16, -1)), tensor)


def test_zero_points_count_where_they_are_not_needed() -> None:
    tensor = random_tensor(0, 8, 32, 32)
    assert_same(compressed_tensors.unpack(compressed_tensors.pack(tensor), config=config(32, symmetric=True)), tensor)


@pytest.mark.parametrize(
    ("tensor", "symmetric", "message"),
    [
        (random_tensor(0, 8, 40, 16), False, "40 inputs to be whole groups of 16"),
        (random_tensor(0, 8, 32, 16), True, "has zero points other than 8"),
        (replace(random_tensor(0, 8, 32, 32), scales=torch.full((8, 1), 0.1)), False, "neither fp16 nor bf16"),
        (replace(random_tensor(0, 8, 32, 32), scales=torch.full((8, 1), float("nan"))), False, "neither fp16 nor"),
        (replace(random_tensor(0, 8, 32, 32), input_scale=torch.ones(32)), False, "a scale on its input"),
        (replace(random_tensor(0, 8, 32, 32), bits=3), False, "not 3-bit ones"),
        (replace(random_tensor(0, 8, 32, 32), zeros=torch.zeros(8, 1)), False, "floating minima"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tensor: QuantizedTensor, symmetric: bool, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^layer: .*{message}"):
        compressed_tensors.pack(tensor, "layer", symmetric=symmetric)


def test_values_that_would_run_into_their_neighbours_are_refused() -> None:
    tensor = random_tensor(0, 8, 32, 32)
    tensor.codes[3, 1] = 16
    with pytest.raises(ConfigError, match="^layer: codes: expected values below 16, got 16"):
        compressed_tensors.pack(tensor, "layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight_packed": None},
            "weight_packed: missing; the compressed-tensors layout needs weight_packed",
        ),
        ({"weight_scale": None}, "weight_scale: missing"),
        ({"weight_shape": None}, "weight_shape: missing"),
        ({"weight_zero_point": None}, "weight_zero_point: missing"),
        ({"weight_packed": torch.zeros(8, 4)}, r"weight_packed: expected int32 \[out, in/8\], found float32"),
        ({"weight_packed": torch.zeros(9, 4, dtype=INT)}, r"weight_packed: expected int32 \[8, 4\] from weight_shape"),
        ({"weight_shape": torch.tensor([8.0, 32.0])}, "weight_shape: expected int64"),
        ({"weight_shape": torch.tensor([8, 32, 1])}, "weight_shape: expected int64"),
        ({"weight_shape": torch.tensor([8, -32])}, "weight_shape: .* found 8, -32"),
        ({"weight_shape": torch.tensor([8, 2**62])}, "weight_packed: expected int32 .8, 576460752303423488"),
        ({"weight_shape": torch.tensor([8, 31])}, "weight_scale: expected whole groups of 31 inputs"),
        ({"weight_scale": torch.ones(8, 4).half()}, r"weight_scale: expected \[8, 2\] from the group sizes"),
        ({"weight_scale": torch.ones(7, 2).half()}, r"weight_scale: expected .* \[8, 2\], found float16 \[7, 2\]"),
        ({"weight_scale": torch.ones(8, 2, dtype=INT)}, "weight_scale: .* found int32"),
        ({"weight_scale": torch.full((8, 2), float("nan")).half()}, "weight_scale: holds values that are not finite"),
        ({"weight_zero_point": torch.zeros(8, 2, dtype=torch.int8)}, r"weight_zero_point: expected int32 \[1, 2\]"),
        ({"weight_g_idx": torch.zeros(31, dtype=INT)}, r"weight_g_idx: expected int32 \[32\]"),
        (
            {"weight_g_idx": torch.full((32,), 2, dtype=INT)},
            r"weight_g_idx: expected numbers in \[0, 2\), found 2 to 2",
        ),
        ({"weight_g_idx": torch.full((32,), -1, dtype=INT)}, "weight_g_idx: .* found -1 to -1"),
        ({"bias": torch.zeros(7).half()}, r"bias: expected .* \[8\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    packed = {**compressed_tensors.pack(random_tensor(0, 8, 32, 16)), **change}
    with pytest.raises(CheckpointError, match=f"^tensor layer.{message}"):
        compressed_tensors.unpack({k: t for k, t in packed.items() if t is not None}, config=config(16), name="layer")


# ---- config.json

# As llm-compressor 0.9 writes it for W4A16_ASYM, with what newer versions add.
WRITTEN: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group",
                "symmetric": False, "type": "int", "zp_dtype": "torch.int8",
            },
        }
    },
    "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
    "transform_config": {}, "version": "0.12.2",
}  # fmt: skip


def test_a_section_of_llm_compressor_is_understood() -> None:
    read = compressed_tensors.read_quantization_config
    assert read(WRITTEN) == CompressedTensorsConfig((128,), False, ("lm_head",))
    mixed = copy.deepcopy(WRITTEN)
    mixed["format"] = "mixed-precision"
    channel = copy.deepcopy(WRITTEN["config_groups"]["group_0"])
    channel["weights"].update(strategy="channel", group_size=None, symmetric=True)
    channel["targets"] = ["re:.*down_proj$"]
    mixed["config_groups"]["group_1"] = channel
    assert read(mixed) == CompressedTensorsConfig((128, -1), True, ("lm_head",))


@pytest.mark.parametrize(("group_size", "symmetric"), [(64, False), (-1, True)])
def test_config_goes_round(group_size: int, symmetric: bool) -> None:
    section = compressed_tensors.quantization_config(group_size=group_size, ignore=["lm_head"], symmetric=symmetric)
    expected = CompressedTensorsConfig((group_size,), symmetric, ("lm_head",))
    assert compressed_tensors.read_quantization_config(section) == expected


def changed(path: str, value: Any) -> dict[str, Any]:
    section = copy.deepcopy(WRITTEN)
    *parents, last = path.split("/")
    inner = section
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return section


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (changed("config_groups", {}), "config_groups: expected an object with at least one group"),
        (changed("config_groups", None), "config_groups: expected an object"),
        (changed(GROUP, "W4A16"), r"config_groups.group_0.weights: expected an object"),
        (changed(f"{GROUP}/weights", None), r"config_groups.group_0.weights: expected an object"),
        (changed(f"{GROUP}/weights/num_bits", 8), "weights.num_bits 8: expected 4"),
        (changed(f"{GROUP}/weights/num_bits", True), "weights.num_bits True: expected 4"),
        (changed(f"{GROUP}/weights/type", "float"), "weights.type 'float': expected 'int'"),
        (changed(f"{GROUP}/weights/strategy", "tensor"), "weights.strategy 'tensor': expected 'group' or 'channel'"),
        (changed(f"{GROUP}/weights/strategy", ["group"]), "weights.strategy .'group'.: expected"),
        (changed(f"{GROUP}/weights/group_size", None), "weights.group_size None: expected -1 or a positive number"),
        (changed(f"{GROUP}/weights/symmetric", "no"), "weights.symmetric 'no': expected true or false"),
        (changed(f"{GROUP}/input_activations", {"num_bits": 8}), "group_0.input_activations: quantized activations"),
        (changed(f"{GROUP}/format", "float-quantized"), "format 'float-quantized'"),
        (changed("transform_config", {"config_groups": {"u": {}}}), "transform_config: transforms of activations"),
        (changed("ignore", "lm_head"), "ignore: expected a list of strings"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=f"^config.json: .*{message}"):
        compressed_tensors.read_quantization_config(section)
