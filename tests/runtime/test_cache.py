"""What the decoder keeps of a sequence: in 8 bits or 16, all of it or a ring as long as a sliding window needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte import _native
from halfbyte.errors import UnsupportedError
from halfbyte.runtime.decoder import CACHE_TYPES, DecoderCache, NativeDecoder
from tests.runtime.test_decoder import decoder_of, relative, write_model

IDS = torch.randint(320, (900,), generator=torch.Generator().manual_seed(5)).tolist()


def whole_cache(decoder: NativeDecoder, capacity: int) -> DecoderCache:
    """One that keeps every position of every layer, whatever the windows."""
    record, int8 = decoder.record, decoder.cache == "int8"
    windows = [0] * record.layers
    return DecoderCache(_native.KvCache(windows, 1, record.kv_heads, record.head_dim, capacity, int8=int8))


def test_8_bits_are_close_to_16_and_take_half_the_room(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path)
    ids = torch.tensor(IDS[:300])
    plain, smaller = decoder_of(folder, cache="fp16"), decoder_of(folder, cache="int8")
    assert decoder_of(folder).cache == "fp16"
    assert 0 < relative(smaller.logits(ids), plain.logits(ids)) < 2e-2
    head_dim = plain.record.head_dim
    room = smaller.new_cache(2, 320).nbytes / plain.new_cache(2, 320).nbytes
    assert room == pytest.approx((head_dim + 4) / (2 * head_dim))


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_a_ring_gives_the_bits_of_a_whole_cache_and_takes_less(tmp_path: Path, name: str, cache_type: str) -> None:
    decoder = decoder_of(write_model(name, tmp_path), cache=cache_type)
    ring, whole = decoder.new_cache(1, len(IDS)), whole_cache(decoder, len(IDS))
    slots = [512 if window else 912 for window in decoder.record.windows]
    assert ring.nbytes * 912 * len(slots) == whole.nbytes * sum(slots)
    expected = decoder.step(whole, [IDS], logits="all")
    found, at = torch.empty_like(expected), 0
    for count in (300, 1, 2, 255, 256, 1, 85):
        found[at : at + count] = decoder.step(ring, [IDS[at : at + count]], logits="all")
        at += count
    assert at == len(IDS)
    assert torch.equal(found, expected)
    # Back by all that is promised, at once and in parts, and on in other steps.
    for back, count in ((256, 256), (100, 1), (155, 3), (4, 256)):
        ring.rollback(0, back)
        at = ring.lengths[0]
        new = IDS[at : at + count]
        assert torch.equal(decoder.step(ring, [new], logits="all"), expected[at : at + count])


def test_a_rollback_beyond_the_ring_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    decoder = decoder_of(write_model("mistral", tmp_path))
    cache = decoder.new_cache(1, len(IDS))
    decoder.step(cache, [IDS[:800]], logits="none")
    most = 512 - 24 + 1
    refusal = f"at most {most} tokens, or all 800, got {most + 1}: sliding windows keep"
    with pytest.raises(UnsupportedError, match=refusal):
        cache.rollback(0, most + 1)
    assert cache.lengths == [800]
    cache.rollback(0, 300)
    with pytest.raises(UnsupportedError, match=f"at most {most - 300} tokens"):
        cache.rollback(0, most - 299)
    cache.rollback(0, most - 300)
    expected = decoder.logits(torch.tensor(IDS[:600]))
    assert torch.equal(decoder.step(cache, [IDS[800 - most : 600]], logits="all"), expected[800 - most :])
    cache.rollback(0, 600)
    assert torch.equal(decoder.step(cache, [IDS[:600]], logits="all"), expected)


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    decoder = decoder_of(write_model("mistral", tmp_path / "a"))
    other = decoder_of(write_model("llama with one query head a group", tmp_path / "b"))
    with pytest.raises(ValueError, match="cache: made for another model"):
        decoder.step(other.new_cache(1, 16), [[1]])
    record = decoder.record
    narrow = _native.KvCache([8] * record.layers, 1, record.kv_heads, record.head_dim, 4096, int8=False)
    assert decoder.step(DecoderCache(narrow), [[1]]).shape == (1, 320)  # its rings have room to spare
    for window, capacity in ((0, 0), (-1, 16)):
        with pytest.raises(ValueError, match="cache: "):
            _native.KvCache([window], 1, 1, 16, capacity, int8=False)
