from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
import halfbyte.generation.model
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


def test_a_character_is_streamed_once_all_its_bytes_are_there(
    model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The crow \N{BIRD} sat\nand ate \u00e9clairs"
    ids = model.tokenizer(text)["input_ids"]
    assert any(model.tokenizer.decode([i]) == "\ufffd" for i in ids), "no token holds a part of a character"
    monkeypatch.setattr(halfbyte.generation.model, "generate_tokens", lambda *args, **kwargs: iter(ids))
    pieces = list(model.generate("The", stream=True))
    assert "".join(pieces) == text
    assert len(pieces) > 6
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_same_seed_repeats_and_another_does_not(model: halfbyte.Model) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    a, b, c = (model.generate("The", seed=seed, **settings) for seed in (1, 1, 2))
    assert a == b != c


def test_an_end_of_sequence_token_ends_it(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = int(model.logits(model.encode("The"))[-1].argmax())
    monkeypatch.setattr(model, "stop_ids", frozenset({first}))
    assert model.generate("The", max_new_tokens=5) == ""


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


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_every_backend_gives_the_same_logits(quantized_llama: Path, backend: str) -> None:
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
        ({"backend": "marlin"}, ConfigError, "backend 'marlin': expected \"auto\" or one of native, torch, reference"),
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

    folder = tmp_path / "gptq"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match="quantization method 'gptq'"):
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
