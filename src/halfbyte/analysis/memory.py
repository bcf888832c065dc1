"""Where the bytes are: in the files, held at run time, and in 16 bits.

The files are counted from their headers. What is held is asked of the model once it is loaded, because only the engine
knows in which layout it keeps the codes, and that it may hold the output head in fewer bits than the file.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.architectures.matrices import matrix_shape
from halfbyte.architectures.skeleton import build_skeleton, find_decoder_blocks, text_tower
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.quantization.on_the_fly import model_folder

QUANTIZED, HALVES, EMBEDDING, HEAD, SMALL, OTHER = (
    "quantized linears", "linears in 16 bit", "embedding", "output head", "norms and biases", "outside the text model",
)  # fmt: skip
KINDS = (QUANTIZED, HALVES, EMBEDDING, HEAD, SMALL, OTHER)
# Parts of a quantized linear, by the last part of a tensor's name in any layout.
PARTS = {
    "qweight": "codes", "codes": "codes", "scales": "scales", "qzeros": "zero points", "zeros": "zero points",
    "minima": "zero points", "kept_weight": "columns kept in 16 bit", "kept_columns": "columns kept in 16 bit",
    "B": "codes", "s": "scales", "scaled_zeros": "zero points", "g_idx": "shape and order",
    "weight_packed": "codes", "weight_scale": "scales", "weight_zero_point": "zero points",
    "weight_shape": "shape and order", "weight_g_idx": "shape and order",
    "grid": "shape and order", "group_index": "shape and order", "input_scale": "shape and order",
}  # fmt: skip


@dataclass(frozen=True)
class MemoryEntry:
    """The bytes of one kind of tensor.

    Attributes:
        kind: one of `KINDS`, or a part of the quantized linears.
        weights: numbers in the model that are of this kind; 0 for a part.
        disk_bytes: in the files.
        run_time_bytes: held by the loaded model; None if it was not loaded, or for a part.
        half_bytes: at two bytes a weight; None for a part.
    """

    kind: str
    weights: int
    disk_bytes: int
    run_time_bytes: int | None
    half_bytes: int | None


@dataclass(frozen=True)
class MemoryMap:
    """Where the bytes of a model are.

    Attributes:
        model: as the user named it.
        entries: one for each kind that occurs.
        parts: what the quantized linears consist of on disk.
        engine: that runs it, "decoder" or "transformers"; None if it was not loaded.
        head_bits: of the output head as the decoder holds it; None in transformers.
        cache_bytes_per_token: of keys and values, in the decoder; None in transformers.
    """

    model: str
    entries: tuple[MemoryEntry, ...]
    parts: tuple[MemoryEntry, ...]
    engine: str | None
    head_bits: int | None
    cache_bytes_per_token: int | None

    @property
    def total(self) -> MemoryEntry:
        """The sum of the entries."""
        held = [entry.run_time_bytes for entry in self.entries]
        return MemoryEntry(
            "total",
            sum(entry.weights for entry in self.entries),
            sum(entry.disk_bytes for entry in self.entries),
            None if self.engine is None else sum(part or 0 for part in held),
            sum(entry.half_bytes or 0 for entry in self.entries),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "total": asdict(self.total)}


def memory_map(model: str | Path, *, run_time: bool = True, progress: bool = True) -> MemoryMap:
    """Where the bytes of a model are.

    Args:
        model: a folder, "sample:NAME", a hub name, or one of these with @METHOD; quantized or not.
        run_time: load the model to see what it holds; False reads headers alone.
        progress: show a download's progress on a terminal.

    Raises:
        HalfbyteError: the model is missing, broken, or of an unknown kind.
    """
    folder = model_folder(model, progress=progress)
    checkpoint = Checkpoint.open(folder)
    files = _Files(checkpoint)
    held: Counter[str] | None = None
    engine, head_bits, cache = None, None, None
    if run_time:
        from halfbyte.runtime.decoder import NativeDecoder
        from halfbyte.runtime.loading import load_model
        from halfbyte.runtime.torch_decoder import TorchDecoder

        loaded = load_model(folder).engine
        engine = loaded.name
        if isinstance(loaded, NativeDecoder):
            held, head_bits, cache = files.held_by_decoder(loaded), loaded.head_bits, loaded.cache_bytes(1)
        elif isinstance(loaded, TorchDecoder):
            held, head_bits, cache = files.held_by_torch_decoder(loaded), 16, loaded.cache_bytes(1)
        else:
            held = files.held_by_transformers(loaded)
    entries = tuple(
        MemoryEntry(
            kind, files.weights[kind], files.disk[kind], None if held is None else held[kind], 2 * files.weights[kind]
        )
        for kind in KINDS
        if files.disk[kind] or (held and held[kind])
    )
    parts = tuple(
        MemoryEntry(part, 0, files.parts[part], None, None)
        for part in dict.fromkeys(PARTS.values())
        if part in files.parts
    )
    return MemoryMap(str(model), entries, parts, engine, head_bits, cache)


class _Files:
    """The tensors of a checkpoint by kind.

    Attributes:
        weights: numbers of each kind.
        disk: bytes of each kind.
        parts: bytes of each part of the quantized linears.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._layout = read_layout(checkpoint.config)
        self._skeleton = build_skeleton(str(checkpoint.folder), torch.float32)
        self._tensors = ModelTensors(self._skeleton, checkpoint, checkpoint.names())
        blocks_name, _ = find_decoder_blocks(self._skeleton)
        self._tower = text_tower(self._skeleton, blocks_name)[0]
        self.weights: Counter[str] = Counter()
        self.disk: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self._modules: set[str] = set()
        ends = ((HEAD, self._skeleton.get_output_embeddings()), (EMBEDDING, self._skeleton.get_input_embeddings()))
        self._ends = {
            f"{path}.weight": kind
            for kind, end in ends
            for path, module in self._skeleton.named_modules()
            if module is end
        }
        for name in checkpoint.names():
            self._count(name, self._layout)

    def _count(self, name: str, layout: Layout | None) -> None:
        module, _, leaf = name.rpartition(".")
        info = self._checkpoint.info(name)
        if layout is not None and f"{module}.{layout.marker}" in self._checkpoint and leaf in PARTS:
            self.disk[QUANTIZED] += info.nbytes
            self.parts[PARTS[leaf]] += info.nbytes
            place = self._tensors.locate(f"{module}.weight")
            if leaf == layout.marker and place is not None:
                rows, columns = matrix_shape(self._skeleton, place)
                self.weights[QUANTIZED] += rows * columns
                self._modules.add(place.parameter.removesuffix(".weight"))
            return
        stored = self._tensors.stored.get(name)
        kind = self._kind(name if stored is None else stored.parameter, len(info.shape))
        self.disk[kind] += info.nbytes
        self.weights[kind] += math.prod(info.shape)

    def _kind(self, parameter: str, axes: int) -> str:
        if parameter in self._ends:
            return self._ends[parameter]
        if self._tower and not parameter.startswith(self._tower + "."):
            return OTHER
        return SMALL if axes < 2 else HALVES

    def held_by_decoder(self, decoder: Any) -> Counter[str]:
        """Bytes of each kind in the fused decoder."""
        held: Counter[str] = Counter()
        for module, matrix in decoder.matrices.items():
            if module == "lm_head":
                # In 16 bits a tied head is the embedding itself.
                held[HEAD] += 0 if decoder.head_bits == 16 and not self.disk[HEAD] else matrix.nbytes
            else:
                held[QUANTIZED if module in self._modules else HALVES] += matrix.nbytes
        held[EMBEDDING] = self.disk[EMBEDDING]
        # Vectors of fp32, which the decoder does not count among its weights.
        held[SMALL] = 4 * self.weights[SMALL]
        return held

    def held_by_torch_decoder(self, decoder: Any) -> Counter[str]:
        """Bytes of each kind in the decoder of a GPU."""
        kinds = {"packed": QUANTIZED, "half": HALVES, "head": HEAD, "embedding": EMBEDDING, "norms": SMALL}
        return Counter({kind: decoder.parts[part] for part, kind in kinds.items()})

    def held_by_transformers(self, engine: Any) -> Counter[str]:
        """Bytes of each kind in a transformers module."""
        from halfbyte.runtime.quant_linear import QuantLinear

        held: Counter[str] = Counter()
        for module in engine.network.modules():
            if isinstance(module, QuantLinear):
                held[QUANTIZED] += module.nbytes
        for name, parameter in engine.network.named_parameters():  # tied ones once
            held[self._kind(name, parameter.ndim)] += parameter.nbytes
        return held
