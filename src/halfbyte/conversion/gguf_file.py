"""A quantized checkpoint as one GGUF file that llama.cpp runs: codes as they are, tokenizer and all.

A linear becomes Q4_0 where its zero points are all 8, which is exact, else Q4_1, which rounds the minima to fp16. What
is not quantized stays in 16 bits, vectors become float32, as llama.cpp wants them. For the Llama architecture the rows
of q and k are put from rotary halves [2, d/2] of each head into neighbours [d/2, 2]. Llama 3's rotary scaling becomes
a factor for each frequency, `rope_freqs.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halfbyte.checkpoints.disk import ensure_space, replacing
from halfbyte.checkpoints.gguf_models import LLAMA3_ENTRIES, ROPE_FACTORS, llama3_factors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.conversion.gguf_tokenizer import GgufTokenizer, read_gguf_tokenizer
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.errors import CheckpointError, OutputError, UnsupportedError
from halfbyte.formats import gguf_blocks
from halfbyte.formats.gguf_blocks import Q4_0, Q4_1
from halfbyte.formats.layouts import read_layout
from halfbyte.progress import progress_bar
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.tensor import QuantizedTensor

# model_type → GGUF's name, and whether rows of q and k are in another order there.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
QUANTIZATION_VERSION = 2
LLAMA3 = "llama3"


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Attributes:
        path: the file.
        architecture: GGUF's name for it.
        blocks: "Q4_0" or "Q4_1" → linears stored so.
        nbytes: of the file.
        largest_error: ‖W' - W‖ / ‖W‖ of the linear that the rounding of minima to fp16 changed most; 0 for Q4_0.
    """

    path: Path
    architecture: str
    blocks: dict[str, int]
    nbytes: int
    largest_error: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "path": str(self.path)}


def export_gguf(model: str | Path, path: str | Path, *, overwrite: bool = False, progress: bool = True) -> GgufExport:
    """Write a quantized checkpoint as a GGUF file.

    Args:
        model: a quantized checkpoint of 4 bits: a folder, a hub name, or MODEL@METHOD.
        path: of the file; nothing appears there before everything is written.
        overwrite: replace a file that is there.
        progress: show a bar with an ETA on a terminal.

    Raises:
        UnsupportedError: an architecture, tokenizer, rotary scaling or linear that cannot be written; names it.
        OutputError: the file exists, or cannot be written.
        HalfbyteError: a bad model.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"output {path}: exists; name another file, or overwrite it (--overwrite)")
    export = _Export(str(model), Checkpoint.open(model_folder(model, progress=progress)))
    ensure_space(path, export.nbytes)
    with replacing(path) as partial:
        export.write(partial, progress)
    return GgufExport(path, export.architecture, dict(export.kinds), path.stat().st_size, export.largest_error)


class _Export:
    """One file on its way."""

    def __init__(self, model: str, checkpoint: Checkpoint):
        layout = read_layout(checkpoint.config)
        if layout is None:
            raise UnsupportedError(f"{model}: is not quantized; quantize it, or use llama.cpp's converter")
        self.checkpoint, self.config = checkpoint, checkpoint.config
        kind = self.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise UnsupportedError(
                f"{model}: model_type {kind!r}: GGUF files are written for {', '.join(ARCHITECTURES)}"
            )
        self.architecture, self.permutes = ARCHITECTURES[kind]
        self.quantized = QuantizedCheckpoint(checkpoint, layout)
        self.rope = _rope(self.config, checkpoint.folder)
        self.heads = int(self.config["num_attention_heads"])
        self.head_dim = int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)
        self.kinds: dict[str, int] = {}
        self.largest_error = 0.0
        self._names = _name_map(self.architecture, int(self.config["num_hidden_layers"]))

    @property
    def nbytes(self) -> int:
        """About what the file takes: Q4_1 has a tenth more than a checkpoint's codes."""
        return self.checkpoint.total_bytes * 9 // 8

    def write(self, path: Path, progress: bool) -> None:
        """All of it."""
        import gguf

        parts = list(self._parts())
        tokenizer = read_gguf_tokenizer(self.checkpoint.folder, self._vocab_size())
        writer = gguf.GGUFWriter(path, self.architecture)
        try:
            self._describe(writer, tokenizer)
            for part in parts:
                kind = gguf.GGMLQuantizationType[part.kind]
                writer.add_tensor_info(part.name, part.shape, np.dtype(np.uint8), math.prod(part.shape), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress_bar("Writing GGUF", len(parts), enabled=progress, unit="tensors") as ticker:
                for part in parts:
                    writer.write_tensor_data(self._data(part))
                    ticker.advance()
        finally:
            writer.close()

    def _vocab_size(self) -> int:
        return int(self.checkpoint.info("model.embed_tokens.weight").shape[0])

    def _parts(self) -> Iterator[_Part]:
        """Every tensor of the file, looked at but not kept."""
        tied = bool(self.config.get("tie_word_embeddings")) and "model.embed_tokens.weight" in self.checkpoint
        for linear in self.quantized.linears:
            tensor = self.quantized.read(linear)
            kind = Q4_0 if gguf_blocks.cannot_hold(tensor, Q4_0) is None else Q4_1
            reason = gguf_blocks.cannot_hold(tensor, kind)
            if reason is not None:
                raise UnsupportedError(f"{linear}: {reason}")
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if kind == Q4_1:
                self.largest_error = max(self.largest_error, gguf_blocks.rounding_error(tensor))
            width = tensor.in_features // gguf_blocks.BLOCK * (18 if kind == Q4_0 else 20)
            yield _Part(self._gguf_name(f"{linear}.weight"), linear, kind, (tensor.out_features, width))
            if tensor.bias is not None:
                yield _Part(self._gguf_name(f"{linear}.bias"), linear, "F32", (4 * tensor.out_features,))
        for name in self.checkpoint.names():
            if self.quantized.owner(name) is not None or (tied and name == "lm_head.weight"):
                continue
            info = self.checkpoint.info(name)
            kind = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(info.dtype, "F32")
            kind = "F32" if len(info.shape) == 1 else kind
            *rows, columns = info.shape
            yield _Part(self._gguf_name(name), name, kind, (*rows, columns * (4 if kind == "F32" else 2)))
        if self.rope["rope_type"] == LLAMA3:
            yield _Part(ROPE_FACTORS, ROPE_FACTORS, "F32", (4 * self.head_dim // 2,))

    def _gguf_name(self, name: str) -> str:
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(f"tensor {name}: is no part of a {self.architecture} model, as GGUF knows it")
        return found

    def _data(self, part: _Part) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor, read now."""
        if part.source in self.quantized.linears:
            tensor = self._permuted(self.quantized.read(part.source), part.source)
            if part.kind == "F32":
                assert tensor.bias is not None
                return _bytes(tensor.bias.float())
            return gguf_blocks.pack(tensor, part.kind, part.source).numpy()
        if part.source == ROPE_FACTORS:
            return _bytes(llama3_factors(self.rope, self.head_dim))
        values = self.checkpoint.read(part.source)
        order = self._order(part.source.rpartition(".")[0], values.shape[0])
        values = values if order is None else values[order]
        return _bytes(values.float() if part.kind == "F32" else values)

    def _permuted(self, tensor: QuantizedTensor, linear: str) -> QuantizedTensor:
        order = self._order(linear, tensor.out_features)
        if order is None:
            return tensor
        bias = None if tensor.bias is None else tensor.bias[order]
        return replace(
            tensor, codes=tensor.codes[order], scales=tensor.scales[order], zeros=tensor.zeros[order], bias=bias
        )

    def _order(self, linear: str, rows: int) -> torch.Tensor | None:
        """Where each row of q or k comes from; None where rows stay."""
        if not self.permutes or not linear.endswith((".q_proj", ".k_proj")):
            return None
        return torch.arange(rows).reshape(-1, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def _describe(self, writer: Any, tokenizer: GgufTokenizer) -> None:
        import gguf

        config = self.config
        writer.add_name(str(config.get("_name_or_path") or self.checkpoint.folder.name))
        writer.add_context_length(int(config["max_position_embeddings"]))
        writer.add_embedding_length(int(config["hidden_size"]))
        writer.add_block_count(int(config["num_hidden_layers"]))
        writer.add_feed_forward_length(int(config["intermediate_size"]))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(int(config.get("num_key_value_heads") or self.heads))
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
        writer.add_rope_freq_base(float(self.rope["rope_theta"]))
        if self.rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_vocab_size(len(tokenizer.tokens))
        most = max(self.kinds, key=self.kinds.__getitem__)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
        writer.add_quantization_version(QUANTIZATION_VERSION)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer.pre)
        writer.add_token_list(tokenizer.tokens)
        writer.add_token_types(tokenizer.types)
        writer.add_token_merges(tokenizer.merges)
        for name, index in tokenizer.ids.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(tokenizer.add_bos)
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)


@dataclass(frozen=True)
class _Part:
    """A tensor of the file.

    Attributes:
        name: GGUF's.
        source: a quantized linear, or a tensor of the checkpoint.
        kind: GGUF's type.
        shape: of its bytes.
    """

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]


def _name_map(architecture: str, blocks: int) -> Any:
    import gguf

    (found,) = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    return gguf.get_tensor_name_map(found, blocks)


def _rope(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`rope_parameters`, under whatever name and with each entry, of a kind that a file can hold."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {
        "rope_theta": float(config.get("rope_theta", 10000.0)),
        **found,
        "rope_type": found.get("rope_type", found.get("type", "default")),
    }
    needed = {"default": (), "linear": ("factor",), LLAMA3: LLAMA3_ENTRIES}.get(rope["rope_type"])
    if needed is None:
        raise UnsupportedError(
            f"{folder}: rotary scaling {rope['rope_type']!r}: GGUF files are written for models without one, or with "
            f"linear or {LLAMA3}"
        )
    for key in ("rope_theta", *needed):
        if type(rope.get(key)) not in (int, float) or not rope[key] > 0:
            raise CheckpointError(f"{folder}/config.json: {key} of rope_parameters: expected a number above 0")
    return rope


def _bytes(values: torch.Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = values.contiguous().view(torch.uint8).numpy()
    return found
