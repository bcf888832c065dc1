"""Claim: a model is quantized in far less memory than it takes itself, and a memory budget is kept.

Makes a random Llama of 1.1 billion weights tensor by tensor, quantizes it in a process of its own under
`/usr/bin/time -v`, and prints the peak resident memory, which docs/design/journal.md compares with its bound. A random
model has no quality to lose, so few calibration tokens are enough.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from halfbyte.checkpoints.writer import CheckpointWriter

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
VOCABULARY = 32_000
LIMIT = 3_000_000_000


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    yield "lm_head.weight", (VOCABULARY, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{block}.self_attn.{name}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{block}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (hidden,)


def make_model(folder: Path, layers: int) -> int:
    """Write the model tensor by tensor; returns its bytes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", **SHAPE,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    nbytes = 0
    with CheckpointWriter(folder, max_shard_bytes=500_000_000) as writer:
        for name, shape in tensors(layers):
            mean, deviation = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.02)
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(mean, deviation, generator=generator)
            writer.add(name, tensor)
            nbytes += tensor.nbytes
        writer.add_json("config.json", config.to_diff_dict())
        writer.commit()
    make_tokenizer(folder)
    return nbytes


def make_tokenizer(folder: Path) -> None:
    """One token a byte: nothing has to be trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(model: Path, output: Path, options: list[str]) -> dict[str, object]:
    """Quantize in a process of its own; what GNU time saw of it."""
    command = [sys.executable, "-m", "halfbyte", "quantize", str(model), "-o", str(output), *options, "--json"]
    run = subprocess.run(["/usr/bin/time", "-v", *command], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    report = json.loads(run.stdout)
    shutil.rmtree(output)
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", run.stderr)
    assert peak is not None
    return {
        "options": " ".join(options),
        "peak_bytes": int(peak[1]) * 1024,
        "seconds": report["seconds"],
        "blocks": report["blocks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the model is made, and kept; a temporary folder otherwise")
    parser.add_argument("--method", nargs="*", default=["awq"])
    parser.add_argument("--memory-budget", nargs="*", default=["2.2GB"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        model = folder / "random-llama"
        if not model.exists():
            make_model(model, options.layers)
        calibration = ["--max-calib-samples", "8", "--max-calib-seq-len", "512"]
        rows = []
        for method in options.method:
            for budget in (None, *options.memory_budget):
                limits = [] if budget is None else ["--memory-budget", budget]
                rows.append(measure(model, folder / "quantized", ["--method", method, *calibration, *limits]))
                print(f"{rows[-1]['options']:80} {rows[-1]['peak_bytes'] / 1e9:.2f} GB  {rows[-1]['seconds']:.0f} s")
    print(json.dumps({"layers": options.layers, "shape": SHAPE, "limit_bytes": LIMIT, "runs": rows}))


if __name__ == "__main__":
    main()
