from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.architectures.skeleton import (
    build_skeleton,
    fill,
    find_decoder_blocks,
    named_linears,
    release,
    set_parameter,
    weight_of,
)
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError


def test_a_skeleton_has_no_weights_but_real_buffers(tiny_llama: Path) -> None:
    model = build_skeleton(str(tiny_llama), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


def test_blocks_are_found_and_their_linears_named(tiny_llama: Path) -> None:
    name, blocks = find_decoder_blocks(build_skeleton(str(tiny_llama), torch.float32))
    assert (name, len(blocks)) == ("model.layers", 2)
    assert [local for local, _ in named_linears(blocks[0])] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Sequential: no list of decoder blocks"):
        find_decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_a_filled_skeleton_computes_what_the_model_does_and_can_be_emptied(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, source = build_skeleton(str(tiny_llama), torch.float32), Checkpoint.open(tiny_llama)
    fill(model, "", source, torch.float32)
    model.tie_weights()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)
    release(model.model.layers[0])
    assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())
    assert not weight_of(model, "model.layers.1.mlp.up_proj").is_meta


def test_a_part_can_be_left_empty(tiny_llama: Path) -> None:
    model = build_skeleton(str(tiny_llama), torch.float32)
    fill(model.model, "model", Checkpoint.open(tiny_llama), torch.float32, skip="layers")
    assert not weight_of(model, "model.norm").is_meta
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())


def test_missing_and_misshapen_tensors_are_named(tiny_llama: Path) -> None:
    class Source(dict[str, torch.Tensor]):
        def read(self, name: str) -> torch.Tensor:
            return self[name]

    layer = nn.Linear(4, 2, bias=False)
    set_parameter(layer, "weight", torch.empty(2, 4, device="meta"))
    with pytest.raises(CheckpointError, match="tensor a.weight: the config implies it"):
        fill(layer, "a", Source())
    with pytest.raises(CheckpointError, match=r"tensor a.weight: expected shape \[2, 4\] .* found \[4, 2\]"):
        fill(layer, "a", Source({"a.weight": torch.zeros(4, 2)}))
