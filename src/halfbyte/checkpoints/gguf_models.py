"""What the models of a GGUF file are called in Hugging Face's world: names of tensors, order of rows, config.json.

For the architecture llama, GGUF stores q and k with their rows permuted for interleaved rotary embeddings: per head
[2, head_dim/2] became [head_dim/2, 2]. transformers rotates halves, so the permutation is undone. Of Gemma's norms GGUF
stores 1 + weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.checkpoints.gguf_reader import GgufFile, floats
from halfbyte.checkpoints.header import shown
from halfbyte.errors import CheckpointError, UnsupportedError

# GGUF name inside a block → module name inside a decoder layer.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EMBEDDING, FINAL_NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
OUTER_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
# Low and high frequency factor and original context of Llama 3.1 to 3.3, of which the file has only what follows.
LLAMA3_SCALING = (1.0, 4.0, 8192)
LLAMA3_ENTRIES = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """What all files of one `general.architecture` share.

    Attributes:
        model_type: of transformers.
        class_name: of transformers.
        permuted: whether rows of q and k are in another order.
        norm_offset: added to the weights of norms in the file.
        blocks: names inside a block.
        settings: what config.json has beside the usual.
    """

    model_type: str
    class_name: str
    permuted: bool = False
    norm_offset: float = 0.0
    blocks: Mapping[str, str] = field(default_factory=lambda: BLOCK_NAMES)
    settings: Callable[[GgufFile], dict[str, Any]] = lambda file: {"hidden_act": "silu"}


def _llama(file: GgufFile) -> dict[str, Any]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {"hidden_act": "silu", **{key: name in file.tensors for key, name in biases.items()}}


def _qwen3(file: GgufFile) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _gemma(file: GgufFile) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(file: GgufFile) -> dict[str, Any]:
    heads, hidden = file.whole("gemma2.attention.head_count"), file.whole("gemma2.embedding_length")
    # Gemma 2 27B alone scales scores by hidden / heads. The file does not say so; llama.cpp goes by the blocks, too.
    scalar = hidden // heads if file.whole("gemma2.block_count") == 46 else head_dim(file)
    return {
        **_gemma(file),
        "query_pre_attn_scalar": scalar,
        "sliding_window": file.whole("gemma2.attention.sliding_window", 4096),
        "attn_logit_softcapping": file.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("gemma2.final_logit_softcapping", 30.0),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, settings=_llama),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", blocks={**BLOCK_NAMES, **_HEAD_NORMS}, settings=_qwen3),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_offset=1.0, settings=_gemma),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", norm_offset=1.0, blocks={**BLOCK_NAMES, **_FOUR_NORMS}, settings=_gemma2
    ),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The entry of `ARCHITECTURES`.

    Raises:
        UnsupportedError: there is none, or the model is a mixture of experts.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: architecture {shown(name)}: GGUF files are read of {', '.join(ARCHITECTURES)}"
        )
    if file.whole(f"{name}.expert_count", 0):
        raise UnsupportedError(f"{file.path}: is a mixture of experts, which is not read from GGUF files")
    return ARCHITECTURES[name]


def head_dim(file: GgufFile) -> int:
    """Width of a head."""
    name = file.architecture
    heads = file.whole(f"{name}.attention.head_count")
    if not heads:
        raise CheckpointError(f"{file.path}: metadata {name}.attention.head_count: expected at least 1, found 0")
    turned = file.whole(f"{name}.rope.dimension_count", file.whole(f"{name}.embedding_length") // heads)
    width = file.whole(f"{name}.attention.key_length", turned)
    if turned != width:
        raise UnsupportedError(f"{file.path}: turns {turned} of {width} numbers of a head; only whole heads are read")
    if not width or width % 2 or file.whole(f"{name}.attention.value_length", width) != width:
        raise CheckpointError(
            f"{file.path}: metadata {name}.attention.key_length: expected an even width, found {width}"
        )
    return width


def hf_name(file: GgufFile, name: str, architecture: Architecture) -> str:
    """The name of a tensor in a Hugging Face folder.

    Raises:
        CheckpointError: such a model has none of that name.
    """
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in architecture.blocks and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{architecture.blocks[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"{file.path}: tensor {shown(name)}: not part of a {architecture.model_type} model")


def row_order(name: str, rows: int, architecture: Architecture, width: int) -> torch.Tensor | None:
    """Where each row of a q or k (Hugging Face name) is in the file; None where rows stay.

    Args:
        name: of the tensor, or of its module.
        rows: of the tensor.
        architecture: of the file.
        width: of a head.

    Raises:
        CheckpointError: the rows are not whole heads.
    """
    if not architecture.permuted or not any(f".{part}." in f"{name}." for part in ("q_proj", "k_proj")):
        return None
    if rows % width:
        raise CheckpointError(f"tensor {shown(name)}: has {rows:,} rows; expected whole heads of {width}")
    return torch.arange(rows).reshape(-1, width // 2, 2).transpose(1, 2).reshape(-1)


def read_gguf_config(file: GgufFile) -> dict[str, Any]:
    """config.json, but for its dtype; every size held against the tensors.

    Raises:
        CheckpointError: an entry is missing, of the wrong type, or contradicts the tensors.
        UnsupportedError: an architecture or a kind of rotary scaling that is not read.
    """
    architecture, name = architecture_of(file), file.architecture
    heads, width = file.whole(f"{name}.attention.head_count"), head_dim(file)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": file.whole(f"{name}.embedding_length"),
        "intermediate_size": file.whole(f"{name}.feed_forward_length"),
        "num_hidden_layers": file.whole(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole(f"{name}.attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": file.info(EMBEDDING).shape[0],
        "max_position_embeddings": file.whole(f"{name}.context_length"),
        "rms_norm_eps": file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, width),
        **architecture.settings(file),
        "tie_word_embeddings": HEAD not in file.tensors,
    }
    _check_sizes(file, config)
    for token in ("bos", "eos", "padding"):
        key = f"tokenizer.ggml.{token}_token_id"
        config[f"{token.removesuffix('ding')}_token_id"] = file.whole(key) if key in file.metadata else None
    return config


def _check_sizes(file: GgufFile, config: dict[str, Any]) -> None:
    """A skeleton is built of these numbers: none may be larger than the tensors bear out."""
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.") and name.count(".") > 1}
    count = config["num_hidden_layers"]
    if not count or count != len(blocks) or blocks != {str(number) for number in range(len(blocks))}:
        raise CheckpointError(f"{file.path}: announces {count:,} blocks, its tensors are of {len(blocks):,}")
    expected = {
        EMBEDDING: (config["vocab_size"], hidden),
        "blk.0.attn_q.weight": (config["num_attention_heads"] * width, hidden),
        "blk.0.attn_k.weight": (config["num_key_value_heads"] * width, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
    }
    for name, shape in expected.items():
        if file.info(name).shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {name}: expected {list(shape)} from the metadata, found "
                f"{list(file.info(name).shape)}"
            )


def _rope(file: GgufFile, width: int) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    name = file.architecture
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": file.number(f"{name}.rope.freq_base", 10000.0)}
    prefix = f"{name}.rope.scaling"
    kind = file.text(f"{prefix}.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _scaled_by_table(file, rope, width)
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": file.number(f"{prefix}.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = file.whole(f"{prefix}.original_context_length")
    elif kind != "none":
        raise UnsupportedError(f"{file.path}: rotary scaling {shown(kind)}: none, linear and yarn are read")
    return rope


def _scaled_by_table(file: GgufFile, rope: dict[str, Any], width: int) -> dict[str, Any]:
    """Each frequency divided by a factor of its own: Llama 3's scaling where the factors are its, else as a list."""
    if file.info(ROPE_FACTORS).shape != (width // 2,):
        raise CheckpointError(f"{file.path}: tensor {ROPE_FACTORS}: expected {width // 2} factors")
    factors = floats(file.rows(ROPE_FACTORS), file.info(ROPE_FACTORS).kind, ROPE_FACTORS, torch.float32).flatten()
    entries = (float(factors.max()), *LLAMA3_SCALING)
    scaled = {**rope, "rope_type": "llama3", **dict(zip(LLAMA3_ENTRIES, entries, strict=True))}
    if torch.allclose(llama3_factors(scaled, width), factors, rtol=1e-5):
        return scaled
    listed = factors.tolist()
    return {
        **rope,
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": file.whole(f"{file.architecture}.context_length"),
    }


def llama3_factors(rope: Mapping[str, Any], width: int) -> torch.Tensor:
    """What Llama 3 divides each rotary frequency by: float32 [width / 2].

    Args:
        rope: `rope_parameters` of type llama3.
        width: of a head.

    Source: `_compute_llama3_parameters` of transformers, and llama.cpp's converter, which writes them.
    """
    factor, low, high, original = (float(rope[key]) for key in LLAMA3_ENTRIES)
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = original * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
