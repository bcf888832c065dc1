"""A GGUF file → an ordinary Hugging Face folder, a tensor in memory at a time.

Rows are put in transformers' order while they are still bytes: a row of GGUF is whole blocks, so that codes and scales
move together, and nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoints.gguf_models import ROPE_FACTORS, architecture_of, hf_name, read_gguf_config, row_order
from halfbyte.checkpoints.gguf_reader import GgufFile, floats
from halfbyte.checkpoints.gguf_vocabulary import write_vocabulary
from halfbyte.checkpoints.writer import CheckpointWriter

# Name of a linear, kind of its blocks, their bytes row by row → the tensors to store in its place; None for floats.
Pack = Callable[[str, str, torch.Tensor], dict[str, torch.Tensor] | None]


def expand(
    gguf_path: Path,
    output_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    pack: Pack | None = None,
    section: Callable[[], dict[str, Any] | None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write weights, config.json and tokenizer of a GGUF file into a new folder, atomically.

    Args:
        gguf_path: the file.
        output_dir: must not exist.
        dtype: of every tensor; None for each one's own: 16 bit of blocks, and of float32 where that is exact.
        pack: takes the linears of the decoder blocks that it does not give back as None.
        section: the `quantization_config` of config.json, asked for at the end; None for none.
        advance: called after each tensor.

    Raises:
        CheckpointError: the file is broken, or contradicts itself.
        UnsupportedError: an architecture, tokenizer, rotary scaling or kind of tensor that is not read.
        OutputError: the folder cannot be written.
    """
    file = GgufFile(gguf_path)
    config = read_gguf_config(file)
    architecture = architecture_of(file)
    names = {name: hf_name(file, name, architecture) for name in file.tensors if name != ROPE_FACTORS}
    usual = dtype or _usual_dtype(file)
    config["dtype"] = str(usual).removeprefix("torch.")
    with CheckpointWriter(output_dir) as writer:
        for name, hf in names.items():
            info, rows = file.info(name), file.rows(name)
            order = row_order(hf, info.shape[0], architecture, config["head_dim"])
            if order is not None and len(info.shape) == 2:
                rows = rows[order]
            linear = hf.removesuffix(".weight")
            inside = hf != linear and len(info.shape) == 2 and linear.startswith("model.layers.")
            parts = pack(linear, info.kind, rows) if pack is not None and inside else None
            for key, part in (parts or {}).items():
                writer.add(f"{linear}.{key}", part)
            if parts is None:
                values = floats(rows, info.kind, name, dtype).reshape(info.shape)
                values = values[order] if order is not None and len(info.shape) == 1 else values
                values = values.float() - architecture.norm_offset if hf.endswith("norm.weight") else values
                writer.add(hf, _narrowed(values, usual, dtype is not None))
            advance()
        quantization = section()
        writer.add_json(
            "config.json", config if quantization is None else config | {"quantization_config": quantization}
        )
        write_vocabulary(file, config, writer)
        writer.commit()


def _usual_dtype(file: GgufFile) -> torch.dtype:
    """bf16 if a tensor has it, fp32 if all matrices are, else fp16: the most digits of what blocks stand for."""
    kinds = {info.kind for info in file.tensors.values() if len(info.shape) > 1}
    if "BF16" in kinds:
        return torch.bfloat16
    return torch.float32 if kinds == {"F32"} else torch.float16


def _narrowed(values: torch.Tensor, usual: torch.dtype, rounded: bool) -> torch.Tensor:
    """In the dtype of the model if that was asked for, or holds each number exactly."""
    narrow = values.to(usual)
    return narrow if rounded or torch.equal(narrow.to(values.dtype), values) else values
