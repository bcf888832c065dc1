"""Where the bytes are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.analysis.memory import EMBEDDING, HALVES, HEAD, QUANTIZED, SMALL, memory_map
from halfbyte.architectures.records import decoder_record
from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats.layouts import read_layout
from halfbyte.runtime import loading
from halfbyte.runtime.torch_decoder_loading import load_torch_decoder
from tests.conftest import TEXT, make_llama

# Two layers of 64 × 64 (q, o), 32 × 64 (k, v) and three of 96 × 64.
NORMS = 5 * 64
LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


def test_every_byte_of_a_quantized_checkpoint_is_of_one_kind(quantized_llama: Path) -> None:
    found = memory_map(quantized_llama, progress=False)
    entries = {entry.kind: entry for entry in found.entries}
    assert set(entries) == {QUANTIZED, EMBEDDING, HEAD, SMALL}
    assert found.total.disk_bytes == Checkpoint.open(quantized_llama).total_bytes
    parts = {entry.kind: entry.disk_bytes for entry in found.parts}
    assert parts == {"codes": LINEARS // 2, "scales": LINEARS // 32 * 2, "zero points": LINEARS // 32 // 2}
    assert entries[QUANTIZED].disk_bytes == sum(parts.values())
    assert (entries[QUANTIZED].weights, entries[QUANTIZED].half_bytes) == (LINEARS, 2 * LINEARS)
    assert entries[EMBEDDING].disk_bytes == entries[EMBEDDING].half_bytes == 320 * 64 * 2
    assert entries[SMALL].disk_bytes == NORMS * 2


def test_what_is_held_is_what_the_engine_says(quantized_llama: Path) -> None:
    found = memory_map(quantized_llama, progress=False)
    entries = {entry.kind: entry for entry in found.entries}
    decoder = halfbyte.load(quantized_llama).engine
    assert (found.engine, found.head_bits) == ("decoder", 8)
    assert found.total.run_time_bytes == decoder.nbytes + NORMS * 4
    assert entries[HEAD].run_time_bytes == decoder.matrices["lm_head"].nbytes  # type: ignore[attr-defined]
    assert entries[HEAD].disk_bytes == 0
    assert found.cache_bytes_per_token == 2 * 2 * 32 * 2  # layers × keys and values × channels × fp16


def test_the_decoder_of_a_gpu(quantized_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the decoder itself on the CPU."""
    checkpoint, network = Checkpoint.open(quantized_llama), build_skeleton(str(quantized_llama), torch.bfloat16)
    record = decoder_record(network.config)
    assert not isinstance(record, str)
    layout = read_layout(checkpoint.config)
    decoder = load_torch_decoder(network, checkpoint, record, layout, torch.device("cpu"), kernel="native")
    monkeypatch.setattr(loading, "load_model", lambda _: SimpleNamespace(engine=decoder))
    found = memory_map(quantized_llama, progress=False)
    entries = {entry.kind: entry for entry in found.entries}
    assert (found.engine, found.head_bits) == ("decoder", 16)
    assert found.total.run_time_bytes == decoder.nbytes
    assert 0.5 * LINEARS < entries[QUANTIZED].run_time_bytes < LINEARS
    assert entries[EMBEDDING].run_time_bytes == 320 * 64 * 2
    assert entries[SMALL].run_time_bytes == NORMS * 2
    assert found.cache_bytes_per_token == 2 * 2 * 32 * 2


def test_an_unquantized_model_whose_head_is_its_own(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", tie_word_embeddings=False)
    found = memory_map(folder, progress=False)
    entries = {entry.kind: entry for entry in found.entries}
    assert set(entries) == {HALVES, EMBEDDING, HEAD, SMALL}
    assert not found.parts
    assert entries[HEAD].disk_bytes == entries[HEAD].half_bytes == 320 * 64 * 2
    assert found.total.disk_bytes == found.total.half_bytes
    assert found.total.run_time_bytes == halfbyte.load(folder).engine.nbytes + NORMS * 4


def test_transformers_and_what_is_left_in_16_bit(tiny_llama: Path, tmp_path: Path) -> None:
    """A layout of halfbyte's own, columns kept, a module skipped; on an architecture the decoder does not know."""
    from tests.conftest import make_tokenizer
    from tests.quantization.zoo import save

    save("stablelm", tmp_path / "model", make_tokenizer)
    config = QuantConfig(keep_ratio=0.05, modules_to_not_convert=("self_attn.v_proj",))
    halfbyte.quantize(
        tmp_path / "model", tmp_path / "out", config, calibration=[TEXT], max_calib_samples=2, max_calib_seq_len=64,
        progress=False,
    )  # fmt: skip
    found = memory_map(tmp_path / "out", progress=False)
    entries = {entry.kind: entry for entry in found.entries}
    assert (found.engine, found.head_bits, found.cache_bytes_per_token) == ("transformers", None, None)
    assert {part.kind for part in found.parts} >= {"codes", "scales", "zero points", "columns kept in 16 bit"}
    assert entries[HALVES].weights == 2 * 32 * 64
    assert found.total.run_time_bytes == halfbyte.load(tmp_path / "out").engine.nbytes


def test_headers_are_enough_for_the_files(quantized_llama: Path) -> None:
    found = memory_map(quantized_llama, run_time=False, progress=False)
    assert found.engine is None
    assert found.total.run_time_bytes is None
    assert all(entry.run_time_bytes is None for entry in found.entries)
    assert [entry.disk_bytes for entry in found.entries] == [
        entry.disk_bytes for entry in memory_map(quantized_llama, progress=False).entries if entry.disk_bytes
    ]
