"""What the bench verb counts and refuses; how fast anything is, no test asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.architectures.records import decoder_record
from halfbyte.errors import ConfigError, OutputError, UnsupportedError
from halfbyte.evaluation.bench import measure_decode, measure_kernels, measure_prefill
from halfbyte.evaluation.phases import measure_phases
from halfbyte.evaluation.shapes import SHAPES, write_random_model
from halfbyte.runtime.decoder import NativeDecoder
from tests.conftest import make_llama


@pytest.fixture(scope="module")
def model(quantized_llama: Path) -> halfbyte.Model:
    return halfbyte.load(quantized_llama)


def decoder_of(model: halfbyte.Model) -> NativeDecoder:
    assert isinstance(model.engine, NativeDecoder)
    return model.engine


def test_decode_counts_what_a_step_reads(model: halfbyte.Model) -> None:
    decoder = decoder_of(model)
    result = measure_decode(model, context=20, batch=3, threads=1, steps=4, rounds=2)
    assert (result.context, result.batch, result.threads, result.steps, result.rounds) == (20, 3, 1, 4, 2)
    assert result.weight_bytes + result.head_bytes == decoder.step_bytes
    # Two layers, two key-value heads of 16, keys and values, fp16; in the middle of the round 22 positions each.
    assert result.cache_bytes == 3 * 22 * 2 * 2 * 16 * 2 * 2
    assert result.bytes_per_token == (decoder.step_bytes + result.cache_bytes) / 3
    assert result.tokens_per_second == pytest.approx(3 / result.seconds_per_step)
    assert result.bandwidth_share == pytest.approx(result.bytes_per_token * result.tokens_per_second / result.bandwidth)


def test_a_window_bounds_what_is_read_of_the_cache(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, model_type="mistral")
    text = (folder / "config.json").read_text().replace('"llama"', '"mistral"').replace("LlamaFor", "MistralFor")
    (folder / "config.json").write_text(text.replace('"vocab_size"', '"sliding_window": 24, "vocab_size"'))
    decoder = decoder_of(halfbyte.load(folder))
    assert decoder.cache_bytes(10) < decoder.cache_bytes(24) == decoder.cache_bytes(500)


def test_prefill_counts_the_products(model: halfbyte.Model) -> None:
    result = measure_prefill(model, context=12, batch=2, threads=1, rounds=2)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96
    assert result.flops == 2 * 2 * (12 * 2 * layer + 320 * 64)
    assert result.tokens_per_second == pytest.approx(24 / result.seconds)


def test_kernels_cover_every_matrix_once(model: halfbyte.Model) -> None:
    decoder = decoder_of(model)
    results = measure_kernels(model, rows=(1, 3), threads=2, rounds=2)
    single = [result for result in results if result.rows == 1]
    assert {(r.out_features, r.in_features): r.matrices for r in single} == {
        (64, 64): 4, (32, 64): 4, (96, 64): 4, (64, 96): 2, (320, 64): 1,
    }  # fmt: skip
    assert all(result.ratio == 1 for result in single)
    assert [result.rows for result in results] == [1, 3] * 5
    assert sum(result.matrices * result.nbytes for result in single) == decoder.step_bytes


def test_phases_share_out_what_a_step_reads_and_takes(model: halfbyte.Model) -> None:
    decoder = decoder_of(model)
    *parts, whole = measure_phases(model, context=20, batch=2, threads=2, steps=3)
    assert [part.phase for part in parts][:5] == ["embedding", "qkv_input", "qkv", "keys", "attention"]
    assert len({part.phase for part in parts}) == len(parts) == 13
    assert all(part.seconds > 0 for part in parts if part.phase != "keys")  # part of qkv where there are few threads
    assert all(part.whole_seconds == whole.seconds for part in parts)
    assert sum(part.nbytes for part in parts) == whole.nbytes == decoder.step_bytes + 2 * decoder.cache_bytes(21)
    assert {part.phase for part in parts if part.nbytes} == {"qkv", "attention", "output", "gate_up", "down", "head"}
    assert whole.floor_seconds == pytest.approx(whole.nbytes / whole.bandwidth)


@pytest.mark.parametrize("threads", [1, 2])
def test_multiply_each_leaves_the_last_product(threads: int) -> None:
    from halfbyte import _native
    from halfbyte.device.cpu import native_threads
    from halfbyte.kernels.decoder_linear import half_linear

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 32, generator=generator).bfloat16() for _ in range(2)]
    linears = [half_linear(weight, None, _native.available_tiers()[0]) for weight in weights]
    x, y = torch.randn(5, 32, generator=generator), torch.empty(5, 40)
    with native_threads(threads):
        _native.multiply_each(linears, x.numpy(), y.numpy())
    torch.testing.assert_close(y, x @ weights[1].float().T)
    with pytest.raises(ValueError, match="must all be"):
        _native.multiply_each(linears, torch.empty(5, 31).numpy(), y.numpy())
    with pytest.raises(ValueError, match="at least one"):
        _native.multiply_each([], x.numpy(), y.numpy())


def test_threads_are_as_before_afterwards(model: halfbyte.Model) -> None:
    from halfbyte import _native

    before = _native.threads()
    measure_decode(model, threads=before + 1, steps=1, rounds=1)
    measure_prefill(model, context=2, threads=before + 1, rounds=1)
    assert _native.threads() == before


@pytest.mark.parametrize(
    ("measure", "settings", "says"),
    [
        (measure_decode, {"context": -1}, "context: expected at least 0, got -1"),
        (measure_decode, {"batch": 0}, "batch: expected at least 1, got 0"),
        (measure_decode, {"steps": 0}, "steps: expected at least 1, got 0"),
        (measure_decode, {"threads": 0}, "threads: expected at least 1, got 0"),
        (measure_prefill, {"context": 0}, "context: expected at least 1, got 0"),
        (measure_prefill, {"rounds": 0}, "rounds: expected at least 1, got 0"),
        (measure_kernels, {"rows": (2, 4)}, "rows: expected 1 first"),
        (measure_kernels, {"rows": ()}, "rows: expected at least 1"),
        (measure_kernels, {"rounds": 0}, "rounds: expected at least 1, got 0"),
    ],
)
def test_bad_numbers_are_refused(model: halfbyte.Model, measure: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        measure(model, **settings)


def test_another_engine_is_refused_with_the_reason(tiny_llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"backend transformers was asked for; use `halfbyte eval`"):
        measure_decode(halfbyte.load(tiny_llama, backend="transformers"))


def test_a_random_model_of_a_shape_runs_in_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 8,
             "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", sizes)
    write_random_model(tmp_path / "model", "tiny")
    model = halfbyte.load(tmp_path / "model")
    assert model.kernels == {"a8": 21}
    record = decoder_record(model.config)
    assert not isinstance(record, str)
    assert (record.hidden, record.layers, record.kv_heads, record.vocabulary) == (256, 3, 2, 320)
    assert bool(torch.isfinite(model.logits([1, 2, 3])).all())
    with pytest.raises(OutputError, match="not empty"):
        write_random_model(tmp_path / "model", "tiny")
    with pytest.raises(ConfigError, match="shape: expected 1b"):
        write_random_model(tmp_path / "other", "9b")
