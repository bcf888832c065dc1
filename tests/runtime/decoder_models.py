"""Tiny random models of every architecture the decoders know, and transformers' answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"] * 2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama with one query head a group": ("LlamaConfig", {"num_key_value_heads": 6}),
    "llama with six query heads a group": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama, linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, llama3": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
    "llama, dynamic": ("LlamaConfig", {
        "max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "layer_types": LAYERS, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 24, "layer_types": LAYERS, "query_pre_attn_scalar": 20}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi3, longrope": ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 2.0,
                                  "attention_multiplier": 0.25}),
    "olmo2": ("Olmo2Config", {}),
}  # fmt: skip


def write_model(name: str, folder: Path) -> Path:
    """A random model in bf16, lively enough that its next tokens differ."""
    import transformers

    kind, changes = MODELS[name]
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**BASE, **changes}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in key or "bias" in key else 0.08))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def in_fp32(folder: Path) -> Any:
    """transformers' own model in fp32: bf16 weights are exact in it, so it is the definition."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def greedy(network: Any, ids: torch.Tensor, steps: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy continuation with its cache, and the logits of each step."""
    from transformers import DynamicCache

    cache, found, logits, step = DynamicCache(config=network.config), [], [], ids
    for _ in range(steps):
        out = network(input_ids=step[None], past_key_values=cache, use_cache=True).logits[0, -1]
        logits.append(out)
        found.append(int(out.argmax()))
        step = torch.tensor([found[-1]])
    return found, torch.stack(logits)
