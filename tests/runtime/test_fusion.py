"""Layer fusion inside transformers, on tiny random models of several architectures: fewer calls, the same results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.errors import ConfigError
from halfbyte.runtime import compute_dtype
from halfbyte.runtime.fused_norm import FusedNorm
from halfbyte.runtime.quant_linear import QuantLinear
from tests.conftest import make_tokenizer
from tests.quantization.zoo import save

QKV, GATE_UP = "q_proj + k_proj + v_proj", "gate_proj + up_proj"
# name in the zoo → products of several linears, norms in one call, linears whose product another gives; of two blocks
FOUND: dict[str, tuple[dict[str, int], int, int]] = {
    "llama": ({QKV: 2, GATE_UP: 2}, 5, 6),
    "mistral": ({QKV: 2, GATE_UP: 2}, 5, 6),
    "qwen2": ({QKV: 2, GATE_UP: 2}, 5, 6),  # with biases
    "qwen3": ({QKV: 2, GATE_UP: 2}, 9, 6),  # norms of q and k
    "gemma2": ({QKV: 2, GATE_UP: 2}, 9, 6),  # norms that multiply by 1 + w
    "starcoder2": ({QKV: 2}, 0, 4),  # LayerNorm
    "opt": ({"k_proj + v_proj + q_proj": 2}, 0, 4),
    "deepseek_v2": ({"q_a_proj + kv_a_proj_with_mqa": 2, GATE_UP: 2}, 9, 4),  # latent attention, a shared expert
    "qwen2_moe": ({QKV: 2, GATE_UP: 2}, 5, 6),
    "phi3": ({}, 5, 0),  # fused by its makers
    "gpt_neox": ({}, 0, 0),
    "bloom": ({}, 0, 0),
}


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 on every machine, so that one tolerance serves all."""
    monkeypatch.setattr(compute_dtype, "has_bf16_arithmetic", lambda: False)


@pytest.fixture(scope="module", params=FOUND)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder / "bf16", make_tokenizer)
    halfbyte.quantize(folder / "bf16", folder / "int4", QuantConfig("rtn", group_size=32), progress=False)
    return request.param, folder / "int4"


def load(folder: Path, **settings: Any) -> halfbyte.Model:
    return halfbyte.load(folder, backend="transformers", **settings)


def count_products(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> int:
    """Calls of `QuantLinear` while one token is computed."""
    calls: list[int] = []
    forward = QuantLinear.forward

    def counted(self: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "forward", counted)
        model.logits([5])
    return len(calls)


def kinds(model: halfbyte.Model) -> dict[str, int]:
    assert model.fused is not None
    return Counter(" + ".join(name.rpartition(".")[2] for name in group) for group in model.fused.linears)


def test_what_is_found_saves_products_and_changes_nothing(
    quantized: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = quantized
    plain, fused, linears = (
        load(folder),
        load(folder, fuse_layers=True),
        load(folder, fuse_layers=True, modules_to_fuse=["attention", "mlp"]),
    )
    products, norms, saved = FOUND[name]
    assert kinds(fused) == products
    assert fused.fused is not None
    assert len(fused.fused.norms) == norms
    assert count_products(plain, monkeypatch) - count_products(fused, monkeypatch) == saved
    assert fused.kernels == plain.kernels
    ids = torch.randint(320, (40,), generator=torch.Generator().manual_seed(0))
    expected = plain.logits(ids)
    assert torch.equal(linears.logits(ids), expected)
    assert float((fused.logits(ids) - expected).norm() / expected.norm()) < 1e-6
    prompt = "The 3th crow sat"
    assert fused.generate(prompt, max_new_tokens=24) == plain.generate(prompt, max_new_tokens=24) != ""


def test_batches_with_padding_and_a_cache_compute_the_same(quantized: tuple[str, Path]) -> None:
    _, folder = quantized
    ids = torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for model in (load(folder), load(folder, fuse_layers=True, modules_to_fuse=("attention", "mlp"))):
        with torch.no_grad():
            first = model.network(input_ids=ids, attention_mask=mask, use_cache=True)
            longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            second = model.network(
                input_ids=ids[:, :1], attention_mask=longer, past_key_values=first.past_key_values, use_cache=True
            )
        found.append(torch.cat([first.logits, second.logits], 1))
    assert torch.equal(*found)


def test_it_says_what_it_did(quantized: tuple[str, Path]) -> None:
    name, folder = quantized
    text = str(load(folder, fuse_layers=True).fused)
    products, norms, _ = FOUND[name]
    assert all(f"{count} × {kind}" in text for kind, count in products.items())
    assert (f"{norms} norms" in text) == bool(norms)
    if not products and not norms:
        assert text == "nothing: no two quantized linears of a module share an input"


def test_what_is_fused_can_be_chosen(quantized_llama: Path) -> None:
    everything = load(quantized_llama, fuse_layers=True)
    assert everything.fused is not None
    for wanted, products, norms in (
        (["attention"], {QKV: 2}, 0),
        (("mlp",), {GATE_UP: 2}, 0),
        (["layernorm"], {}, 5),
        ([], {}, 0),
        ({"attention": ["q_proj", "v_proj", "o_proj"], "hidden_size": 64}, {"q_proj + v_proj": 2}, 0),
        ({"mlp": None, "layernorm": ["norm"]}, {GATE_UP: 2}, 1),
    ):
        model = load(quantized_llama, fuse_layers=True, modules_to_fuse=wanted)
        assert model.fused is not None
        assert (kinds(model), len(model.fused.norms)) == (products, norms)
    assert load(quantized_llama).fused is None


def test_linears_of_unlike_codes_stay_apart_and_say_so(tiny_llama: Path, tmp_path: Path) -> None:
    """One v in 8 bits among 4: q and k are one product all the same."""
    from dataclasses import replace

    from halfbyte.checkpoints.reader import Checkpoint
    from halfbyte.checkpoints.writer import CheckpointWriter
    from halfbyte.formats import native

    halfbyte.quantize(tiny_llama, tmp_path / "a", QuantConfig("rtn", group_size=32, bits=3), progress=False)
    source = Checkpoint.open(tmp_path / "a")
    name = "model.layers.0.self_attn.v_proj"
    parts = {key: source.read(f"{name}.{key}") for key in native.KEYS if f"{name}.{key}" in source}
    wider = native.pack(replace(native.unpack(parts), bits=4))
    with CheckpointWriter(tmp_path / "b") as writer:
        for tensor in source.names():
            prefix, _, key = tensor.rpartition(".")
            writer.add(tensor, wider[key] if prefix == name and key in wider else source.read(tensor))
        writer.add_json("config.json", source.config)
        writer.copy_files_from(tmp_path / "a")
        writer.commit()
    model = load(tmp_path / "b", fuse_layers=True)
    assert model.fused is not None
    assert model.fused.left == {name: "q_proj and v_proj share an input, but have 3 and 4 bits"}
    assert kinds(model) == {"q_proj + k_proj": 1, QKV: 1, GATE_UP: 2}
    ids = list(range(30))
    expected = load(tmp_path / "a").logits(ids)
    assert float((model.logits(ids) - expected).norm() / expected.norm()) < 1e-6


def test_an_unquantized_model_has_its_norms_fused_and_its_linears_left(tiny_llama: Path) -> None:
    model, plain = load(tiny_llama, fuse_layers=True), load(tiny_llama)
    assert model.fused is not None
    assert model.fused.linears == ()
    assert len(model.fused.norms) == 5
    assert model.fused.left == {"linears": "not quantized"}
    assert torch.equal(model.logits(range(20)), plain.logits(range(20)))  # in bf16 not a bit may differ


def test_the_decoder_needs_no_asking(quantized_llama: Path) -> None:
    model = halfbyte.load(quantized_llama, fuse_layers=True)
    assert model.engine.name == "decoder"
    assert str(model.fused) == "everything, in the fused decoder"
    assert halfbyte.load(quantized_llama, fuse_layers=True, modules_to_fuse=["mlp"]).engine.name == "transformers"


@pytest.mark.parametrize("backend", ["decoder", "transformers"])
def test_a_sequence_longer_than_allowed_is_refused(quantized_llama: Path, backend: str) -> None:
    model = halfbyte.load(quantized_llama, backend=backend, fuse_layers=True, fuse_max_seq_len=16)
    ids = model.encode("The")
    plain = halfbyte.load(quantized_llama, backend=backend)
    room = 16 - len(ids)
    assert model.generate("The", max_new_tokens=room) == plain.generate("The", max_new_tokens=room)
    with pytest.raises(ConfigError, match="context: 17 tokens.*fuse_max_seq_len=16") as error:
        model.generate("The", max_new_tokens=room + 1)
    assert "\n" not in str(error.value)
    assert model.fused is not None
    assert model.fused.max_seq_len == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fuse_layers": False, "modules_to_fuse": ["mlp"]}, "modules_to_fuse: only with fuse_layers=True"),
        ({"fuse_layers": False, "fuse_max_seq_len": 5}, "fuse_max_seq_len: only with fuse_layers=True"),
        ({"fuse_max_seq_len": 0}, "fuse_max_seq_len: expected at least 1, got 0"),
        ({"modules_to_fuse": ["atention"]}, "expected names out of attention, mlp, layernorm, got 'atention'"),
        ({"modules_to_fuse": "mlp"}, r"expected a list such as \[\"attention\", \"mlp\"\], got 'mlp'"),
        ({"modules_to_fuse": {"mlp": "up_proj"}}, "mlp: expected a list of module names, got 'up_proj'"),
        ({"modules_to_fuse": {"mlp": ["c_fc"]}}, "mlp: the model has no module called 'c_fc'"),
        ({"modules_to_fuse": ["mlp"], "backend": "decoder"}, 'backend "decoder": modules_to_fuse was given'),
    ],
)
def test_bad_options_are_refused(quantized_llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        halfbyte.load(quantized_llama, **{"fuse_layers": True, "backend": "transformers", **settings})


def test_memory_is_that_of_the_weights_once(quantized_llama: Path) -> None:
    plain, fused = load(quantized_llama), load(quantized_llama, fuse_layers=True)
    assert fused.nbytes <= plain.nbytes
    assert any(isinstance(module, FusedNorm) for module in fused.network.modules())
