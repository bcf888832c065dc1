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
