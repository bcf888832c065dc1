"""Architectures the fused decoder knows, as data: a model type is a few settings, not a class.

All of them are RMSNorm, rotary attention with key-value heads, and a gated MLP, in that order. They differ in where
norms stand, how the norms' weights are stored, what is multiplied where, and how matrices are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
    "relu": "relu",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What all models of one type share.

    Attributes:
        qkv: the matrices that make queries, keys and values, one after the other.
        gate_up: the matrices that make gate and up.
        norms: before attention, after it, before the MLP, after it; "" where there is none.
        norm_offset: norms multiply by (1 + weight).
        qk_norm: "heads" (each head by itself), "whole" (all of q, all of k) or "".
        scaled_embedding: embeddings are multiplied by √hidden.
        separate_rotations: sliding and full attention turn by different angles.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    norm_offset: bool = False
    qk_norm: str = ""
    scaled_embedding: bool = False
    separate_rotations: bool = False


_FOUR_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm="heads"),
    "gemma": Family(norm_offset=True, scaled_embedding=True),
    "gemma2": Family(norms=_FOUR_NORMS, norm_offset=True, scaled_embedding=True),
    "gemma3_text": Family(
        norms=_FOUR_NORMS, norm_offset=True, qk_norm="heads", scaled_embedding=True, separate_rotations=True
    ),
    "phi3": Family(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    "granite": Family(),
    "olmo2": Family(norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"), qk_norm="whole"),
}


@dataclass(frozen=True)
class DecoderRecord:
    """One model for the fused decoder: the sizes and multipliers of native/cpu/decoder.hpp.

    Attributes:
        family: what models of its type share.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key-value heads.
        head_dim: width of a head.
        intermediate: width of the MLP.
        vocabulary: token ids.
        layers: how many.
        epsilon: of the norms.
        activation: "silu", "gelu_tanh", "gelu" or "relu".
        attention_scale: of the scores.
        attention_softcap: of the scores, 0 for none.
        embedding_scale: of the embeddings.
        residual_scale: of what each branch adds.
        logits_scale: of the logits.
        logits_softcap: of the logits, 0 for none.
        windows: for each layer, how many positions a token sees, itself included; 0 for all.
        layer_types: for each layer, the kind of its rotation; "" where all are alike.
    """

    family: Family
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    layers: int
    epsilon: float
    activation: str
    attention_scale: float
    attention_softcap: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    logits_softcap: float
    windows: tuple[int, ...]
    layer_types: tuple[str, ...]

    def with_layers(self, numbers: Sequence[int]) -> DecoderRecord:
        """The record of a model that has only these layers."""
        return replace(
            self,
            layers=len(numbers),
            windows=tuple(self.windows[n] for n in numbers),
            layer_types=tuple(self.layer_types[n] for n in numbers),
        )


def decoder_record(config: Any) -> DecoderRecord | str:
    """The record of a model, or why the fused decoder cannot run it.

    Args:
        config: a transformers config.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"model type {config.model_type} is not among {', '.join(FAMILIES)}"
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if head_dim % 16:
        return f"heads of {head_dim} numbers; the decoder takes multiples of 16"
    if name not in ACTIVATIONS:
        return f"activation {name} is not among {', '.join(ACTIVATIONS)}"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention looks at later tokens, too"
    query_scalar = getattr(config, "query_pre_attn_scalar", None)
    scale = getattr(config, "attention_multiplier", None) or (query_scalar or head_dim) ** -0.5
    return DecoderRecord(
        family=family,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[name],
        attention_scale=scale,
        attention_softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        embedding_scale=hidden**0.5 if family.scaled_embedding else getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logits_scale=1.0 / getattr(config, "logits_scaling", 1.0),
        logits_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        windows=_windows(config),
        layer_types=tuple(config.layer_types) if family.separate_rotations else ("",) * config.num_hidden_layers,
    )


def _windows(config: Any) -> tuple[int, ...]:
    window = int(getattr(config, "sliding_window", None) or 0)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
