"""Tiny random models of many architectures, built offline from transformers' config classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
MHA = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0,
       "eos_token_id": 0}  # fmt: skip
FALCON = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
          "eos_token_id": 0}  # fmt: skip
DEEPSEEK = {
    **BASE, "num_key_value_heads": 4, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "projection_dim": 32}  # fmt: skip
QWEN_VISION = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
SECTIONS = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

# name → (config class, arguments, folds of the last block as "KIND consumers": norm, value, product, activation)
ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", BASE, "norm norm value product"),
    "mistral": ("MistralConfig", BASE, "norm norm value product"),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
                "norm norm value" + 4 * " product"),
    "qwen2": ("Qwen2Config", BASE, "norm norm value product"),
    "qwen2_moe": ("Qwen2MoeConfig", {**BASE, **EXPERTS, "shared_expert_intermediate_size": 64},
                  "norm norm value" + 5 * " product"),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 16}, "norm norm value product"),
    "qwen3_moe": ("Qwen3MoeConfig", {**BASE, **EXPERTS, "head_dim": 16}, "norm norm value" + 4 * " product"),
    "gemma": ("GemmaConfig", {**BASE, "head_dim": 16}, "norm+1 norm+1 value product"),
    "gemma2": ("Gemma2Config", {**BASE, "head_dim": 16}, "norm+1 norm+1 value product"),
    "gemma3": ("Gemma3TextConfig", {**BASE, "head_dim": 16}, "norm+1 norm+1 value product"),
    "phi": ("PhiConfig", BASE, "norm value"),
    "phi3": ("Phi3Config", BASE, "norm norm value product"),
    "opt": ("OPTConfig", {**FALCON, "ffn_dim": 96, "max_position_embeddings": 256, "word_embed_proj_dim": 64,
                          "pad_token_id": 1}, "norm norm value activation"),
    "gpt2": ("GPT2Config", GPT, "norm norm value"),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 8}, "norm value"),
    "gpt_neox": ("GPTNeoXConfig", MHA, "norm norm value"),
    "bloom": ("BloomConfig", {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
                              "eos_token_id": 0}, "norm norm value"),
    "falcon_7b": ("FalconConfig", {**FALCON, "multi_query": True, "parallel_attn": True}, "norm value"),
    "falcon_40b": ("FalconConfig", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, "norm norm value"),
    "falcon_rw": ("FalconConfig", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
                  "norm norm value"),
    "mpt": ("MptConfig", {"vocab_size": 320, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
            "norm norm value"),
    "starcoder2": ("Starcoder2Config", BASE, "norm norm value"),
    "stablelm": ("StableLmConfig", BASE, "norm norm value product"),
    "cohere": ("CohereConfig", BASE, "norm value product"),
    "olmo2": ("Olmo2Config", BASE, "value product"),
    "granite": ("GraniteConfig", {**BASE, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                                  "logits_scaling": 2.0, "attention_multiplier": 0.25}, "norm norm value product"),
    "deepseek_v2": ("DeepseekV2Config", {**DEEPSEEK, "head_dim": 8}, 4 * "norm " + "value" + 5 * " product"),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, "n_group": 2, "topk_group": 1},
                    4 * "norm " + "value" + 5 * " product"),
    "llava": ("LlavaConfig", {"text_config": {**BASE, "model_type": "llama"},
                              "vision_config": {**VISION, "model_type": "clip_vision_model"},
                              "image_token_index": 319}, "norm norm value product"),
    "qwen2_vl": ("Qwen2VLConfig", {"text_config": {**BASE, "rope_parameters": SECTIONS}, "vision_config": QWEN_VISION,
                                   "image_token_id": 319, "video_token_id": 318}, "norm norm value product"),
    "nemotron": ("NemotronConfig", {**BASE, "head_dim": 16}, "norm+1 norm+1 value activation"),
    "gpt_oss": ("GptOssConfig", {**BASE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
                "norm norm value"),
    "llama4": ("Llama4TextConfig", {**BASE, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96},
               "norm value product"),
    "minicpm": ("GraniteConfig", {**BASE, "embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 2**0.5,
                                  "logits_scaling": 64 / 32, "attention_multiplier": 0.25,
                                  "tie_word_embeddings": True}, "norm norm value product"),
}  # fmt: skip
MIXTURES = {"gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"}


def build(name: str) -> Any:
    """The model, in fp32, with channels that differ in size as trained ones do."""
    import transformers

    kind, settings, _ = ZOO[name]
    config = getattr(transformers, kind)(**settings)
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others refuse fp64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(3)
    model.requires_grad_(False)
    return model


def save(name: str, folder: Path, make_tokenizer: Callable[[Path], None]) -> Path:
    """Its folder, in bf16."""
    build(name).to(torch.bfloat16).save_pretrained(folder)
    if name == "minicpm":
        config = json.loads((folder / "config.json").read_text())
        for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
            del config[key]
        config.update(model_type="minicpm", architectures=["MiniCPMForCausalLM"], scale_emb=12, scale_depth=1.4)
        config.update(dim_model_base=32, auto_map={"AutoConfig": "configuration_minicpm.MiniCPMConfig"})
        (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    return folder


def table() -> str:
    """What is found in each model's last block, as the table of docs/design/quantization.md."""
    from tempfile import TemporaryDirectory

    from halfbyte.cli.inspect import shorten
    from halfbyte.quantization.inspection import inspect_folds

    rows: dict[tuple[str, ...], list[str]] = {}
    for name in ZOO:
        with TemporaryDirectory() as folder:
            block = inspect_folds(save(name, Path(folder), lambda _: None))[-1]
        found: dict[str, None] = {}
        for fold in block.discovery.folds:
            norm = " (1 + w)" if fold.offset else ""
            found[f"{shorten([fold.producer])}{norm} → {shorten(fold.consumers)}"] = None
        cells = ("; ".join(found), shorten(block.discovery.unscaled), shorten(block.kept))
        rows.setdefault(cells, []).append(name)
    lines = ["| models | folds | in no fold | never quantized |", "|---|---|---|---|"]
    for cells, names in rows.items():
        lines.append("| " + " | ".join(cell.replace("*", r"\*") or "-" for cell in (", ".join(names), *cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
