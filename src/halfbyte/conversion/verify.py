"""`verify`: everything in a model folder looked at, and all that is wrong with it told, not just the first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from halfbyte.architectures.matrices import matrix_shape
from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.architectures.stored import ModelTensors
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.gguf_copy import is_gguf
from halfbyte.checkpoints.gguf_reader import GgufFile
from halfbyte.checkpoints.header import shown
from halfbyte.checkpoints.reader import Checkpoint, read_config, read_json_object
from halfbyte.checkpoints.writer import tensor_hash
from halfbyte.conversion.engines import ENGINES, check_engine
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.conversion.shards import read_files
from halfbyte.conversion.targets import format_of
from halfbyte.conversion.verification import Check, Verification
from halfbyte.errors import CheckpointError, ConfigError, HalfbyteError
from halfbyte.formats.layouts import read_layout
from halfbyte.progress import Ticker, progress_bar
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.quantization.report import MANIFEST_NAME
from halfbyte.tensor import FLOATS, QuantizedTensor


def verify(
    model: str | Path, *, engines: Sequence[str] = (), tensor_parallel: int = 1, progress: bool = True
) -> Verification:
    """Read a whole checkpoint and check it: files, names, shapes, numbers, linears, tokenizer, hashes.

    Args:
        model: a folder, a GGUF file, "sample:NAME" or a hub name; quantized or not.
        engines: "vllm", "sglang", "transformers" or "autoawq": also by their rules of shapes and names.
        tensor_parallel: GPUs that each linear is split over there.
        progress: show a bar with an ETA on a terminal.

    Raises:
        ConfigError: no such engine, or a bad number of GPUs.
        ModelNotFoundError: no such folder.
        CheckpointError: it has no readable config.json, so that nothing says what it should hold.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise ConfigError(f"engine {engine!r}: rules are known of {', '.join(ENGINES)}")
    if tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel: expected at least 1, got {tensor_parallel}")
    if tensor_parallel > 1 and not any(ENGINES[engine].fused for engine in engines):
        raise ConfigError("tensor_parallel: is checked by the rules of an engine that splits linears: vllm or sglang")
    folder = model_folder(model, progress=progress)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    config = read_config(folder)
    files = Check("files and index")
    tensors, complete = read_files(folder, files)
    checkpoint = Checkpoint(folder, config, tensors)
    job = _Job(checkpoint, complete)
    with progress_bar("Verifying", checkpoint.total_bytes, enabled=progress, unit="bytes") as ticker:
        job.read_everything(ticker)
    job.check_model()
    checks = [files, job.config, job.names, job.finite, job.linears, _tokenizer(folder, job.vocabulary), job.hashes]
    for engine in engines:
        checks.append(check_engine(engine, job.weights, job.quantized, checkpoint, tensor_parallel))
    if is_gguf(model):
        checks.insert(0, _gguf_file(Path(model).expanduser()))
    return Verification(folder, tuple(checks))


def _gguf_file(path: Path) -> Check:
    """What came through: a header that is not sound never comes this far."""
    file = GgufFile(path)
    kinds = Counter(info.kind for info in file.tensors.values())
    check = Check("GGUF file")
    listed = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    check.detail = f"architecture {file.architecture}, {listed}; none outside the file, none overlap"
    return check


class _Job:
    """One pass over all tensors, and what the model in config.json makes of them.

    Attributes:
        complete: whether every file could be read. Where one could not, what is missing is no problem of its own.
        config, names, finite, linears, hashes: the checks.
        quantized: the linears; None if config.json announces no layout that can be read.
        weights: name → outputs, inputs and group size of each linear that could be unpacked.
        vocabulary: rows of the embedding; None if no model could be built.
    """

    def __init__(self, checkpoint: Checkpoint, complete: bool):
        self.checkpoint, self.complete = checkpoint, complete
        self.config, self.names = Check("config.json"), Check("names and shapes")
        self.finite, self.linears, self.hashes = Check("numbers"), Check("quantized linears"), Check("hashes")
        self.quantized: QuantizedCheckpoint | None = None
        self.weights: dict[str, tuple[int, int, int]] = {}
        self.vocabulary: int | None = None
        self._zeros: list[int] = []
        self._recorded = self._read_hashes()
        self._open_layout()

    def _open_layout(self) -> None:
        try:
            layout = read_layout(self.checkpoint.config)
            if layout is None:
                self.config.detail, self.linears.detail = "not quantized", "none"
            else:
                section = self.checkpoint.config["quantization_config"]
                self.config.detail = f"layout {format_of(section)}"
                self.quantized = QuantizedCheckpoint(self.checkpoint, layout)
        except HalfbyteError as error:
            self.config.problems.append(str(error))
            self.linears.skipped, self.linears.detail = True, "the layout could not be read"

    def _read_hashes(self) -> dict[str, Any]:
        path = self.checkpoint.folder / MANIFEST_NAME
        try:
            recorded = read_json_object(path).get("sha256") if path.is_file() else None
        except CheckpointError as error:
            self.hashes.problems.append(str(error))
            return {}
        self.hashes.skipped = not isinstance(recorded, dict) or not recorded
        self.hashes.detail = f"no hashes recorded in {MANIFEST_NAME}" if path.is_file() else f"no {MANIFEST_NAME}"
        return recorded if isinstance(recorded, dict) else {}

    def read_everything(self, ticker: Ticker) -> None:
        """Each tensor once: a linear's together, unpacked; every other float looked at for NaN."""
        dtypes: Counter[str] = Counter()
        for name in self.checkpoint.names():
            linear = None if self.quantized is None else self.quantized.owner(name)
            if linear is None:
                self._look_at(name, dtypes)
            elif self.quantized is not None and name == f"{linear}.{self.quantized.layout.marker}":
                self._unpack(linear)
            ticker.advance(self.checkpoint.info(name).nbytes)
        if dtypes:
            counts = ", ".join(f"{count} × {dtype}" for dtype, count in dtypes.most_common())
            self.finite.detail = f"{counts}, all finite"
        if self.weights:
            zeros = f"zero points {min(self._zeros)} to {max(self._zeros)}" if self._zeros else "floating minima"
            self.linears.detail = f"{len(self.weights)} unpacked, {zeros}"
        if self._recorded:
            there = sum(name in self.checkpoint for name in self._recorded)
            self.hashes.detail = f"{there} tensors as recorded"
            for name in self._recorded if self.complete else ():
                if name not in self.checkpoint:
                    self.hashes.problems.append(f"{shown(name)}: recorded in {MANIFEST_NAME}, not in the files")

    def _look_at(self, name: str, dtypes: Counter[str]) -> None:
        try:
            tensor = self.checkpoint.read(name)
        except CheckpointError as error:
            self.finite.problems.append(str(error))
            return
        self._compare_hash(name, tensor)
        dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
        if tensor.is_floating_point():
            wide = tensor if tensor.dtype in (*FLOATS, torch.float64) else tensor.float()
            bad = tensor.numel() - int(torch.isfinite(wide).sum())
            if bad:
                self.finite.problems.append(f"{shown(name)}: {bad:,} of {tensor.numel():,} values are not finite")

    def _unpack(self, linear: str) -> None:
        assert self.quantized is not None
        stored: dict[str, torch.Tensor] = {}
        try:
            stored = self.quantized.tensors(linear)
            for key, tensor in stored.items():
                self._compare_hash(f"{linear}.{key}", tensor)
            weight = self.quantized.layout.unpack(stored, linear)
        except HalfbyteError as error:
            if self.complete or self._usual_keys <= set(stored):
                self.linears.problems.append(str(error))
            return
        self.weights[linear] = (weight.out_features, weight.in_features, weight.group_size)
        self._check_range(linear, weight)

    @cached_property
    def _usual_keys(self) -> set[str]:
        """What most linears have; one that has less, and a file missing, is not at fault itself."""
        assert self.quantized is not None
        there = Counter(
            key
            for name in self.quantized.linears
            for key in self.quantized.layout.keys
            if f"{name}.{key}" in self.checkpoint
        )
        return {key for key, count in there.items() if 2 * count > len(self.quantized.linears)}

    def _check_range(self, linear: str, weight: QuantizedTensor) -> None:
        parts = {"codes": weight.codes}
        if not weight.zeros.is_floating_point():
            parts["zero points"] = weight.zeros
            self._zeros += [int(value) for value in weight.zeros.aminmax()]
        for what, values in parts.items():
            if values.numel() and int(values.max()) >= 1 << weight.bits:
                self.linears.problems.append(f"{linear}: {what} up to {int(values.max())} in {weight.bits} bits")

    def _compare_hash(self, name: str, tensor: torch.Tensor) -> None:
        if not self._recorded:
            return
        if name not in self._recorded:
            self.hashes.problems.append(f"{shown(name)}: in the files, not recorded in {MANIFEST_NAME}")
        elif self._recorded[name] != tensor_hash(tensor):
            self.hashes.problems.append(f"{shown(name)}: changed since it was written (SHA-256)")

    def check_model(self) -> None:
        """Names and shapes against the architecture, without its weights."""
        try:
            skeleton = build_skeleton(str(self.checkpoint.folder), torch.float32)
            tensors = ModelTensors(skeleton, self.checkpoint, self.checkpoint.names())
        except HalfbyteError as error:
            self.names.skipped, self.names.detail = True, str(error)
            return
        self.vocabulary = getattr(skeleton.config.get_text_config(), "vocab_size", None)
        self.names.problems += self._misplaced(skeleton, tensors)
        parameters = dict(skeleton.named_parameters(remove_duplicate=True))
        kind = type(skeleton).__name__
        there = "each there" if self.complete else "as far as the files could be read"
        self.names.detail = f"{len(parameters)} parameters of {kind}, {there}"

    def _misplaced(self, skeleton: Any, tensors: ModelTensors) -> Iterator[str]:
        shapes = {name: parameter.shape for name, parameter in skeleton.state_dict(keep_vars=True).items()}
        filled: Counter[str] = Counter()
        for name in self.checkpoint.names():
            linear = None if self.quantized is None else self.quantized.owner(name)
            if linear is not None and not name.endswith(".bias"):
                continue
            stored = tensors.locate(name)
            if stored is None:
                self.names.notes.append(f"{shown(name)}: the model in config.json has no such tensor")
                continue
            expected = tuple(stored.view(torch.empty(shapes[stored.parameter], device="meta")).shape)
            info = self.checkpoint.info(name)
            filled[stored.parameter] += math.prod(expected)
            if info.shape != expected:
                yield f"{shown(name)}: expected {list(expected)} from config.json, found {list(info.shape)}"
            elif not info.dtype.is_floating_point and linear is None and not _is_buffer(skeleton, stored.parameter):
                yield f"{shown(name)}: expected floating point, found {str(info.dtype).removeprefix('torch.')}"
        for linear, (outputs, inputs, _) in self.weights.items():
            stored = tensors.locate(f"{linear}.weight")
            shape = (0, 0) if stored is None else matrix_shape(skeleton, stored)
            if stored is None:
                yield f"{shown(linear)}: the model in config.json has no such linear"
                continue
            filled[stored.parameter] += math.prod(shape)
            if shape != (outputs, inputs):
                yield f"{shown(linear)}: expected a {list(shape)} linear from config.json, found [{outputs}, {inputs}]"
        if not self.complete:
            return
        broken = set(self.quantized.linears) - set(self.weights) if self.quantized is not None else set()
        for name, parameter in skeleton.named_parameters(remove_duplicate=True):
            if name.removesuffix(".weight") not in broken and filled[name] < parameter.numel():
                found = "missing" if not filled[name] else f"only {filled[name]:,} of {parameter.numel():,} values"
                yield f"{name}: {found}; the config implies it"


def _is_buffer(skeleton: Any, name: str) -> bool:
    return name not in dict(skeleton.named_parameters(remove_duplicate=False))


def _tokenizer(folder: Path, vocabulary: int | None) -> Check:
    """Whether there is one whose ids all have a row of the embedding."""
    check = Check("tokenizer")
    try:
        tokenizer = load_tokenizer(folder)
        highest = max(tokenizer.get_vocab().values())
    except CheckpointError as error:
        check.problems.append(str(error))
        return check
    check.detail = f"ids up to {highest:,}"
    if vocabulary is not None:
        check.detail += f", the embedding has {vocabulary:,} rows"
        if highest >= vocabulary:
            check.problems.append(f"tokenizer: has an id of {highest:,}; the embedding has {vocabulary:,} rows")
    return check
