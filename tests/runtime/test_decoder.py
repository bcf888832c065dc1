"""The fused decoder against transformers, on tiny random models of every architecture it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import BASE, MODELS, greedy, in_fp32, relative, write_model

import halfbyte
from halfbyte import QuantConfig, QuantizedTensor
from halfbyte.architectures.records import FAMILIES
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.quantization.grid import Grid
from halfbyte.runtime.decoder import CACHE_TYPES, NativeDecoder
from halfbyte.runtime.head import HEAD_GROUP, quantize_head

PROMPT, STEPS = 70, 64


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp("model"))


def decoder_of(folder: Path, **settings: Any) -> NativeDecoder:
    engine = halfbyte.load(folder, backend="decoder", **settings).engine
    assert isinstance(engine, NativeDecoder)
    return engine


def test_logits_and_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    network, decoder = in_fp32(folder), decoder_of(folder)
    ids = torch.randint(320, (PROMPT,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(input_ids=ids[None]).logits[0]
    assert relative(decoder.logits(ids), expected) < 5e-3
    tokens, logits = greedy(network, ids, STEPS)
    session, step = decoder.session(PROMPT + STEPS), ids.tolist()
    for token, wanted in zip(tokens, logits, strict=True):
        found = session.step(step)
        assert relative(found, wanted) < 2e-2
        best = wanted.topk(2).values
        if float(best[0] - best[1]) > 0.05:
            assert int(found.argmax()) == token
        step = [token]


def test_a_quantized_model_computes_its_dequantized_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32 on every CPU: roundings of the reference's bf16 activations would be more than what is allowed here.
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    halfbyte.quantize(folder, tmp_path / "int4", QuantConfig("rtn", group_size=32), progress=False)
    ids = torch.randint(320, (PROMPT,), generator=torch.Generator().manual_seed(2))
    reference = halfbyte.load(tmp_path / "int4", backend="reference")
    expected = reference.logits(ids)
    exact = decoder_of(tmp_path / "int4", compute="a16", head_bits=16)
    assert set(exact.forms) == {"a16"}
    assert relative(exact.logits(ids), expected) < 5e-3
    fast = decoder_of(tmp_path / "int4", compute="a8", head_bits=16)
    assert set(fast.forms) == {"a8"}
    assert relative(fast.logits(ids), expected) < 6e-2


def test_every_known_family_is_tested() -> None:
    import transformers

    tested = {getattr(transformers, kind)().model_type for kind, _ in MODELS.values()}
    assert tested == set(FAMILIES)


@pytest.mark.parametrize(("compute", "cache_type"), [("a8", "fp16"), ("a8", "int8"), ("a16", "fp16"), ("half", "int8")])
def test_a_row_has_the_same_bits_in_any_company(tmp_path: Path, compute: str, cache_type: str) -> None:
    folder = write_model("llama", tmp_path / "model")
    if compute != "half":
        halfbyte.quantize(folder, tmp_path / "int4", QuantConfig("rtn", group_size=32), progress=False)
        decoder = decoder_of(tmp_path / "int4", compute=compute, cache=cache_type)
    else:
        decoder = decoder_of(folder, cache=cache_type)
    ids = torch.randint(320, (3, 300), generator=torch.Generator().manual_seed(3)).tolist()
    alone = decoder.logits(torch.tensor(ids[0]))
    cache = decoder.new_cache(3, 320)
    together = decoder.step(cache, [ids[0][:290], ids[1][:5], []], logits="all")[:290]
    assert torch.equal(together, alone[:290])
    found = [decoder.step(cache, [[ids[0][290]], [], []])[0]]
    found += list(decoder.step(cache, [ids[0][291:294], ids[1][5:7], ids[2][:1]], logits="all")[:3])
    cache.rollback(0, 2)
    found[2:] = list(decoder.step(cache, [ids[0][292:300], [], ids[2][1:20]], logits="all")[:8])
    assert torch.equal(torch.stack(found), alone[290:])


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path, cache_type: str) -> None:
    from halfbyte import _native

    decoder = decoder_of(write_model("gemma2", tmp_path), cache=cache_type)
    ids, before, found = torch.arange(40) * 7 % 320, _native.threads(), []
    try:
        for threads in (1, 2, 3):
            _native.set_threads(threads)
            found.append(decoder.logits(ids))
    finally:
        _native.set_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("tier", ["portable", "avx2"])
def test_every_tier_computes_the_same(tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte import _native

    if tier not in _native.available_tiers():
        pytest.skip(f"this CPU lacks {tier}")
    folder = write_model("qwen3", tmp_path / "model")
    halfbyte.quantize(folder, tmp_path / "int4", QuantConfig("rtn", group_size=32), progress=False)
    ids = torch.arange(50) * 11 % 320
    expected = halfbyte.load(tmp_path / "int4", compute="a8", head_bits=4).logits(ids)
    monkeypatch.setenv("HALFBYTE_ISA", tier)
    assert relative(decoder_of(tmp_path / "int4", compute="a8", head_bits=4).logits(ids), expected) < 1e-2


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 1e-2), (6, 4e-2), (4, 0.15)])
def test_a_head_in_fewer_bits_is_close(tmp_path: Path, bits: int, tolerance: float) -> None:
    folder = write_model("llama", tmp_path)
    ids = torch.arange(50) * 11 % 320
    plain, smaller = decoder_of(folder), decoder_of(folder, head_bits=bits)
    assert 0 < relative(smaller.logits(ids), plain.logits(ids)) < tolerance
    assert smaller.step_bytes < plain.step_bytes


@pytest.mark.parametrize(
    "keep", [{"keep_ratio": 0.1}, {"bits": 3}, {"bits": 8}, {"group_size": -1}, {"group_size": 40}]
)
def test_whatever_a_checkpoint_holds_is_run(tmp_path: Path, keep: dict[str, Any]) -> None:
    folder = write_model("llama", tmp_path / "model")
    config = QuantConfig("rtn", **{"group_size": 32, "format": "native", **keep})
    halfbyte.quantize(folder, tmp_path / "out", config, progress=False)
    ids = torch.arange(50) * 11 % 320
    reference = halfbyte.load(tmp_path / "out", backend="reference")
    assert relative(decoder_of(tmp_path / "out", head_bits=16).logits(ids), reference.logits(ids)) < 3e-2


def test_a_head_of_four_bits_is_searched_for_what_the_norm_weighs() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(300, 96, generator=generator).bfloat16()
    norm = (0.2 + 3 * torch.rand(96, generator=generator)).tolist()

    def error(head: QuantizedTensor) -> float:
        return float(((head.dequantize() - weight.float()) * torch.tensor(norm)).square().sum())

    for bits in (8, 6):
        nearest = Grid(bits, HEAD_GROUP, zero_point=True).quantize(weight)
        assert torch.equal(quantize_head(weight, norm, bits).codes, nearest.codes)
    searched, nearest = quantize_head(weight, norm, 4), Grid(4, HEAD_GROUP, zero_point=True).quantize(weight)
    assert error(searched) < 0.9 * error(nearest)
    assert error(searched) < error(quantize_head(weight, [1.0] * 96, 4))


@pytest.mark.parametrize("name", ["llama", "phi3, longrope"])
def test_a_batch_and_a_session_that_went_back_compute_what_each_computes_alone(tmp_path: Path, name: str) -> None:
    """Also where angles depend on the length: a long companion does not turn a short sequence."""
    decoder = decoder_of(write_model(name, tmp_path))
    ids = [torch.arange(n).mul(7 + n).remainder(320).tolist() for n in (5, 50, 20)]
    expected = torch.stack([decoder.logits(torch.tensor(one))[-1] for one in ids])
    batch = decoder.batch(3, 64)
    assert torch.equal(batch.step([ids[0][:4], ids[1][:40], ids[2]])[2], expected[2])
    assert torch.equal(batch.step([ids[0][4:], [], []])[0], expected[0])
    if name == "llama":  # keys of shorter sequences stay turned as they were
        assert torch.equal(batch.step([[], ids[1][40:], []])[0], expected[1])
    session = decoder.session(64)
    session.step([*ids[0], 1, 2])
    session.rollback(3)
    assert session.length == 4
    assert torch.equal(session.step(ids[0][4:]), expected[0])
    with pytest.raises(ConfigError, match="rollback: expected 0 to 5 tokens, got 6"):
        session.rollback(6)


def test_a_session_in_transformers_goes_back_too(tmp_path: Path) -> None:
    engine = halfbyte.load(write_model("llama", tmp_path), backend="transformers").engine
    session = engine.session(64)
    expected = session.step([1, 2, 3, 4])
    session.step([5])
    session.rollback(2)
    assert session.length == 3
    torch.testing.assert_close(session.step([4]), expected)
    with pytest.raises(ConfigError, match="rollback: expected 0 to 4 tokens, got 5"):
        session.rollback(5)


def test_bad_steps_are_refused_and_change_nothing(tmp_path: Path) -> None:
    decoder = decoder_of(write_model("llama", tmp_path))
    cache = decoder.new_cache(2, 16)
    decoder.step(cache, [[1, 2], []])
    for tokens, says in [
        ([[1] * 15, []], "context: 17 tokens do not fit into a cache of 16"),
        ([[320], []], "token_ids: expected ids in"),
        ([[-1], []], "token_ids: expected ids in"),
        ([[], []], "at least one"),
        ([[1]], "each of 2 sequences"),
        ([], "each of 2 sequences"),
    ]:
        with pytest.raises(ConfigError, match=says):
            decoder.step(cache, tokens)
    with pytest.raises(ConfigError, match="logits"):
        decoder.step(cache, [[1], []], logits="some")
    with pytest.raises(ConfigError, match="rollback"):
        cache.rollback(0, 3)
    for sequences, capacity in ((0, 16), (1, 0), (-1, 16), (1, 1 << 40)):
        with pytest.raises(ConfigError, match=f"cache: expected 1 to .* got {sequences} and {capacity}"):
            decoder.new_cache(sequences, capacity)
    assert cache.lengths == [2, 0]


def test_what_the_decoder_does_not_know_runs_in_transformers(tmp_path: Path) -> None:
    import transformers

    config = transformers.StableLmConfig(**{**BASE, "hidden_size": 96})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = halfbyte.load(tmp_path)
    assert model.engine.name == "transformers"
    assert model.not_fused is not None
    assert "stablelm" in model.not_fused
    with pytest.raises(UnsupportedError, match="stablelm"):
        halfbyte.load(tmp_path, backend="decoder")


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(halfbyte.HalfbyteError, match=r"mlp\.gate_proj\.weight: expected shape \[128, 96\]"):
        halfbyte.load(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"compute": "a4"}, "compute"),
        ({"head_bits": 5}, "head_bits"),
        ({"cache": "int4"}, "cache: expected auto, fp16 or int8"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    folder = write_model("llama", tmp_path)
    with pytest.raises(ConfigError, match=says):
        halfbyte.load(folder, **settings)
