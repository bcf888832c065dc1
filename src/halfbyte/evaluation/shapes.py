"""Random 4-bit models of a given shape: speed depends on a model's shape, not on its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import ConfigError
from halfbyte.formats import gemm
from halfbyte.tensor import QuantizedTensor

# 1b: what a Llama of a billion weights looks like, with 4 query heads to a key-value head and its head tied.
SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
}
GROUP_SIZE = 64


def write_random_model(folder: Path, shape: str, *, group_size: int = GROUP_SIZE) -> None:
    """Write a random Llama in AutoAWQ's GEMM layout, without a tokenizer; never more than a layer is in memory.

    All layers are the same on disk. In memory each has weights of its own.

    Args:
        folder: must not exist.
        shape: a key of `SHAPES`.
        group_size: inputs that share a scale.

    Raises:
        ConfigError: no such shape.
        OutputError: the folder is taken, or the disk is full.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape: expected {', '.join(SHAPES)}, got {shape!r}")
    sizes = SHAPES[shape]
    hidden, generator = sizes["hidden_size"], torch.Generator().manual_seed(0)
    embedding = torch.empty(sizes["vocab_size"], hidden).normal_(0, 0.02, generator=generator)
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    layer = _layer(sizes, group_size, generator)
    with CheckpointWriter(folder) as writer:
        writer.add("model.embed_tokens.weight", embedding.bfloat16())
        writer.add("model.norm.weight", norm)
        for index in range(sizes["num_hidden_layers"]):
            for name, tensor in layer.items():
                writer.add(f"model.layers.{index}.{name}", tensor)
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"model.layers.{index}.{name}.weight", norm)
        writer.add_json("config.json", _config(sizes, group_size))
        writer.commit()


def _layer(sizes: dict[str, int], group_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in shapes.items():
        groups = columns // group_size
        weight = QuantizedTensor(
            torch.randint(16, (rows, columns), dtype=torch.uint8, generator=generator),
            # Codes spread by 4.6: weights as large as a fresh Llama's, so that nothing overflows.
            torch.full((rows, groups), 0.02 / 4.6).half().float(),
            torch.full((rows, groups), 8, dtype=torch.uint8),
            bits=4,
            group_size=group_size,
        )
        tensors |= {f"{name}.{key}": tensor for key, tensor in gemm.pack(weight, name).items()}
    return tensors


def _config(sizes: dict[str, int], group_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **sizes,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "quantization_config": gemm.quantization_config(group_size=group_size, modules_to_not_convert=["lm_head"]),
    }
