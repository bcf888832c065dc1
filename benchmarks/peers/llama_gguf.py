"""A Llama folder in Hugging Face form → a bf16 GGUF file, for llama.cpp; runs in halfbyte's environment.

    python benchmarks/peers/llama_gguf.py MODEL OUT.gguf

llama.cpp rotates neighbouring numbers where transformers rotates halves, so the rows of q and k are put into its order:
per head [2, head_dim/2] becomes [head_dim/2, 2], the inverse of checkpoints/gguf_models.py. The file has no tokenizer:
the contestants are given token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import torch

from halfbyte.checkpoints.gguf_models import BLOCK_NAMES, OUTER_NAMES
from halfbyte.checkpoints.reader import Checkpoint

_OUTER = {ours: theirs for theirs, ours in OUTER_NAMES.items()}
_BLOCK = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


def write_gguf(folder: Path, output: Path) -> None:
    """Norms in fp32, everything else in bf16, both exact for a checkpoint in bf16."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    if config["model_type"] != "llama" or config.get("rope_parameters", {}).get("rope_type") != "default":
        raise SystemExit(f"{folder}: expected a Llama model with plain rotary embeddings")
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        module, _, kind = name.rpartition(".")
        if name in _OUTER:
            target = _OUTER[name]
        else:
            _, _, layer, module = module.split(".", 3)
            target = f"blk.{layer}.{_BLOCK[module]}.{kind}"
            if module in _ROTARY:
                rows = tensor.shape[0]
                halves = tensor.reshape(heads[module], 2, rows // heads[module] // 2, -1)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor.float().numpy())
        else:
            words = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, words, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def step_bytes(file: Path) -> int:
    """Bytes of the matrices that a step reads: all but an embedding that is not the output head as well."""
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return sum(tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    write_gguf(options.model, options.output)


if __name__ == "__main__":
    main()
