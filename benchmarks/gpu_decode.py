"""Claim: a Llama in 4 bits decodes several times as fast as itself in fp16, both as one CUDA graph a step.

    python benchmarks/gpu_decode.py [--batches 1 2 4 8 16 32 64] [--context 512] [--rounds 30]

The model has the shape of Llama 2 7B (or --layers of it) and random weights: what a step costs does not depend on them.
int4 and fp16 run in the same decoder and differ in their linears alone; the output head is in fp16 in both. They take
turns; medians. `graph` is the time of the step on the GPU, `step` that until its logits are on the CPU. `copy` is what
reading the weights and the keys and values once would take at the bandwidth that copying 1 GiB reaches in the same run,
as a share of `graph`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_common import Queued, copy_bandwidth, describe, find_gpu, take_turns
from gpu_w4a16 import random_weight

from halfbyte.architectures.records import DecoderRecord, decoder_record
from halfbyte.kernels.cuda_ops import decoder_ops
from halfbyte.kernels.decoder_ops import Norm
from halfbyte.kernels.w4a16 import prepare
from halfbyte.runtime.rotation import Rotations
from halfbyte.runtime.torch_cache import TorchCache, reach_of
from halfbyte.runtime.torch_decoder import Product, TorchDecoder, TorchLayer

GROUP_SIZE = 128
DTYPE = torch.float16


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the defaults are those of Llama 2 7B."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32000


def build(shape: Shape, device: torch.device, *, quantized: bool, kernel: str = "cuda") -> TorchDecoder:
    """A decoder with random weights, every layer's in memory of its own."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    record, rotations = decoder_record(config), Rotations(LlamaRotaryEmbedding(config), ("",))
    assert isinstance(record, DecoderRecord)
    rows = (shape.heads + 2 * shape.kv_heads) * record.head_dim
    sizes = ((rows, shape.hidden), (shape.hidden, shape.heads * record.head_dim),
             (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))  # fmt: skip
    norm = Norm(torch.ones(shape.hidden, dtype=DTYPE, device=device), record.epsilon, round_first=True)
    linear = partial(_packed if quantized else _dense, device=device, kernel=kernel)
    originals = [linear(*size) for size in sizes]
    layers, nbytes = [], 0
    for _ in range(shape.layers):
        products = [copy.deepcopy(original) for original in originals]
        nbytes += sum(product.nbytes for product in products)
        layers.append(TorchLayer(*products, norm, norm, None, None))
    embedding = torch.randn(shape.vocabulary, shape.hidden, device=device).to(DTYPE) * 0.02
    head = _dense(shape.vocabulary, shape.hidden, device=device, kernel=kernel)
    ops, reason = decoder_ops(device, DTYPE, record.head_dim, rotations.pairs)
    return TorchDecoder(
        record, layers, rotations, ops, embedding=embedding, final_norm=norm, head=head, ops_reason=reason,
        kernels={}, parts={"packed": nbytes, "half": 0, "norms": 0, "head": head.nbytes, "embedding": embedding.nbytes},
    )  # fmt: skip


class _Linear:
    """A product, and what its weight weighs."""

    def __init__(self, product: Product, nbytes: int):
        self._product, self.nbytes = product, nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


class _Dense:
    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def _packed(rows: int, columns: int, *, device: torch.device, kernel: str) -> _Linear:
    weight = random_weight(rows, columns, min(GROUP_SIZE, columns), device, zero_point=True)
    linear: Any = prepare(weight, backend=kernel, device=device)[1]
    return _Linear(linear, linear.nbytes)


def _dense(rows: int, columns: int, *, device: torch.device, kernel: str) -> _Linear:
    del kernel
    weight = torch.randn(rows, columns, device=device).to(DTYPE) * 0.02
    return _Linear(_Dense(weight), weight.nbytes)


def whole_step(decoder: TorchDecoder, cache: TorchCache, context: int) -> None:
    """The next token of sequences that have so many already, until its logits are here; captured the first time."""
    cache.lengths = [context] * len(cache.lengths)
    decoder.step(cache, [[1]] * len(cache.lengths))


def measure(
    decoders: dict[str, TorchDecoder], batches: Sequence[int], context: int, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of a step of each, by itself and until its logits are on the CPU."""
    found = []
    device = next(iter(decoders.values())).device
    for batch in batches:
        memory = next(iter(decoders.values())).new_cache(batch, context + 1)  # for all: what is in it does not matter
        caches = {name: TorchCache(memory.keys, memory.values, memory.heads) for name in decoders}
        for name, decoder in decoders.items():
            whole_step(decoder, caches[name], context)
        reach = reach_of(context + 1, memory.positions)
        graphs = {name: Queued(cache.steps[1, reach]) for name, cache in caches.items()}
        seconds = take_turns(graphs, device, rounds)
        steps: dict[str, Callable[[], object]] = {
            name: partial(whole_step, decoder, caches[name], context) for name, decoder in decoders.items()
        }
        whole = take_turns(steps, torch.device("cpu"), rounds)  # logits come to the CPU: its clock
        found.append(
            {"batch": batch, "context": context, "graph": seconds, "step": whole,
             "ratio": seconds["fp16"] / seconds["int4"], "step_ratio": whole["fp16"] / whole["int4"],
             "bytes": {name: decoder.step_bytes + _cache_bytes(caches[name], context)
                       for name, decoder in decoders.items()}}
        )  # fmt: skip
    return found


def _cache_bytes(cache: TorchCache, context: int) -> int:
    return cache.nbytes * (context + 1) // cache.positions


def print_table(cells: list[dict[str, Any]], bandwidth: float) -> None:
    """A line a batch."""
    graphs = f"{'batch':>6}{'int4 graph ms':>15}{'fp16':>9}{'ratio':>8}{'copy':>6}{'fp16':>6}"
    print(f"{graphs}{'step ratio':>12}{'tokens/s':>10}")
    for cell in cells:
        graph = cell["graph"]
        shares = [cell["bytes"][name] / bandwidth / graph[name] for name in ("int4", "fp16")]
        times = f"{1e3 * graph['int4']:>15.3f}{1e3 * graph['fp16']:>9.3f}{cell['ratio']:>7.2f}×"
        speed = f"{cell['step_ratio']:>11.2f}×{cell['batch'] / cell['step']['int4']:>10,.0f}"
        print(f"{cell['batch']:>6}{times}{shares[0]:>6.0%}{shares[1]:>6.0%}{speed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    parser.add_argument("--context", type=int, default=512, help="tokens that each sequence has already")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--rounds", type=int, default=30, help="of which the median is taken")
    options = parser.parse_args()
    device = find_gpu("gpu_decode")
    if device is None:
        return 2
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    shape = Shape(layers=options.layers)
    decoders = {name: build(shape, device, quantized=name == "int4") for name in ("int4", "fp16")}
    print(f"{describe(device)}; {shape}, built in {time.perf_counter() - start:.0f} s")
    print(", ".join(f"{name}: {decoder.nbytes / 1e9:.2f} GB" for name, decoder in decoders.items()))
    if reason := decoders["int4"].ops_reason:
        print(f"between products torch computes, not halfbyte's kernels: {reason}")
    bandwidth = copy_bandwidth(device)
    cells = measure(decoders, options.batches, options.context, options.rounds)
    print_table(cells, bandwidth)
    print(json.dumps({"gpu": describe(device), "shape": vars(shape), "copy_bytes_per_s": bandwidth, "cells": cells}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
