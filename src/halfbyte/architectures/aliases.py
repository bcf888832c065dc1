"""Models whose `model_type` transformers does not know, but whose computation it does under another name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.errors import UnsupportedError


def load_config(folder: str) -> Any:
    """The transformers config of a model folder, without running code that comes with the model.

    Raises:
        UnsupportedError: an alias does not cover what this config asks for.
        Exception: whatever transformers raises for a config it cannot read.
    """
    import transformers

    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    translate = ALIASES.get(str(raw.get("model_type"))) if isinstance(raw, dict) else None
    if translate is not None:
        return translate(raw)
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def _granite_from_minicpm(raw: dict[str, Any]) -> Any:
    """MiniCPM (1 and 2) is Granite with its multipliers spelled otherwise.

    Source: MiniCPM's modeling_minicpm.py: embeddings times `scale_emb`, each residual branch times
    scale_depth / √layers, the head's input divided by hidden / dim_model_base, attention scaled by 1/√head_dim.
    """
    import transformers

    if raw.get("num_experts"):
        raise UnsupportedError("config.json: model_type minicpm with experts is not supported")
    hidden, layers = int(raw["hidden_size"]), int(raw["num_hidden_layers"])
    head_dim = hidden // int(raw["num_attention_heads"])
    dropped = ("model_type", "architectures", "auto_map", "scale_emb", "scale_depth", "dim_model_base", "torch_dtype")
    # The head is tied unless the config says otherwise, as in MiniCPM's own config class.
    settings = {"tie_word_embeddings": True, **{key: value for key, value in raw.items() if key not in dropped}}
    return transformers.GraniteConfig(
        **settings,
        embedding_multiplier=float(raw.get("scale_emb", 1)),
        residual_multiplier=float(raw.get("scale_depth", 1)) / layers**0.5,
        logits_scaling=hidden / float(raw.get("dim_model_base", 1)),
        attention_multiplier=head_dim**-0.5,
    )


ALIASES: dict[str, Callable[[dict[str, Any]], Any]] = {"minicpm": _granite_from_minicpm}
