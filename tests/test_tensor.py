from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte import QuantizedTensor
from halfbyte.errors import ConfigError


def parts(**overrides: Any) -> dict[str, Any]:
    return {
        "codes": torch.zeros(4, 10, dtype=torch.uint8),
        "scales": torch.ones(4, 3),
        "zeros": torch.zeros(4, 3, dtype=torch.uint8),
        "bits": 4,
        "group_size": 4,
        **overrides,
    }


def test_dequantize_follows_the_definition_with_a_short_last_group() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (4, 10), generator=generator, dtype=torch.uint8)
    scales = torch.rand(4, 3, generator=generator)
    zeros = torch.randint(16, (4, 3), generator=generator, dtype=torch.uint8)
    weight = QuantizedTensor(codes, scales, zeros, bits=4, group_size=4).dequantize()
    for n in range(4):
        for k in range(10):
            expected = scales[n, k // 4] * (int(codes[n, k]) - int(zeros[n, k // 4]))
            assert weight[n, k] == expected


def test_float_zeros_are_minima() -> None:
    tensor = QuantizedTensor(**parts(codes=torch.full((4, 10), 3, dtype=torch.uint8), zeros=torch.full((4, 3), -0.5)))
    assert torch.equal(tensor.dequantize(), torch.full((4, 10), 2.5))
    assert torch.equal(tensor.offsets, tensor.zeros)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"codes": torch.zeros(4, 10)}, "codes"),
        ({"scales": torch.ones(4, 2)}, "scales"),
        ({"scales": torch.ones(4, 3).half()}, "scales"),
        ({"zeros": torch.zeros(3, 3, dtype=torch.uint8)}, "zeros"),
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"bias": torch.zeros(5)}, "bias"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_by_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: expected"):
        QuantizedTensor(**parts(**overrides))


def every_field(**overrides: Any) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(2)
    settings = parts(
        codes=torch.randint(16, (4, 10), generator=generator, dtype=torch.uint8),
        scales=torch.rand(4, 3, generator=generator),
        zeros=torch.randint(16, (4, 3), generator=generator, dtype=torch.uint8),
        group_index=torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 1, 0], dtype=torch.int32),
        input_scale=torch.rand(10, generator=generator) + 0.5,
        kept_columns=torch.tensor([1, 7], dtype=torch.int32),
        kept_weight=torch.randn(4, 2, generator=generator).bfloat16(),
        bias=torch.randn(4, generator=generator).half(),
    )
    return QuantizedTensor(**{**settings, **overrides})


def test_dequantize_honours_every_field() -> None:
    tensor = every_field()
    assert tensor.group_index is not None
    assert tensor.input_scale is not None
    assert tensor.kept_weight is not None
    weight = tensor.dequantize()
    for n in range(4):
        for k in range(10):
            g = int(tensor.group_index[k])
            expected = tensor.scales[n, g] * (int(tensor.codes[n, k]) - int(tensor.zeros[n, g]))
            if k in (1, 7):
                expected = tensor.kept_weight[n, (1, 7).index(k)].float()
            assert weight[n, k] == expected * tensor.input_scale[k]


def test_it_moves_and_weighs_as_a_whole() -> None:
    tensor = every_field()
    moved = tensor.to("meta")
    assert {part.device.type for part in vars(moved).values() if isinstance(part, torch.Tensor)} == {"meta"}
    assert tensor.nbytes == moved.nbytes == 40 + 48 + 12 + 40 + 40 + 8 + 16 + 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"group_index": torch.zeros(10)}, "group_index: expected torch.int32"),
        ({"group_index": torch.zeros(9, dtype=torch.int32)}, r"group_index: expected torch.int32 \[10\]"),
        ({"group_index": torch.full((10,), 3, dtype=torch.int32)}, r"group_index: expected numbers in \[0, 3\)"),
        ({"input_scale": torch.ones(10).half()}, "input_scale: expected torch.float32"),
        ({"kept_columns": None}, "kept_columns: expected, because"),
        ({"kept_weight": None}, "kept_weight: expected, because"),
        ({"kept_columns": torch.tensor([7, 1], dtype=torch.int32)}, "kept_columns: expected ascending"),
        ({"kept_columns": torch.tensor([1, 1], dtype=torch.int32)}, "kept_columns: expected ascending"),
        ({"kept_columns": torch.tensor([-1, 1], dtype=torch.int32)}, r"kept_columns: expected numbers in \[0, 10\)"),
        ({"kept_columns": torch.tensor([1], dtype=torch.int32)}, r"kept_weight: expected .* \[4, 1\]"),
        ({"kept_weight": torch.zeros(4, 2)}, "kept_weight: expected torch.float16 or torch.bfloat16"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, "bias: expected torch.float16"),
    ],
)
def test_optional_parts_that_contradict_the_rest_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        every_field(**overrides)
