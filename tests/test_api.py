from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import halfbyte


def test_every_public_name_resolves() -> None:
    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None
        assert name in dir(halfbyte)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = halfbyte.quantise  # type: ignore[attr-defined]


def test_importing_halfbyte_imports_neither_torch_nor_transformers() -> None:
    code = "import halfbyte, halfbyte.cli, sys; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_signatures_promised_in_0_1() -> None:
    quantize = inspect.signature(halfbyte.quantize).parameters
    assert list(quantize) == [
        "model", "output_dir", "config", "calibration", "max_calib_samples", "max_calib_seq_len", "seed", "device",
        "memory_budget", "ray", "overwrite", "progress",
    ]  # fmt: skip
    assert list(inspect.signature(halfbyte.load).parameters) == [
        "path", "device", "backend", "compute", "head_bits", "cache", "threads", "fuse_layers", "modules_to_fuse",
        "fuse_max_seq_len", "device_map", "max_memory",
    ]  # fmt: skip
    assert list(inspect.signature(halfbyte.perplexity).parameters) == ["model", "text", "window"]
    generate = inspect.signature(halfbyte.Model.generate).parameters
    assert set(generate) >= {"prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stream"}
    assert set(generate) >= {"min_p", "repetition_penalty", "stop", "return_details"}
