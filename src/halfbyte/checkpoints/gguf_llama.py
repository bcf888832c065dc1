"""A Llama-architecture GGUF file → an ordinary Hugging Face folder in bf16.

GGUF stores q and k with their rows permuted for interleaved rotary embeddings: per head [2, head_dim/2] became
[head_dim/2, 2]. transformers rotates halves, so the permutation is undone here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import CheckpointError

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
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3
CHATML_END = "<|im_end|>"


def expand(gguf_path: Path, output_dir: Path, *, advance: Callable[[], None] = lambda: None) -> None:
    """Write weights (bf16), config.json and tokenizer of a Llama GGUF file into a new folder, atomically.

    Args:
        gguf_path: the file.
        output_dir: must not exist.
        advance: called after each tensor.

    Raises:
        CheckpointError: no GGUF file, another architecture, or a tensor with an unknown name.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(gguf_path)
    except (ValueError, IndexError, OSError) as error:
        raise CheckpointError(f"{gguf_path}: not a readable GGUF file ({error})") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"{gguf_path}: expected architecture llama, got {fields.get('general.architecture')!r}")
    config = _config(fields)
    with CheckpointWriter(output_dir) as writer:
        for tensor in reader.tensors:
            name = _hf_name(gguf_path, tensor.name)
            weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            if name == "lm_head.weight":
                config["tie_word_embeddings"] = False
            writer.add(name, _unpermute_if_rotary(name, weight, config).to(torch.bfloat16))
            advance()
        writer.add_json("config.json", config)
        _write_tokenizer(fields, config, writer)
        writer.commit()


def _hf_name(gguf_path: Path, name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"{gguf_path}: tensor {name}: not part of a Llama model")


def _unpermute_if_rotary(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }.get(".".join(name.split(".")[3:5]))
    if heads is None:
        return weight
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "hidden_act": "silu",
        # GGUF stores fp32; six significant digits give the number that was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], writer: CheckpointWriter) -> None:
    """tokenizer.json and its companions: byte-level BPE, digits one by one (GGUF's pre-tokenizer "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise CheckpointError(f"tokenizer {kind!r} with pre-tokenizer {pre!r}: expected 'gpt2' with 'smollm'")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token(key: str) -> str | None:
        return None if config[key] is None else tokens[config[key]]

    writer.add_text("tokenizer.json", tokenizer.to_str(pretty=False))
    writer.add_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token("bos_token_id"),
            "eos_token": token("eos_token_id"),
            "pad_token": token("pad_token_id"),
            "unk_token": tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)],
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields.get("tokenizer.chat_template"),
        },
    )
    ends = {config["eos_token_id"], *(i for i, text in enumerate(tokens) if text == CHATML_END)}
    generation = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    writer.add_json("generation_config.json", {**generation, "eos_token_id": sorted(e for e in ends if e is not None)})
