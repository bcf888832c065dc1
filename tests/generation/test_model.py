from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import CheckpointError, ConfigError, HalfbyteError, UnsupportedError


@pytest.fixture(scope="module")
def model(quantized_llama: Path) -> halfbyte.Model:
    return halfbyte.load(quantized_llama)


def test_greedy_follows_the_logits_without_a_cache(model: halfbyte.Model) -> None:
    """The cached loop agrees with scoring the whole sequence anew for every token."""
    ids = model.encode("The 3th crow sat").tolist()
    expected = []
    for _ in range(12):
        token = int(model.logits(ids)[-1].argmax())
        if token in model.stop_ids:
            break
        expected.append(token)
        ids.append(token)
    assert model.generate("The 3th crow sat", max_new_tokens=12) == model.tokenizer.decode(expected)


def test_streamed_pieces_make_the_whole_text(model: halfbyte.Model) -> None:
    for seed in range(4):
        settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": seed}
        pieces = list(model.generate("The", stream=True, **settings))
        assert "".join(pieces) == model.generate("The", **settings)


def test_the_same_seed_repeats_and_another_does_not(model: halfbyte.Model) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    a, b, c = (model.generate("The", seed=seed, **settings) for seed in (1, 1, 2))
    assert a == b != c


def test_an_end_of_sequence_token_ends_it(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = int(model.logits(model.encode("The"))[-1].argmax())
    monkeypatch.setattr(model, "stop_ids", frozenset({first}))
    assert model.generate("The", max_new_tokens=5) == ""


def test_the_text_ends_before_a_stop_string_that_spans_tokens(model: halfbyte.Model) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3}
    whole = model.generate("The", **settings)
    stop = whole[10:16]
    end = whole.index(stop)
    stream = model.generate("The", stop=["never there", stop], stream=True, **settings)
    assert "".join(stream) == whole[:end]
    found = stream.generation
    assert found is not None
    assert (found.text, found.finish_reason) == (whole[:end], "stop")
    assert 2 < found.new_tokens < 40
    assert stop in model.tokenizer.decode(found.token_ids)


def test_details_say_why_it_ended_and_how_many_tokens_it_has(
    model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.encode("The").tolist()
    found = model.generate("The", max_new_tokens=5, return_details=True)
    assert (found.finish_reason, found.new_tokens, found.prompt_tokens) == ("length", 5, len(ids))
    assert found.text == model.tokenizer.decode(found.token_ids) == model.generate("The", max_new_tokens=5)
    assert found.prefill_seconds > 0
    assert found.tokens_per_second == 4 / found.decode_seconds
    monkeypatch.setattr(model, "stop_ids", frozenset({found.token_ids[0]}))
    found = model.generate("The", max_new_tokens=5, return_details=True)
    assert (found.text, found.finish_reason, found.token_ids) == ("", "stop", ())
    assert found.tokens_per_second is None


def test_a_stream_knows_the_details_when_it_has_ended(model: halfbyte.Model) -> None:
    stream = model.generate("The", max_new_tokens=5, stream=True)
    assert stream.generation is None
    pieces = list(stream)
    assert stream.generation is not None
    assert stream.generation.text == "".join(pieces)
    assert stream.generation.new_tokens == 5


def test_greedy_under_a_penalty_is_that_of_transformers(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = halfbyte.load(tiny_llama, backend="transformers")
    ids = model.encode("The 3th crow sat")
    expected = network.generate(ids[None], max_new_tokens=24, do_sample=False, repetition_penalty=1.3, eos_token_id=-1)
    found = model.generate("The 3th crow sat", max_new_tokens=24, repetition_penalty=1.3, return_details=True)
    assert list(found.token_ids) == expected[0, len(ids) :].tolist()[: found.new_tokens]
    assert found.token_ids != model.generate("The 3th crow sat", max_new_tokens=24, return_details=True).token_ids


PROMPTS = ["The", "One crow counted 49 acorns on the old oak, and", "branch"]


@pytest.mark.parametrize("backend", ["decoder", "transformers"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 200, "repetition_penalty": 1.1}])
def test_a_prompt_of_several_gets_the_text_it_gets_alone(
    quantized_llama: Path, backend: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = halfbyte.load(quantized_llama, backend=backend)
    alone = [
        model.generate(prompt, max_new_tokens=24, seed=7 + i, return_details=True, **settings)
        for i, prompt in enumerate(PROMPTS)
    ]
    # Ended by different tokens, at different lengths, in one place by none.
    monkeypatch.setattr(model, "stop_ids", frozenset({alone[0].token_ids[5]}))
    alone = [
        model.generate(prompt, max_new_tokens=24, seed=7 + i, return_details=True, **settings)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert len({one.new_tokens for one in alone}) > 1
    together = model.generate(PROMPTS, max_new_tokens=24, seed=7, return_details=True, **settings)
    assert [(one.token_ids, one.text, one.finish_reason) for one in together] == [
        (one.token_ids, one.text, one.finish_reason) for one in alone
    ]
    assert model.generate(PROMPTS, max_new_tokens=24, seed=7, **settings) == [one.text for one in alone]


def test_the_same_prompt_several_times_is_sampled_several_ways(model: halfbyte.Model) -> None:
    texts = model.generate(["The"] * 4, max_new_tokens=16, temperature=1.5, seed=0)
    assert len(set(texts)) == 4
    assert model.generate(["The"] * 4, max_new_tokens=16, temperature=1.5, seed=0) == texts


def test_several_prompts_take_one_call_a_step(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = model.engine.step  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "stop_ids", frozenset())
    monkeypatch.setattr(model.engine, "step", lambda cache, tokens: calls.append(tokens) or step(cache, tokens))
    model.generate(PROMPTS, max_new_tokens=4)
    assert [[len(new) for new in tokens] for tokens in calls[1:]] == [[1, 1, 1]] * 3


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (["a", "b"], {"stream": True}, "^stream: only one prompt"),
        (["a", {"role": "user", "content": "b"}], {}, "^prompt: expected a string, a list of messages"),
        (["a", ""], {}, "^prompt: empty"),
        ("a \udcff", {}, r"^prompt: not UTF-8 text \(character 2\)"),
        ([], {}, "^prompt: empty"),
        ("a", {"stream": True, "return_details": True}, "^return_details: a stream"),
        ("a", {"stop": ""}, "^stop: expected"),
        ("a", {"min_p": 2.0}, "^min_p: expected"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: halfbyte.Model, prompt: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate(prompt, **settings)


def test_unquantized_folders_load_too_and_give_transformers_logits(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(320, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits[0].float()
    model = halfbyte.load(tiny_llama, backend="transformers")
    assert not model.quantized
    assert model.kernels == {}
    torch.testing.assert_close(model.logits(ids[0]), expected)
    fused = halfbyte.load(tiny_llama)
    assert fused.engine.name == "decoder"
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids).logits[0]
    assert float((fused.logits(ids[0]) - expected).norm() / expected.norm()) < 2e-3


def test_a_backend_nobody_knows_is_refused_for_any_model(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="backend: expected one of auto, decoder, transformers, cuda, .*, got 'fast'"):
        halfbyte.load(tiny_llama, backend="fast")


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_every_backend_gives_the_same_logits(
    quantized_llama: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    found = halfbyte.load(quantized_llama, backend=backend)
    assert set(found.kernels) == {backend}
    ids = torch.randint(320, (30,), generator=torch.Generator().manual_seed(0))
    expected = halfbyte.load(quantized_llama, compute="a16", head_bits=16).logits(ids)
    assert float((found.logits(ids) - expected).norm() / expected.norm()) < 1e-2


def test_memory_counts_packed_weights_and_tied_ones_once(tiny_llama: Path, model: halfbyte.Model) -> None:
    original, fused = halfbyte.load(tiny_llama, backend="transformers"), halfbyte.load(tiny_llama)
    parameters = sum(p.numel() for p in original.network.parameters())
    norms = sum(p.numel() for p in original.network.parameters() if p.ndim == 1)
    assert original.nbytes == 2 * parameters
    assert fused.nbytes == 2 * (parameters - norms)
    assert halfbyte.load(model.folder, head_bits=16).nbytes < fused.nbytes


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one token"),
        ([[1, 2]], "one sequence"),
        ([1, 320], r"expected ids in \[0, 320\)"),
        ([-1], r"expected ids in \[0, 320\)"),
    ],
)
def test_bad_token_ids_are_refused(model: halfbyte.Model, ids: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.logits(ids)


def test_bad_prompts_and_lengths_are_refused(model: halfbyte.Model) -> None:
    with pytest.raises(ConfigError, match="prompt: empty"):
        model.generate("")
    with pytest.raises(ConfigError, match="no chat template"):
        model.generate([{"role": "user", "content": "hi"}])
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.generate("The", max_new_tokens=0)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"backend": "marlin", "device": "cpu"}, UnsupportedError, "backend marlin: runs on cuda, not on cpu"),
        ({"backend": "bitsandbytes"}, UnsupportedError, "backend bitsandbytes: computes in NF4"),
        ({"device": "tpu"}, ConfigError, "device 'tpu'"),
    ],
)
def test_bad_backends_and_devices_are_refused(
    quantized_llama: Path, settings: dict[str, str], kind: type[HalfbyteError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        halfbyte.load(quantized_llama, **settings)


def rewritten(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with some tensors replaced or left out."""
    from halfbyte.checkpoints.reader import Checkpoint

    checkpoint = Checkpoint.open(source)
    with CheckpointWriter(target) as writer:
        for name in checkpoint.names():
            tensor = changes.get(name, checkpoint.read(name))
            if tensor is not None:
                writer.add(name, tensor)
        writer.add_json("config.json", checkpoint.config)
        writer.copy_files_from(source)
        writer.commit()
    return target


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{NAME}.scales": None}, f"tensor {NAME}.scales: missing"),
        ({f"{NAME}.qzeros": torch.zeros(1, 8, dtype=torch.int32)}, f"tensor {NAME}.qzeros: expected"),
        ({f"{NAME}.qweight": None}, f"tensor {NAME}.weight: the config implies it, the checkpoint lacks it"),
        ({"model.norm.weight": torch.ones(63)}, r"tensor model.norm.weight: expected shape \[64\] .* found \[63\]"),
        ({"model.embed_tokens.weight": None}, "tensor model.embed_tokens.weight: .* lacks it"),
    ],
)
def test_a_checkpoint_with_a_wrong_tensor_is_refused_by_name(
    quantized_llama: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = rewritten(quantized_llama, tmp_path / "broken", **changes)
    with pytest.raises(CheckpointError, match=message):
        halfbyte.load(folder)


def test_another_quantization_method_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "bitsandbytes"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UnsupportedError, match="quantization method 'bitsandbytes'"):
        halfbyte.load(folder)


def test_an_architecture_transformers_does_not_know_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "alien"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "alien", "architectures": ["Alien"]}))
    with pytest.raises(UnsupportedError, match="model type `alien`") as error:
        halfbyte.load(folder)
    assert "\n" not in str(error.value)
