from __future__ import annotations

from typing import Any

import pytest

from halfbyte import QuantConfig
from halfbyte.errors import ConfigError


@pytest.mark.parametrize(
    ("widths", "expected"),
    [([("a", 256), ("b", 1024)], 128), ([("a", 576), ("b", 1536)], 64), ([("a", 96), ("b", 64)], 32)],
)
def test_auto_is_the_largest_size_that_divides_every_layer(widths: list[tuple[str, int]], expected: int) -> None:
    assert QuantConfig().resolved(widths).group_size == expected


def test_auto_names_the_layer_when_nothing_divides() -> None:
    with pytest.raises(ConfigError, match="down_proj with 172 input channels"):
        QuantConfig().resolved([("q_proj", 64), ("down_proj", 172)])


def test_an_explicit_size_that_does_not_divide_names_the_layer_and_what_would_work() -> None:
    with pytest.raises(ConfigError, match=r"128 does not divide q_proj with 576 .* work: 64, 32, -1"):
        QuantConfig(group_size=128).resolved([("q_proj", 576)])


def test_whole_rows_always_work() -> None:
    assert QuantConfig(group_size=-1).resolved([("a", 172)]).group_size == -1


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"method": "gptq2"}, "method"),
        ({"bits": 5}, "bits"),
        ({"bits": 3, "format": "gemm"}, "bits"),
        ({"importance": "l3"}, "importance"),
        ({"rounding": "up"}, "rounding"),
        ({"sweeps": -1}, "sweeps"),
        ({"sweeps": 2}, "sweeps"),
        ({"format": "marlin"}, "format"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": "big"}, "group_size"),
        ({"n_grid": 0}, "n_grid"),
        ({"duo_scaling": "x"}, "duo_scaling"),
        ({"method": "rtn", "propagate": True}, "propagate: method rtn looks at no activations"),
        ({"target_bits": "4"}, "target_bits"),
        ({"target_bits": float("nan")}, "target_bits"),
        ({"target_bits": 0}, "target_bits"),
        ({"target_bits": 4.25, "format": "gemm"}, "target_bits"),
        ({"target_bits": 4.25, "bits": 3}, "bits: target_bits chooses"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        QuantConfig(**bad)


def test_dictionaries_go_round() -> None:
    config = QuantConfig(group_size=64, zero_point=False, modules_to_not_convert=("self_attn.v_proj",))
    assert QuantConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="^group: no such quantization option"):
        QuantConfig.from_dict({"group": 64})


def test_skips_compares_whole_components_of_a_name() -> None:
    config = QuantConfig(modules_to_not_convert=("mlp.gate", "v_proj"))
    assert config.skips("model.layers.0.mlp.gate")
    assert not config.skips("model.layers.0.mlp.gate_proj")
    assert config.skips("model.layers.11.self_attn.v_proj")


def test_a_method_fills_in_the_stages_that_were_left_open() -> None:
    assert (QuantConfig().scale, QuantConfig().clip, QuantConfig().rounding) == (True, True, "nearest")
    assert QuantConfig("awq-l2").importance == "l2"
    assert not QuantConfig("rtn").calibrated
    best = QuantConfig("best", clip=False)
    assert (best.scale, best.clip, best.rounding, best.sweeps) == (True, False, "compensated", 3)
    assert QuantConfig("rtn", rounding="compensated").calibrated


def test_autoawq_spellings_are_understood() -> None:
    config = QuantConfig.from_dict({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    assert config == QuantConfig(group_size=64, format="gemm")
    with pytest.raises(ConfigError, match="^version 'GEMV'"):
        QuantConfig.from_dict({"version": "GEMV"})
    with pytest.raises(ConfigError, match="^w_bit: says the same"):
        QuantConfig.from_dict({"bits": 4, "w_bit": 4})


def test_groups_need_not_divide_in_the_native_layout() -> None:
    assert QuantConfig(group_size=128, format="native").resolved([("q_proj", 576)]).group_size == 128
