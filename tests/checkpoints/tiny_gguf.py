"""A Llama small enough to write in a test, as llama.cpp's converter would: q and k rows interleaved."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

from halfbyte.checkpoints.gguf_models import BLOCK_NAMES, OUTER_NAMES
from halfbyte.checkpoints.sample import Sample

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 32, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEMBER = "pack/tiny.gguf"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What the converter does to q and k: per head [2, d/2] rows become [d/2, 2]."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_tiny_gguf(path: Path, weights: dict[str, torch.Tensor], *, architecture: str = "llama") -> None:
    """`weights`: fp32, by their Hugging Face names."""
    names = {hf: name for name, hf in OUTER_NAMES.items()}
    for layer in range(LAYERS):
        for name, hf in BLOCK_NAMES.items():
            names[f"model.layers.{layer}.{hf}.weight"] = f"blk.{layer}.{name}.weight"
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_context_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for hf, weight in weights.items():
        heads = HEADS if "q_proj" in hf else KV_HEADS if "k_proj" in hf else None
        stored = weight if heads is None else interleaved(weight, heads)
        writer.add_tensor(names[hf], stored.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wrap(gguf_path: Path, wheel: Path, tensors: int, weight_bytes: int) -> Sample:
    """A wheel around the file, and the entry that names it."""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, MEMBER)
    return Sample(
        requirement="tiny-pack==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        tensors=tensors,
        weight_bytes=weight_bytes,
        description="a tiny Llama",
    )
