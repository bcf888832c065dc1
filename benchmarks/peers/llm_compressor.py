"""Quantizes a model with llm-compressor, on given token blocks; started by benchmarks/quantize.py, which scores it.

    python benchmarks/peers/llm_compressor.py MODEL OUT --method awq --tokens blocks.json

Runs in an environment of its own, where halfbyte need not be. It saves the compressed checkpoint, reads that back, and
writes its weights, decompressed to fp32, to OUT/plain: what is scored is what a user of the checkpoint would get. The
last line of standard output is a JSON document: seconds, peak memory, versions. Neither importing nor reading back is
in these.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def recipe(method: str, group_size: int) -> list[Any]:
    """The modifiers with their defaults; for AWQ both families of scales, as its documentation has it."""
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size)
    settings: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if not torch.accelerator.is_available():
        # 0.14.0.1 pins AWQ's activations for an accelerator even where there is none, and torch refuses. Without one,
        # pinning changes neither a number nor the speed.
        IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    if method == "gptq":
        return [GPTQModifier(**settings)]
    return [*([AWQModifier(duo_scaling="both")] if method == "awq" else []), QuantizationModifier(**settings)]


def quantize(options: argparse.Namespace, compressed: Path) -> None:
    """From the model folder to the compressed checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    calibration: dict[str, Any] = {}
    if options.method != "rtn":
        blocks = json.loads(options.tokens.read_text(encoding="utf-8"))
        calibration = {
            "dataset": Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * len(ids) for ids in blocks]}),
            "num_calibration_samples": len(blocks),
            "max_seq_length": max(map(len, blocks)),
            "batch_size": options.batch_size,
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, processor=tokenizer, recipe=recipe(options.method, options.group_size), **calibration)
    model.save_pretrained(compressed, save_compressed=True)
    tokenizer.save_pretrained(compressed)


def decompress(compressed: Path, source: Path, plain: Path) -> int:
    """Write the checkpoint's weights in fp32 under the names of `source`; returns how many were quantized."""
    model = AutoModelForCausalLM.from_pretrained(
        compressed,
        dtype=torch.float32,
        local_files_only=True,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    quantized = sum(hasattr(module, "weight_scale") for module in model.modules())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if name not in tied}
    weights = {
        name: value.detach().float().contiguous()
        for name, value in parameters.items()
        if not name.endswith(("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"))
    }
    plain.mkdir(parents=True)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copy(file, plain)
    return quantized


def main() -> None:
    """Quantize, measure, decompress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=("rtn", "awq", "gptq"), required=True)
    parser.add_argument("--tokens", type=Path, help="JSON: a list of token blocks, each a list of ids")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="of the arithmetic: auto (as stored), float32, ...")
    options = parser.parse_args()

    started = time.perf_counter()
    quantize(options, options.output / "compressed")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    quantized = decompress(options.output / "compressed", options.model, options.output / "plain")
    document = {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "linears": quantized,
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
