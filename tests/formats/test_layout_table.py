from __future__ import annotations

from typing import Any

import pytest

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import awq, compressed_tensors, gemm, gemv, gemv_fast, gptq, marlin, native
from halfbyte.formats.awq import AwqConfig
from halfbyte.formats.layouts import read_layout

AWQ = {"group_size": 64, "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize(
    ("section", "keys", "scales", "bits"),
    [
        (gemm.quantization_config(**AWQ), gemm.KEYS, "scales", 4),
        (gemv.quantization_config(**AWQ), gemv.KEYS, "scales", 4),
        (gemv_fast.quantization_config(**AWQ), gemv_fast.KEYS, "scales", 4),
        (gemv_fast.quantization_config(**AWQ, llm_awq=True), gemv_fast.LLM_AWQ_KEYS, "scales", 4),
        (marlin.quantization_config(**AWQ), marlin.KEYS, "scales", 4),
        ({"quant_method": "marlin", "group_size": 128}, marlin.IST_KEYS, "s", 4),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, marlin.IST_KEYS, "s", 4),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, marlin.IST_KEYS, "s", 4),
        (gptq.quantization_config(**AWQ), gptq.KEYS, "scales", 4),
        (gptq.quantization_config(**AWQ, version=1), gptq.KEYS, "scales", 4),
        (compressed_tensors.quantization_config(group_size=64, ignore=[]), compressed_tensors.KEYS, "weight_scale", 4),
        (native.quantization_config(bits=3, **AWQ), native.KEYS, "scales", None),
        # AutoAWQ's and AutoGPTQ's old files do not name the method.
        ({"w_bit": 4, "q_group_size": 128, "version": "GEMV", "zero_point": True}, gemv.KEYS, "scales", 4),
        ({"bits": 4, "group_size": 128, "desc_act": True, "sym": True}, gptq.KEYS, "scales", 4),
    ],
)
def test_every_layout_is_recognised(section: dict[str, Any], keys: tuple[str, ...], scales: str, bits: int) -> None:
    layout = read_layout({"quantization_config": section})
    assert layout is not None
    assert (layout.marker, layout.keys, layout.scales, layout.bits) == (keys[0], keys, scales, bits)


def test_a_model_that_is_not_quantized_has_none() -> None:
    assert read_layout({}) is None


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (awq.quantization_config("gemm", **AWQ), AwqConfig("gemm", 64, ("lm_head",))),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, AwqConfig("gemm", 64, ())),
        ({"w_bit": 4, "q_group_size": 128, "version": "GEMV_FAST"}, AwqConfig("gemv_fast", 128, ())),
        ({"quant_method": "awq", "bits": 4, "group_size": -1, "checkpoint_format": "gemm"}, AwqConfig("gemm", -1, ())),
        ({"quant_method": "awq", "modules_to_not_convert": None}, AwqConfig("gemm", 128, ())),
    ],
)
def test_old_spellings_of_awq_are_understood(section: dict[str, Any], expected: AwqConfig) -> None:
    assert awq.read_quantization_config(section) == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantization method 'bitsandbytes': this version of halfbyte reads awq"),
        ({"quant_method": "awq", "version": "exllama"}, "quantization method 'awq', version 'exllama'"),
        ({"quant_method": ["awq"]}, "quantization method .'awq'.: this version"),
        ({"bits": 4}, "quantization method None: this version"),
        ({"quant_method": "awq", "bits": 8}, "bits 8"),
        ({"quant_method": "awq", "bits": 4.0}, "bits 4.0"),
        ({"quant_method": "awq", "group_size": "big"}, "group_size 'big'"),
        ({"quant_method": "awq", "version": "gemv", "group_size": 0}, "group_size 0"),
        ({"quant_method": "awq", "modules_to_not_convert": "lm_head"}, "expected a list of strings"),
        ({"quant_method": "marlin", "group_size": "big"}, "group_size 'big'"),
        ([], "quantization_config: expected an object"),
    ],
)
def test_sections_that_cannot_be_read_are_refused(section: Any, message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=f"^config.json: .*{message}"):
        read_layout({"quantization_config": section})
