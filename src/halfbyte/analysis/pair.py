"""A quantized checkpoint beside the model it came from: every linear in both, one decoder block in memory at a time.

What is compared stands in the reference's coordinates: scales that were folded into the checkpoint's weights are taken
out again (`scales.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.analysis.scales import Scaling, Stored, recover_scaling, step_sizes
from halfbyte.architectures.matrices import quantizable_matrices
from halfbyte.architectures.skeleton import build_skeleton, fill, find_decoder_blocks, release, weight_of
from halfbyte.architectures.stored import ModelTensors, stored_tensors
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.reader import Checkpoint, read_json_object
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.errors import CheckpointError, ConfigError, ModelNotFoundError
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.progress import progress_bar
from halfbyte.quantization.calibration import Calibration, CalibrationSet, build_calibration_set, read_documents
from halfbyte.quantization.capture import Batch, capture_block_inputs
from halfbyte.quantization.discovery import Discovery, discover_folds
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.inspection import block_structure
from halfbyte.quantization.on_the_fly import model_folder, parse_copy_request
from halfbyte.quantization.report import MANIFEST_NAME
from halfbyte.quantization.statistics import InputStatistics, StatisticsCollector
from halfbyte.quantization.task import advance, give_back_memory
from halfbyte.quantization.widening import narrowed
from halfbyte.tensor import QuantizedTensor

# A short calibration pass: what it averages over is the input of one linear, not a model's loss.
N_SAMPLES, SAMPLE_TOKENS = 8, 512
# Without calibration the folds are still found by experiment, on inputs of this shape.
SEQUENCES, TOKENS = 4, 64
# What the manifest calls the scale of inputs that were not scaled.
UNSCALED = ("identity", "none")


@dataclass(frozen=True, eq=False)
class PairedMatrix:
    """One linear in the reference and in the checkpoint.

    Attributes:
        name: dotted, on disk, without ".weight".
        reference: W, float32 [out, in].
        stored: what the checkpoint holds.
        scaling: between the two.
        statistics: of the reference's input to it; None without calibration, or if no token reached it.
        recorded: what the manifest says of it; empty if it says nothing.
    """

    name: str
    reference: torch.Tensor
    stored: QuantizedTensor
    scaling: Scaling
    statistics: InputStatistics | None
    recorded: dict[str, Any]

    @cached_property
    def folded(self) -> torch.Tensor:
        """W', what was rounded: float32 [out, in]."""
        return self.scaling.fold(self.reference)

    @cached_property
    def dequantized(self) -> torch.Tensor:
        """Ŵ', as the checkpoint has it: float32 [out, in]."""
        return self.stored.dequantize()

    @cached_property
    def restored(self) -> torch.Tensor:
        """Ŵ in the reference's coordinates: float32 [out, in]."""
        return self.scaling.restore(self.dequantized)

    @cached_property
    def delta(self) -> torch.Tensor:
        """Ŵ - W in the reference's coordinates: float32 [out, in]."""
        return self.restored - self.reference

    @cached_property
    def coded(self) -> torch.Tensor:
        """int64 [coded], the columns that are codes: all but those kept in 16 bit."""
        coded = torch.ones(self.stored.in_features, dtype=torch.bool)
        if self.stored.kept_columns is not None:
            coded[self.stored.kept_columns.long()] = False
        return coded.nonzero().squeeze(1)

    def steps(self) -> torch.Tensor:
        """The error of each code in steps of its grid, positive where it was rounded up: float32 [out, coded]."""
        steps = (self.dequantized - self.folded) / step_sizes(self.stored).clamp(min=torch.finfo(torch.float32).tiny)
        return steps if len(self.coded) == self.stored.in_features else steps[:, self.coded]

    def codes(self) -> torch.Tensor:
        """uint8 [out, coded]."""
        codes = self.stored.codes
        return codes if len(self.coded) == self.stored.in_features else codes[:, self.coded]


class Pair:
    """A quantized checkpoint and its reference, opened.

    Attributes:
        model: the checkpoint, as the user named it.
        reference: the 16-bit model, likewise.
        checkpoint: opened.
        manifest: what `quantize` recorded; empty for a checkpoint made by others.
        linears: name → index of its block, for every quantized linear of the decoder blocks, in the model's order.
    """

    def __init__(self, model: str, checkpoint: Checkpoint, layout: Layout, reference: str, source: Checkpoint):
        self.model, self.checkpoint, self.reference = model, checkpoint, reference
        self.manifest = read_manifest(checkpoint.folder)
        self._recorded = {linear["name"]: linear for linear in self.manifest.get("linears", [])}
        self._layout, self._source = layout, source
        self._widened = bool(self.manifest.get("config", {}).get("tp_align"))
        self._skeleton = build_skeleton(str(source.folder), torch.float32)
        self._blocks_name, self._blocks = find_decoder_blocks(self._skeleton)
        self._tensors = ModelTensors(self._skeleton, source, source.names())
        self._tensors.annotate(self._blocks, self._blocks_name)
        self._stored_name = self._tensors.prefix(self._blocks_name)
        self._discovered: dict[Hashable, Discovery] = {}
        self.linears = {
            name: index
            for index, block in enumerate(self._blocks)
            for local in quantizable_matrices(block)
            if f"{(name := f'{self._stored_name}.{index}.{local}')}.{layout.marker}" in checkpoint
        }
        if not self.linears:
            raise CheckpointError(
                f"{model}: none of its quantized linears is one of {reference}; name the model it came from "
                f"with --reference"
            )

    @classmethod
    def open(cls, model: str | Path, reference: str | Path | None = None, *, progress: bool = True) -> Pair:
        """Open both; nothing but headers is read.

        Args:
            model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD (`quantization.on_the_fly`).
            reference: the model it came from, not quantized; None for the one its manifest names.
            progress: show a download's progress on a terminal.

        Raises:
            HalfbyteError: one of them is missing, broken, or not what it should be, or they do not belong together.
        """
        checkpoint = Checkpoint.open(model_folder(model, progress=progress))
        request = parse_copy_request(model)
        if reference is None and request is not None:
            reference = request.model
        layout = read_layout(checkpoint.config)
        if layout is None:
            raise ConfigError(
                f"{model}: is not quantized; expected a quantized checkpoint, as made by: "
                f"halfbyte quantize {model} -o DIR"
            )
        name, source = _open_reference(str(model), checkpoint, reference, progress)
        return cls(str(model), checkpoint, layout, name, source)

    def find(self, layer: str) -> str:
        """The linear a user means: its full name, or the end of it as long as that is one linear's alone.

        Raises:
            ConfigError: no such linear, or several.
        """
        found = [name for name in self.linears if f".{name}".endswith(f".{layer}")]
        if len(found) == 1 or layer in self.linears:
            return layer if layer in self.linears else found[0]
        if found:
            raise ConfigError(f"--layer {layer}: {len(found)} linears end so; write more of it, such as {found[0]}")
        near = difflib.get_close_matches(layer, [*self.linears], 1, 0) or [next(iter(self.linears))]
        raise ConfigError(f"--layer {layer}: no such quantized linear in {self.model}; did you mean {near[0]}?")

    def calibration(self, calibration: Calibration, n_samples: int) -> CalibrationSet:
        """Tokens to run through the reference: `n_samples` blocks of `SAMPLE_TOKENS` at most.

        Raises:
            CalibrationError: no text, or too little.
        """
        documents = read_documents(calibration)
        return build_calibration_set(
            load_tokenizer(self._source.folder),
            documents,
            max_calib_samples=n_samples,
            max_calib_seq_len=SAMPLE_TOKENS,
            seed=0,
        )

    @torch.no_grad()
    def matrices(
        self, *, layer: str | None = None, calibration: CalibrationSet | None = None, progress: bool = True
    ) -> Iterator[PairedMatrix]:
        """Every quantized linear in the model's order, or the one called `layer`.

        Args:
            layer: full name of one linear.
            calibration: tokens to collect `PairedMatrix.statistics` over; None for none.
            progress: show a bar with an ETA on a terminal.
        """
        wanted = [name for name in self.linears if layer in (None, name)]
        indices = {self.linears[name] for name in wanted}
        visited = range(max(indices) + 1) if calibration is not None else sorted(indices)
        batches = self._batches(calibration, wanted)
        with progress_bar("Comparing", len(visited), enabled=progress, unit="blocks") as ticker:
            for index in visited:
                block = self._blocks[index]
                fill(block, f"{self._blocks_name}.{index}", self._tensors, torch.float32)
                if index in indices:
                    names = [name for name in wanted if self.linears[name] == index]
                    yield from self._of_block(block, index, names, batches, collect=calibration is not None)
                else:
                    advance(block, index, batches)
                release(block)
                give_back_memory()
                ticker.advance()

    def _batches(self, calibration: CalibrationSet | None, wanted: Sequence[str]) -> list[Batch]:
        """What goes into the first block; random where only the folds are to be found, none where not even they are."""
        masks = None
        if calibration is not None:
            tokens, masks = list(calibration.blocks), calibration.masks
        elif any(self._may_be_scaled(name) for name in wanted):
            vocabulary = self._skeleton.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            tokens = list(torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=generator))
        else:
            return []
        device = torch.device("cpu")
        return list(capture_block_inputs(self._skeleton, self._blocks_name, tokens, self._tensors, device, masks=masks))

    def _of_block(
        self, block: nn.Module, index: int, names: Sequence[str], batches: list[Batch], *, collect: bool
    ) -> Iterator[PairedMatrix]:
        prefix = f"{self._stored_name}.{index}."
        discovery = self._discovery(block, index, batches[0]) if batches else Discovery([], [])
        statistics = _collect(block, discovery, index, batches) if collect else {}
        scaled = [fold for fold in discovery.folds if self._was_applied(fold, prefix)]
        scaling = recover_scaling(block, scaled, lambda local: self._stored(block, prefix, local))
        for name in names:
            local = name.removeprefix(prefix)
            stored = self._read(block, name, local)
            recorded = self._recorded.get(name, {})
            yield PairedMatrix(name, weight_of(block, local), stored, scaling[local], statistics.get(local), recorded)

    def _discovery(self, block: nn.Module, index: int, batch: Batch) -> Discovery:
        """Blocks of one structure have the same folds."""
        structure = block_structure(block)
        if structure not in self._discovered:
            self._discovered[structure] = discover_folds(block, batch.hidden, batch.kwargs[index])
        return self._discovered[structure]

    def _may_be_scaled(self, name: str) -> bool:
        return self._recorded.get(name, {}).get("scale") not in UNSCALED

    def _was_applied(self, fold: Fold, prefix: str) -> bool:
        """Whether the manifest leaves it open; it labels the quantized consumers."""
        labels = [f"{prefix}{name}" for name in fold.consumers if f"{prefix}{name}" in self.linears]
        return not labels or any(self._may_be_scaled(name) for name in labels)

    def _stored(self, block: nn.Module, prefix: str, local: str) -> Stored | None:
        """A norm's or a matrix's weight in the checkpoint."""
        if prefix + local in self.linears:
            return self._read(block, prefix + local, local)
        names = [entry.name for entry in stored_tensors(block) if entry.parameter == f"{local}.weight"]
        name = prefix + (names[0] if names else f"{local}.weight")
        if name not in self.checkpoint:
            return None
        stored, shape = self.checkpoint.read(name).float(), weight_of(block, local).shape
        return stored[tuple(slice(size) for size in shape)] if self._widened else stored

    def _read(self, block: nn.Module, name: str, local: str) -> QuantizedTensor:
        keys = [key for key in self._layout.keys if f"{name}.{key}" in self.checkpoint]
        stored = self._layout.unpack({key: self.checkpoint.read(f"{name}.{key}") for key in keys}, name)
        expected = weight_of(block, local).shape
        if self._widened:
            stored = narrowed(stored, *expected)
        if stored.codes.shape != expected:
            raise CheckpointError(
                f"{name}: is {list(stored.codes.shape)} in {self.model} and {list(expected)} in {self.reference}; "
                f"name the model it came from with --reference"
            )
        return stored


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty if it has none.

    Raises:
        CheckpointError: it is broken.
    """
    path = folder / MANIFEST_NAME
    return read_json_object(path) if path.is_file() else {}


def _open_reference(
    model: str, checkpoint: Checkpoint, reference: str | Path | None, progress: bool
) -> tuple[str, Checkpoint]:
    named = str(reference or read_manifest(checkpoint.folder).get("model") or "")
    if not named:
        raise ConfigError(
            f"{model}: has no {MANIFEST_NAME} that names the model it came from; name it with --reference MODEL"
        )
    try:
        source = Checkpoint.open(resolve_model(named, progress=progress))
    except ModelNotFoundError as error:
        if reference is not None:
            raise
        raise ModelNotFoundError(
            f"{model}: its manifest names {named} as the model it came from, which cannot be opened from here; "
            f"name it with --reference MODEL ({error})"
        ) from error
    if "quantization_config" in source.config:
        raise ConfigError(f"{named}: is quantized; expected the 16-bit model {model} came from")
    return named, source


def _collect(block: nn.Module, discovery: Discovery, index: int, batches: list[Batch]) -> dict[str, InputStatistics]:
    """Statistics of every matrix a token reached, by its name inside the block; the batches are moved on."""
    collector = StatisticsCollector(block, discovery.shared_inputs)
    outputs = collector.run((batch.hidden, batch.kwargs[index], batch.counts) for batch in batches)
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
        batch.kwargs[index] = {}
    return {name: found for found in collector.statistics.values() if found.tokens for name in found.linears}
