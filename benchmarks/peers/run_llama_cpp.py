"""llama.cpp as a contestant of benchmarks/cpu_decode.py, through the low-level half of llama-cpp-python.

    python benchmarks/peers/run_llama_cpp.py MODEL.gguf
    python benchmarks/peers/run_llama_cpp.py BF16.gguf --quantize Q4_K_M OUT.gguf

Runs in an environment of its own. Settings are llama.cpp's defaults: its cache in fp16, flash attention where it wants
it, weights repacked for the CPU while loading.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from serving import serve

# Tokens in one call; llama.cpp cuts them into pieces of 512 by itself.
BATCH = 2048


@llama_cpp.llama_log_callback
def _silence(_level: int, _text: bytes, _data: object) -> None:
    """llama.cpp tells much."""


class LlamaCpp:
    """One GGUF file."""

    def __init__(self, file: str):
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"{file}: llama.cpp cannot load it")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._context: Any = None
        self._threads = 1

    def describe(self) -> dict[str, Any]:
        model = self._model
        head_dim = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
        numbers = 2 * llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_head_kv(model) * head_dim
        return {
            "cache_bytes": 2 * numbers,
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "settings": {"system": llama_cpp.llama_print_system_info().decode()},
        }

    def set_threads(self, count: int) -> None:
        self._threads = count
        if self._context:
            llama_cpp.llama_set_n_threads(self._context, count, count)

    def start(self, sequences: int, capacity: int) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * (-(-capacity // 256) * 256)
        settings.n_batch = BATCH
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp: no context of {sequences} × {capacity} tokens")
        self._lengths, self._marked = [0] * sequences, 0

    def step(self, tokens: Sequence[Sequence[int]]) -> None:
        if sum(map(len, tokens)) <= BATCH:
            self._decode({sequence: list(new) for sequence, new in enumerate(tokens)})
            return
        for sequence, new in enumerate(tokens):
            for start in range(0, len(new), BATCH):
                self._decode({sequence: new[start : start + BATCH]})

    def mark(self) -> None:
        self._marked = self._lengths[0]

    def rewind(self) -> None:
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(len(self._lengths)):
            llama_cpp.llama_memory_seq_rm(memory, sequence, self._marked, -1)
            self._lengths[sequence] = self._marked

    def logits(self, ids: Sequence[int]) -> Any:
        self.start(1, len(ids))
        self._decode({0: ids}, every=True)
        address = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (len(ids), self._vocabulary)).copy()

    def _decode(self, tokens: dict[int, Sequence[int]], *, every: bool = False) -> None:
        batch, count = self._batch, 0
        for sequence, new in tokens.items():
            for offset, token in enumerate(new):
                batch.token[count] = token
                batch.pos[count] = self._lengths[sequence] + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = every or offset == len(new) - 1
                count += 1
            self._lengths[sequence] += len(new)
        batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp: llama_decode failed")
        llama_cpp.llama_get_logits(self._context)  # waits until they are there


def quantize(source: str, kind: str, output: str) -> None:
    """llama.cpp's own quantization, without an importance matrix."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(settings)):
        raise SystemExit(f"{source}: llama.cpp cannot quantize it to {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quantize", nargs=2, metavar=("KIND", "OUT"))
    options = parser.parse_args()
    llama_cpp.llama_log_set(_silence, None)
    llama_cpp.llama_backend_init()
    if options.quantize:
        quantize(options.model, *options.quantize)
    else:
        serve(lambda: LlamaCpp(options.model))


if __name__ == "__main__":
    main()
