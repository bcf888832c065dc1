"""`quantize`: a model folder in, a 4-bit checkpoint out, one decoder block in memory at a time."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import build_skeleton, fill, find_decoder_blocks, release
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.formats import gemm
from halfbyte.progress import Ticker, progress_bar
from halfbyte.quantization.block import BlockResult, calibrate_block, round_block
from halfbyte.quantization.calibration import CalibrationSet, build_calibration_set, read_documents
from halfbyte.quantization.capture import Batch, capture_block_inputs, quantizable_linears
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.report import MANIFEST_NAME, LinearReport, QuantizationReport


def quantize(
    model: str | Path,
    output_dir: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: str | Path | Sequence[str] = "builtin",
    max_calib_samples: int = 128,
    max_calib_seq_len: int = 512,
    seed: int = 0,
    device: str = "auto",
    memory_budget: int | str | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a Hugging Face causal language model and write an AutoAWQ GEMM checkpoint.

    Args:
        model: a folder, "sample:NAME" or a hub name.
        output_dir: the new checkpoint; nothing appears there before everything is written.
        config: what to do; AWQ with defaults if None.
        calibration: "builtin" (prose that ships with Python), a UTF-8 text file, or a list of documents.
        max_calib_samples: blocks of calibration text at most.
        max_calib_seq_len: tokens in a block at most.
        seed: which blocks are kept when the text has more.
        device: "auto", "cpu", "cuda" or "cuda:N"; where the search runs.
        memory_budget: not supported yet, must be None.
        ray: not supported yet, must be None.
        overwrite: replace an existing checkpoint.
        progress: show a bar with an ETA on a terminal.

    Raises:
        HalfbyteError: a bad model, option, text or output folder; nothing is left behind.
    """
    for name, value in (("memory_budget", memory_budget), ("ray", ray)):
        if value is not None:
            raise UnsupportedError(f"{name}: not supported by this version of halfbyte; leave it out")
    job = _Job.prepare(str(model), config or QuantConfig(), pick_device(device), progress)
    if job.config.method != "rtn":
        read_documents(calibration)  # refuse bad text before any folder is made
    with CheckpointWriter(output_dir, overwrite=overwrite, source=job.checkpoint.folder) as writer:
        if job.config.method != "rtn":
            tokenizer = load_tokenizer(job.checkpoint.folder)
            job.calibration = build_calibration_set(
                tokenizer,
                calibration,
                max_calib_samples=max_calib_samples,
                max_calib_seq_len=max_calib_seq_len,
                seed=seed,
            )
        with progress_bar("Quantizing", len(job.blocks) + 1, enabled=progress, unit="blocks") as ticker:
            job.write_tensors(writer, ticker)
        report = job.report(Path(output_dir))
        job.write_documents(writer, report)
        writer.commit()
    return report


@dataclass
class _Job:
    """One run: what was opened, and what has been written so far."""

    model_name: str
    checkpoint: Checkpoint
    skeleton: Any
    blocks_name: str
    blocks: nn.ModuleList
    config: QuantConfig
    device: torch.device
    started: float
    calibration: CalibrationSet | None = None
    linears: list[LinearReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes_before: dict[str, int] = field(default_factory=lambda: {"blocks": 0, "other": 0})
    bytes_after: dict[str, int] = field(default_factory=lambda: {"blocks": 0, "other": 0})
    parameters: int = 0

    @classmethod
    def prepare(cls, model: str, config: QuantConfig, device: torch.device, progress: bool) -> _Job:
        """Open everything and refuse what cannot work, before anything is written or computed."""
        started = time.monotonic()
        checkpoint = Checkpoint.open(resolve_model(model, progress=progress))
        if "quantization_config" in checkpoint.config:
            raise UnsupportedError(f"{model}: is quantized already; quantize the 16-bit model it came from")
        skeleton = build_skeleton(str(checkpoint.folder), torch.float32)
        blocks_name, blocks = find_decoder_blocks(skeleton)
        linears = [(name, width) for name, width in quantizable_linears(blocks, blocks_name) if not config.skips(name)]
        if not linears:
            raise ConfigError("modules_to_not_convert: leaves no linear to quantize")
        config = config.resolved(linears)
        assert isinstance(config.group_size, int)
        for name, _ in linears:
            linear = skeleton.get_submodule(name)
            gemm.check(linear.out_features, linear.in_features, config.group_size, config.bits, name)
        return cls(model, checkpoint, skeleton, blocks_name, blocks, config, device, started)

    @torch.no_grad()
    def write_tensors(self, writer: CheckpointWriter, ticker: Ticker) -> None:
        """Every tensor of the new checkpoint, the decoder blocks quantized one by one."""
        ticker.describe("Reading calibration inputs" if self.calibration else "Quantizing")
        batches = self._capture()
        names_by_block = self._names_by_block()
        for name in names_by_block.pop(None):
            tensor = self.checkpoint.read(name)
            self.bytes_before["other"] += tensor.nbytes
            self._write(writer, name, "other", tensor)
        ticker.advance()
        for index, block in enumerate(self.blocks):
            ticker.describe(f"Quantizing block {index + 1} of {len(self.blocks)}")
            with self._filled(block, index):
                result = self._quantize_block(block, index, batches)
                self._write_block(writer, block, f"{self.blocks_name}.{index}", names_by_block[index], result)
            self.linears += result.reports
            self.warnings += result.warnings
            ticker.advance()

    def _capture(self) -> list[Batch]:
        if self.calibration is None:
            return []
        return capture_block_inputs(
            self.skeleton, self.blocks_name, self.calibration.blocks, self.checkpoint, self.device
        )

    def _quantize_block(self, block: nn.Module, index: int, batches: list[Batch]) -> BlockResult:
        name = f"{self.blocks_name}.{index}"
        if self.calibration is None:
            return round_block(block, name, self.config)
        return calibrate_block(
            block,
            index,
            name,
            batches,
            self.skeleton.config,
            self.config,
            lambda tensor: self.checkpoint.info(tensor).dtype,
        )

    @contextmanager
    def _filled(self, block: nn.Module, index: int) -> Iterator[None]:
        name = f"{self.blocks_name}.{index}"
        fill(block, name, self.checkpoint, torch.float32)
        for local, parameter in block.named_parameters():
            if not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"tensor {name}.{local}: holds NaN or infinite values, so no grid fits it; fetch the model again"
                )
        block.to(self.device)
        try:
            yield
        finally:
            release(block)

    def _names_by_block(self) -> dict[int | None, list[str]]:
        """Names on disk by decoder block; None for everything outside them."""
        names: dict[int | None, list[str]] = {None: [], **{index: [] for index in range(len(self.blocks))}}
        prefix = self.blocks_name + "."
        for name in self.checkpoint.names():
            number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
            names[int(number) if number.isdecimal() and int(number) in names else None].append(name)
        return names

    def _write_block(
        self, writer: CheckpointWriter, block: nn.Module, name: str, names: list[str], result: BlockResult
    ) -> None:
        """Packed linears in place of their weights; everything else as it is now, in its dtype on disk."""
        parameters = dict(block.named_parameters())
        for full in names:
            local = full.removeprefix(name + ".")
            self.bytes_before["blocks"] += self.checkpoint.info(full).nbytes
            module, _, leaf = local.rpartition(".")
            if module in result.tensors:
                if leaf == "weight":
                    for key, tensor in gemm.pack(result.tensors[module], f"{name}.{module}").items():
                        self._write(writer, f"{name}.{module}.{key}", "blocks", tensor)
                    self.parameters += result.tensors[module].codes.numel()
                    continue
                dtype = torch.float16  # the layout's own dtype for biases
            else:
                dtype = self.checkpoint.info(full).dtype
            value = parameters[local].data if local in parameters else self.checkpoint.read(full)
            self._write(writer, full, "blocks", value.to("cpu", dtype))

    def _write(self, writer: CheckpointWriter, name: str, part: str, tensor: torch.Tensor) -> None:
        self.bytes_after[part] += tensor.nbytes
        writer.add(name, tensor)

    def report(self, output_dir: Path) -> QuantizationReport:
        """Everything that was measured."""
        calibration = None if self.calibration is None else self.calibration.describe()
        return QuantizationReport(
            output_dir=output_dir,
            model=self.model_name,
            config=self.config,
            calibration=calibration,
            linears=self.linears,
            block_bytes_before=self.bytes_before["blocks"],
            block_bytes_after=self.bytes_after["blocks"],
            total_bytes_before=sum(self.bytes_before.values()),
            total_bytes_after=sum(self.bytes_after.values()),
            parameters_quantized=self.parameters,
            seconds=time.monotonic() - self.started,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            warnings=self.warnings,
            versions={name: version(name) for name in ("halfbyte", "torch", "transformers")},
        )

    def write_documents(self, writer: CheckpointWriter, report: QuantizationReport) -> None:
        """config.json with its `quantization_config`, the manifest, and the tokenizer files."""
        assert isinstance(self.config.group_size, int)
        quantization_config = gemm.quantization_config(
            group_size=self.config.group_size, modules_to_not_convert=self._not_converted()
        )
        writer.copy_files_from(self.checkpoint.folder)
        writer.add_json("config.json", {**self.checkpoint.config, "quantization_config": quantization_config})
        manifest = {key: value for key, value in report.to_dict().items() if key != "output_dir"}
        writer.add_json(MANIFEST_NAME, manifest)

    def _not_converted(self) -> list[str]:
        """Names every loader understands for what stayed in 16 bit: `lm_head` and the parts the user excluded."""
        return ["lm_head", *self.config.modules_to_not_convert]
