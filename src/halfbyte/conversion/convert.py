"""`convert`: a checkpoint in one layout in, the same weights in another one out, a linear in memory at a time.

Two passes. The first reads every linear and asks the new layout whether it can hold it, so that what cannot work is
refused before anything is written. The second writes each linear, reads it back out of what it has packed, and
compares: what `Conversion` says was not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoints.disk import ensure_space
from halfbyte.checkpoints.gguf_copy import is_gguf
from halfbyte.checkpoints.reader import Checkpoint, read_json_object
from halfbyte.checkpoints.writer import CheckpointWriter, check_target, real_target
from halfbyte.conversion.pickles import PickledCheckpoint
from halfbyte.conversion.quantized import QuantizedCheckpoint, WeightSummary, check_strays
from halfbyte.conversion.result import REQUANTIZED, Conversion, LinearConversion
from halfbyte.conversion.targets import FORMATS, GGUF, SAFETENSORS, TARGETS, Target, Traits, format_of
from halfbyte.conversion.weights import check_outcome, compare, rounded
from halfbyte.errors import ConfigError, ModelNotFoundError, UnsupportedError
from halfbyte.formats.layouts import Layout, read_layout
from halfbyte.progress import Ticker, progress_bar
from halfbyte.quantization.budget import parse_bytes
from halfbyte.quantization.identity import versions
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.quantization.report import MANIFEST_NAME
from halfbyte.tensor import QuantizedTensor


def convert(
    model: str | Path,
    output_dir: str | Path,
    format: str,
    *,
    requantize: bool = False,
    from_pickle: bool = False,
    max_shard_size: int | str = 2_000_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write a checkpoint in another layout; every tensor outside the quantized linears stays byte for byte.

    Args:
        model: a quantized checkpoint: a folder, a GGUF file, a hub name, or MODEL@METHOD; for "safetensors" any model.
        output_dir: the new checkpoint; nothing appears there before everything is written.
        format: "gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "compressed-tensors", "gptq" (version 2) or "native";
            or "safetensors": the tensors as they are, in new shards.
        requantize: where a layout has fp16 scales and integer zero points and a weight others, round them and take the
            nearest codes.
        from_pickle: with "safetensors", read `pytorch_model.bin`, without running what it holds.
        max_shard_size: a file of the new checkpoint at most, in bytes or as "2GB" or "800MiB".
        overwrite: replace an existing checkpoint.
        progress: show a bar with an ETA on a terminal.

    Raises:
        UnsupportedError: the layout cannot hold a linear; names it, the reason, and layouts that hold all of them.
        HalfbyteError: a bad model, option or output folder.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r}: expected {', '.join(FORMATS)}")
    if from_pickle and format != SAFETENSORS:
        raise ConfigError(f"from_pickle: makes {SAFETENSORS} of a pickle; convert to {format} what comes of that")
    shard_bytes = parse_bytes(max_shard_size, "max_shard_size")
    folder = _pickle_folder(model) if from_pickle else model_folder(model, progress=progress)
    target = real_target(output_dir)
    check_target(target, overwrite, folder)
    source = _open(str(model), folder, format, from_pickle)
    job = _Job(str(model), source, format, requantize, progress)
    job.plan()
    ensure_space(target, source.total_bytes)
    with CheckpointWriter(target, overwrite=overwrite, source=folder, max_shard_bytes=shard_bytes) as writer:
        with progress_bar("Converting", source.total_bytes, enabled=progress, unit="bytes") as ticker:
            job.write_tensors(writer, ticker)
        job.write_documents(writer)
        writer.commit()
    return job.result(Path(output_dir), writer)


def _pickle_folder(model: str | Path) -> Path:
    """The hub gives no pickles, so it must be a folder."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(f"{model}: no such folder; --from-pickle takes a folder with pytorch_model.bin")
    return folder


def _open(model: str, folder: Path, format: str, from_pickle: bool) -> Checkpoint | PickledCheckpoint:
    if from_pickle:
        return PickledCheckpoint(folder)
    checkpoint = Checkpoint.open(folder)
    if format != SAFETENSORS and read_layout(checkpoint.config) is None:
        raise UnsupportedError(
            f"{model}: is not quantized, so there are no codes to store otherwise; "
            f"try: halfbyte quantize {model} -o DIR"
        )
    return checkpoint


@dataclass
class _Job:
    """One conversion: what was opened, what was decided, what was found."""

    model: str
    source: Checkpoint | PickledCheckpoint
    format: str
    requantize: bool
    progress: bool
    quantized: QuantizedCheckpoint | None = None
    target: Target | None = None
    traits: Traits | None = None
    section: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    rounded: set[str] = field(default_factory=set)
    linears: list[LinearConversion] = field(default_factory=list)
    copied: int = 0

    @property
    def source_format(self) -> str:
        """As the table of targets has it."""
        if isinstance(self.source, PickledCheckpoint):
            return "pickle"
        if is_gguf(self.model):
            return GGUF
        section = self.source.config.get("quantization_config")
        return SAFETENSORS if section is None else format_of(section)

    def plan(self) -> None:
        """Read every linear, and refuse what the new layout cannot hold."""
        if self.format == SAFETENSORS:
            return
        assert isinstance(self.source, Checkpoint)
        layout = read_layout(self.source.config)
        assert layout is not None
        quantized = self.quantized = QuantizedCheckpoint(self.source, layout)
        target = self.target = TARGETS[self.format]
        check_strays(quantized, target.keys)
        summary, fitting = WeightSummary(), _Fitting()
        with progress_bar("Checking", len(quantized.linears), enabled=self.progress, unit="linears") as ticker:
            for name in quantized.linears:
                tensor = quantized.read(name)
                if self.requantize:
                    tensor = self._rounded_to_fit(name, tensor)
                summary.add(tensor)
                fitting.add(name, tensor)
                ticker.advance()
        fitting.check(self.format, self.source_format, summary)
        self.traits = quantized.traits(summary, names_kept=target.names_kept)
        self.section = target.section(self.traits)
        self.layout = read_layout({"quantization_config": self.section})

    def _rounded_to_fit(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """With fp16 scales, if that and nothing else is missing."""
        assert self.target is not None
        if self.target.cannot_hold(tensor) is None:
            return tensor
        found = rounded(tensor)
        if found is None or self.target.cannot_hold(found) is not None:
            return tensor
        self.rounded.add(name)
        return found

    def write_tensors(self, writer: CheckpointWriter, ticker: Ticker) -> None:
        """Every tensor in the order of names, a linear's where its codes stood."""
        for name in self.source.names():
            linear = None if self.quantized is None else self.quantized.owner(name)
            if linear is None:
                writer.add(name, self.source.read(name))
                self.copied += 1
            elif self.quantized is not None and name == f"{linear}.{self.quantized.layout.marker}":
                self._write_linear(writer, linear)
            ticker.advance(self.source.info(name).nbytes)

    def _write_linear(self, writer: CheckpointWriter, name: str) -> None:
        assert self.quantized is not None
        assert self.target is not None
        assert self.traits is not None
        assert self.layout is not None
        before = self.quantized.read(name)
        changed = rounded(before) if name in self.rounded else None
        packed = self.target.pack(changed or before, name, self.traits)
        found = compare(name, before, self.layout.unpack(packed, name))
        self.linears.append(check_outcome(found, name in self.rounded, self.format))
        for key, tensor in packed.items():
            writer.add(f"{name}.{key}", tensor)

    def write_documents(self, writer: CheckpointWriter) -> None:
        """config.json, the manifest with a note of the conversion, the tokenizer files."""
        folder = self.source.folder
        config = dict(self.source.config)
        if self.section:
            config["quantization_config"] = self.section
        writer.copy_files_from(folder)
        writer.add_json("config.json", config)
        manifest = read_json_object(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else {}
        earlier = manifest.get("conversions")
        notes = [*(earlier if isinstance(earlier, list) else []), self._note()]
        writer.add_json(MANIFEST_NAME, {**manifest, "conversions": notes, "sha256": writer.sha256})

    def _note(self) -> dict[str, Any]:
        changed = {linear.name: linear.relative_error for linear in self.linears if linear.outcome == REQUANTIZED}
        return {
            "from": self.source_format,
            "to": self.format,
            "linears": len(self.linears),
            "requantized": changed,
            "versions": versions(),
        }

    def result(self, output_dir: Path, writer: CheckpointWriter) -> Conversion:
        """What was done."""
        return Conversion(
            output_dir=output_dir,
            model=self.model,
            source_format=self.source_format,
            format=self.format,
            linears=tuple(self.linears),
            copied=self.copied,
            dropped=self.source.dropped if isinstance(self.source, PickledCheckpoint) else (),
            bytes_before=self.source.total_bytes,
            bytes_after=writer.nbytes,
            shards=writer.shards,
        )


class _Fitting:
    """Which layouts can hold every linear, and the first that each cannot."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def add(self, name: str, tensor: QuantizedTensor) -> None:
        """Ask every layout that has held all linears so far."""
        for format, target in TARGETS.items():
            reason = None if format in self._first else target.cannot_hold(tensor)
            if reason is not None:
                found = rounded(tensor)
                fits = found is not None and target.cannot_hold(found) is None
                hint = "; --requantize rounds them" if fits else ""
                self._first[format] = f"{name}: {reason}{hint}"

    def check(self, format: str, source_format: str, summary: WeightSummary) -> None:
        """Refuse a layout that cannot hold every linear.

        Raises:
            UnsupportedError: names a linear, the reason, and the layouts that can.
        """
        if summary.group_size is None:
            sizes = ", ".join(str(size) for size in sorted({size for size, _ in summary.sizes}))
            for other, target in TARGETS.items():
                if not target.mixed:
                    reason = f"linears have groups of different sizes ({sizes}); the {other} layout has one for all"
                    self._first.setdefault(other, reason)
        if format not in self._first:
            return
        fits = [
            name
            for name, target in TARGETS.items()
            if name not in self._first and target.suggested and name != source_format
        ]
        choice = f"--format {fits[0]} holds every linear" if fits else f"only {source_format}, as it is, holds them all"
        others = f", and so do {', '.join(fits[1:])}" if len(fits) > 1 else ""
        if source_format == GGUF:
            others += "; halfbyte quantize makes new codes of the file's weights"
        # What stayed in 16 bit was decided when the model was quantized.
        reason = self._first[format].replace("; add it to modules_to_not_convert", "")
        raise UnsupportedError(f"{reason}; {choice}{others}")
