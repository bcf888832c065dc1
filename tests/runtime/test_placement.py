"""Which part of a model is where. Without a GPU "cpu" and "cpu:0" are two devices: accelerate's hooks are real."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.errors import ConfigError, HalfbyteError, UnsupportedError
from halfbyte.runtime.placement import Placement, spread

pytest.importorskip("accelerate")
IDS = list(range(30))
SPLIT = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu:0",
    "model.norm": "cpu:0", "lm_head": "cpu",
}  # fmt: skip


def load(folder: Path, **settings: Any) -> halfbyte.Model:
    return halfbyte.load(folder, backend="transformers", **settings)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": SPLIT}, {"max_memory": {"cpu": "1GB"}}],
)
def test_a_placed_model_computes_the_same(quantized_llama: Path, settings: dict[str, Any], fuse: bool) -> None:
    plain = load(quantized_llama, fuse_layers=fuse)
    model = halfbyte.load(quantized_llama, fuse_layers=fuse, **settings)
    assert model.engine.name == "transformers"
    assert model.not_fused == "a device_map or max_memory was given"
    assert torch.equal(model.logits(IDS), plain.logits(IDS))
    assert model.generate("The", max_new_tokens=12) == plain.generate("The", max_new_tokens=12)
    assert hasattr(model.network.model.layers[1], "_hf_hook") == (settings.get("device_map") is SPLIT)


def test_linears_on_two_devices_do_not_share_a_product(quantized_llama: Path) -> None:
    parts = {f"model.layers.1.self_attn.{name}_proj": "cpu" for name in "kvo"}
    device_map = {**{key: value for key, value in SPLIT.items() if key != "model.layers.1"}, **parts}
    device_map |= {"model.layers.1.self_attn.q_proj": "cpu:0", "model.layers.1.mlp": "cpu"}
    device_map |= {"model.layers.1.input_layernorm": "cpu", "model.layers.1.post_attention_layernorm": "cpu"}
    model = load(quantized_llama, fuse_layers=True, device_map=device_map)
    assert model.fused is not None
    assert ("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj") in model.fused.linears
    (reason,) = model.fused.left.values()
    assert reason == "q_proj and k_proj share an input, but have cpu:0 and cpu"
    assert torch.equal(model.logits(IDS), load(quantized_llama, fuse_layers=True).logits(IDS))


def test_sizes_are_those_of_the_codes(quantized_llama: Path) -> None:
    """A limit that holds the codes, and not four times as much."""
    plain = load(quantized_llama)
    network = build_skeleton(str(quantized_llama), torch.bfloat16)
    linears = [name for name, _ in network.named_parameters() if "_proj" in name]
    room = {"cpu": plain.nbytes + 4000}
    codes = {name: network.get_parameter(name).numel() // 2 + 100 for name in linears}
    assert spread(network, codes, "auto", room) == Placement({"": torch.device("cpu")})
    with pytest.raises(UnsupportedError, match="find no room in cpu: .* MB; raise max_memory"):
        spread(network, {name: 4 * size for name, size in codes.items()}, "auto", room)


def test_the_nearest_entry_of_the_map_counts() -> None:
    cpu, first = torch.device("cpu"), torch.device("cpu:0")
    placement = Placement({"model": cpu, "model.layers.1": first})
    assert placement.device_of("model.layers.1.mlp.up_proj") == first
    assert placement.device_of("model.layers.10.mlp.up_proj") == cpu
    with pytest.raises(ConfigError, match="device_map: says nothing of lm_head"):
        placement.device_of("lm_head")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"device_map": "cpu", "device": "cpu"}, ConfigError, "device 'cpu': say where by device_map"),
        ({"device_map": "cpu", "max_memory": {"cpu": "1GB"}}, ConfigError, "max_memory: only with device_map auto"),
        ({"device_map": "everywhere"}, ConfigError, "device 'everywhere': expected"),
        ({"device_map": {"": "disk"}}, UnsupportedError, "weights are not kept on the disk"),
        ({"device_map": {"model.layers": "cpu"}}, ConfigError, "device_map: says nothing of"),
        ({"max_memory": {"cpu": "plenty"}}, ConfigError, "max_memory: expected such as"),
        ({"max_memory": {"cpu": 1000}}, UnsupportedError, "device_map: .* find no room in cpu: 0 MB; raise max_memory"),
        ({"device_map": "cpu", "backend": "decoder"}, ConfigError, 'backend "decoder": a device_map or max_memory was'),
    ],
)
def test_bad_maps_are_refused(
    quantized_llama: Path, settings: dict[str, Any], kind: type[HalfbyteError], message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        halfbyte.load(quantized_llama, **settings)
    assert "\n" not in str(error.value)


def test_without_accelerate_one_line_says_what_to_install(
    quantized_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert load(quantized_llama).logits([1]).shape == (1, 320)
    with pytest.raises(UnsupportedError, match=r'need accelerate; install it with: pip install "halfbyte\[offload\]"$'):
        halfbyte.load(quantized_llama, device_map="auto")
