"""`quantize`: a model folder in, a 4-bit checkpoint out, one decoder block in memory at a time.

Every finished block is kept in a journal beside the target (`checkpoints/journal.py`), so the same command goes on
where an earlier one ended. What reaches the checkpoint always comes out of the journal, whoever worked on the block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import build_skeleton, fill, find_decoder_blocks, release
from halfbyte.architectures.stored import ModelTensors
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.disk import ensure_space
from halfbyte.checkpoints.journal import Journal
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import CheckpointError, ConfigError, HalfbyteError, UnsupportedError
from halfbyte.progress import Ticker, progress_bar
from halfbyte.quantization.bit_budget import BitBudget
from halfbyte.quantization.budget import MemoryPlan, parse_bytes, plan_memory
from halfbyte.quantization.calibration import CalibrationSet, build_calibration_set, read_documents
from halfbyte.quantization.capture import capture_block_inputs, kept_names, quantizable_linears
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.distributed import RayWorkers, Workers, workers
from halfbyte.quantization.documents import write_documents
from halfbyte.quantization.identity import describe_run, versions
from halfbyte.quantization.measuring import errors_by_name, measure_blocks
from halfbyte.quantization.packing import choose_format, names_by_block
from halfbyte.quantization.report import BlockReport, LinearReport, QuantizationReport
from halfbyte.quantization.resuming import announce, seconds_spent, with_kept_blocks
from halfbyte.quantization.states import States, is_saved
from halfbyte.quantization.statistics import sums_by_batch
from halfbyte.quantization.task import BlockOutcome, BlockTask, advance, give_back_memory, peak_memory
from halfbyte.quantization.widening import Widening


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

    An interrupted run (Ctrl-C, a full disk, a kill, a power cut) keeps its finished blocks in `.NAME.partial` beside
    `output_dir`; the same call goes on from there, with the result it would have had.

    Args:
        model: a folder, "sample:NAME" or a hub name.
        output_dir: the new checkpoint; nothing appears there before everything is written.
        config: what to do; AWQ with defaults if None.
        calibration: "builtin" (prose that ships with Python), a UTF-8 text file, or a list of documents.
        max_calib_samples: blocks of calibration text at most.
        max_calib_seq_len: tokens in a block at most.
        seed: which blocks are kept when the text has more.
        device: "auto", "cpu", "cuda", "cuda:N", or several GPUs as "cuda:0,cuda:1"; where the search runs.
        memory_budget: peak resident memory, in bytes or as "2GB" or "800MiB"; None for what the machine has.
        ray: "local", "auto" or the address of a Ray cluster that searches the blocks (with `propagate`, that runs the
            calibration through them); None for this process.
        overwrite: replace an existing checkpoint, and an unfinished run with other options.
        progress: show a bar with an ETA on a terminal, and say when an unfinished run is taken up.

    Raises:
        HalfbyteError: a bad model, option, text or output folder; finished blocks are kept, nothing else.
        KeyboardInterrupt: Ctrl-C; its text says what was kept.
    """
    if memory_budget is not None:
        parse_bytes(memory_budget)
    devices = [pick_device(name) for name in device.split(",")]
    job = _Job.prepare(str(model), config or QuantConfig(), devices[0], progress)
    if job.config.propagate and len(devices) > 1:
        raise UnsupportedError(
            f"device {device}: propagate passes the error of each block on to the next, so blocks cannot be searched "
            f"side by side; name one device, or leave propagate out"
        )
    journal = Journal(output_dir, overwrite=overwrite, source=job.checkpoint.folder)
    if job.config.calibrated:
        documents = read_documents(calibration)  # refuse bad text before the tokenizer is loaded
        job.calibration = build_calibration_set(
            load_tokenizer(job.checkpoint.folder),
            documents,
            max_calib_samples=max_calib_samples,
            max_calib_seq_len=max_calib_seq_len,
            seed=seed,
        )
    job.plan = job.plan_memory(memory_budget)
    with journal, job.begun(journal, seed) as threads:
        if journal.finished is not None:
            return QuantizationReport.from_dict(journal.finished)
        ensure_space(journal.target, job.disk_bytes() - journal.nbytes())
        job.seconds_before = seconds_spent(journal)
        if progress:
            announce(journal, len(job.blocks))
        try:
            with (
                workers(ray, devices, threads) as helpers,
                progress_bar("Quantizing", job.steps, enabled=progress, unit="blocks") as ticker,
            ):
                job.choose_widths(journal, ticker)
                job.quantize_blocks(journal, helpers, ticker)
                return job.assemble(journal, Path(output_dir), ticker)
        except (HalfbyteError, KeyboardInterrupt) as error:
            raise with_kept_blocks(error, journal, len(job.blocks)) from error


@dataclass
class _Job:
    """One run: what was opened, and what was decided about it."""

    model_name: str
    checkpoint: Checkpoint
    tensors: ModelTensors
    skeleton: Any
    blocks_name: str
    stored_name: str
    blocks: nn.ModuleList
    linears: list[tuple[str, int]]
    config: QuantConfig
    device: torch.device
    started: float
    names: dict[int | None, list[str]]
    notes: list[str]
    budget: BitBudget | None
    widths: dict[str, int] = field(default_factory=dict)
    calibration: CalibrationSet | None = None
    plan: MemoryPlan = field(default_factory=lambda: MemoryPlan(0, False, 0))
    seconds_before: float = 0.0

    @classmethod
    def prepare(cls, model: str, config: QuantConfig, device: torch.device, progress: bool) -> _Job:
        """Open everything and refuse what cannot work, before anything is written or computed."""
        started = time.monotonic()
        checkpoint = Checkpoint.open(resolve_model(model, progress=progress))
        if "quantization_config" in checkpoint.config:
            raise UnsupportedError(f"{model}: is quantized already; quantize the 16-bit model it came from")
        skeleton = build_skeleton(str(checkpoint.folder), torch.float32)
        blocks_name, blocks = find_decoder_blocks(skeleton)
        tensors = ModelTensors(skeleton, checkpoint, checkpoint.names())
        tensors.annotate(blocks, blocks_name)
        stored_name = tensors.prefix(blocks_name)
        matrices = {k: m for k, m in quantizable_linears(blocks, stored_name).items() if not config.skips(k)}
        linears = [(name, matrix.in_features) for name, matrix in matrices.items()]
        if not linears:
            raise ConfigError("modules_to_not_convert: leaves no linear to quantize")
        widening = Widening.of(config)
        if widening is not None:
            widening.check(checkpoint.config, quantizable_linears(blocks, stored_name))
        config = config.resolved(linears if widening is None else widening.per_gpu(linears))
        assert isinstance(config.group_size, int)
        config, notes = choose_format(config, matrices, widening)
        notes += [] if widening is None else [widening.note(checkpoint.config)]
        budget = BitBudget.of(config, {name: (m.out_features, m.in_features) for name, m in matrices.items()})
        names = names_by_block(checkpoint, stored_name, len(blocks))
        return cls(
            model, checkpoint, tensors, skeleton, blocks_name, stored_name, blocks, linears, config, device,
            started, names, notes, budget,
        )  # fmt: skip

    def plan_memory(self, budget: int | str | None) -> MemoryPlan:
        """What is kept in memory, and how many tokens go through a block at a time."""
        outside = [self.checkpoint.info(name) for name in self.names[None]]
        largest = max((info.nbytes + 4 * math.prod(info.shape) for info in outside), default=0)
        return plan_memory(
            self.blocks,
            self.linears,
            sequences=[] if self.calibration is None else [len(block) for block in self.calibration.blocks],
            hidden_size=self.skeleton.config.get_text_config().hidden_size,
            embedding_bytes=largest,
            propagate=self.config.propagate,
            budget=budget,
        )

    def disk_bytes(self) -> int:
        """About what the journal, the hidden states and the new checkpoint take together."""
        inside = sum(self.checkpoint.info(n).nbytes for i, names in self.names.items() if i is not None for n in names)
        outside = sum(self.checkpoint.info(name).nbytes for name in self.names[None])
        assert isinstance(self.config.group_size, int)
        usual = self.config.bits + 24 / (self.config.group_size if self.config.group_size > 0 else 1024)
        bits = usual if self.config.target_bits is None else self.config.target_bits
        states = 0
        if self.calibration is not None:
            hidden_size = self.skeleton.config.get_text_config().hidden_size
            states = 3 * 4 * hidden_size * self.calibration.tokens
        return outside + round(2 * inside * bits / 16) + states

    @contextmanager
    def begun(self, journal: Journal, seed: int) -> Iterator[int]:
        """The journal open for this very run, and torch with the threads that run has: those it began with."""
        before = torch.get_num_threads()
        run = describe_run(
            self.checkpoint,
            self.config,
            calibration=None if self.calibration is None else self.calibration.sha256,
            seed=seed,
            batch_tokens=self.plan.batch_tokens,
            device=self.device,
        )
        earlier = journal.earlier_run()
        threads = earlier["threads"] if earlier == {**run, "threads": earlier.get("threads")} else before
        journal.begin({**run, "threads": threads})
        torch.set_num_threads(threads)
        try:
            yield threads
        finally:
            torch.set_num_threads(before)

    @property
    def steps(self) -> int:
        """Of the progress bar."""
        return 1 + len(self.blocks) * (1 if self.budget is None else 2)

    @torch.no_grad()
    def choose_widths(self, journal: Journal, ticker: Ticker) -> None:
        """The first pass of a bit budget: the errors of every width, then the width of each matrix."""
        if self.budget is None:
            return
        ticker.advance(len(journal.measured))
        if len(journal.measured) < len(self.blocks):
            states = States(journal.folder / "states", journal.target, self.device, spill=self.plan.spill)
            self._capture(states)
            measure_blocks(journal, len(self.blocks), self._filled, self._task, states, ticker)
        self.widths = self.budget.solve(errors_by_name(journal, self.stored_name))

    @torch.no_grad()
    def quantize_blocks(self, journal: Journal, helpers: Workers | None, ticker: Ticker) -> None:
        """Every block that the journal lacks, in order, or by several workers at the same time."""
        ticker.describe("Reading calibration inputs" if self.calibration else "Quantizing")
        total = len(self.blocks)
        states = self._states(journal)
        running: dict[Future[BlockOutcome], int] = {}

        def collect(at_most: int) -> None:
            while len(running) > at_most:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    assert helpers is not None
                    self._record(journal, running.pop(future), helpers.result(future))
                    ticker.advance()

        ticker.advance(1 + len(journal.records))
        for index in range(states.step, total):
            if all(later in journal.records for later in range(index, total)):
                break
            ticker.describe(f"Quantizing block {index + 1} of {total}")
            with self._filled(index) as block:
                if index in journal.records:
                    if self.config.propagate:
                        self._task(block, index, states).pass_on(dict(journal.read(index)))
                    else:
                        advance(block, index, states.batches)
                    states.step += 1
                elif helpers is None or self.config.propagate:
                    sums = helpers.sums_by_batch if isinstance(helpers, RayWorkers) else sums_by_batch
                    outcome = self._task(block, index, states).run(sums)
                    saved = states.step_on() if index + 1 < total else None
                    self._record(journal, index, outcome, saved)
                    del outcome  # before the next block needs the room
                    ticker.advance()
                else:
                    collect(helpers.slots)
                    running[helpers.submit(self._task(block, index, states))] = index
                    advance(block, index, states.batches)
                    states.step += 1
            states.forget_earlier()
        collect(0)

    def _states(self, journal: Journal) -> States:
        """The hidden states from where the journal can go on: saved ones, or those before the first block."""
        folder = journal.folder / "states"
        total, done = len(self.blocks), len(journal.records)
        states = States(folder, journal.target, self.device, spill=self.plan.spill)
        contiguous = next(index for index in range(total + 1) if index not in journal.records)
        records = (journal.records[index] for index in reversed(range(contiguous)))
        saved = next((record["states"] for record in records if record.get("states")), None)
        if self.calibration is None or done == total:
            states.step = contiguous
            return states
        if not is_saved(folder, saved):
            saved = None
        self._capture(states, saved)
        return states

    def _capture(self, states: States, saved: dict[str, Any] | None = None) -> None:
        """Fill `states` with what goes into the first block, or with what was saved later; empty if uncalibrated."""
        if self.calibration is None:
            return
        for batch in capture_block_inputs(
            self.skeleton,
            self.blocks_name,
            self.calibration.blocks,
            self.tensors,
            self.device,
            self.plan.batch_tokens,
            self.calibration.masks,
        ):
            states.take(batch, saved)

    def _task(self, block: nn.Module, index: int, states: States) -> BlockTask:
        name = f"{self.stored_name}.{index}"
        return BlockTask(
            block=block,
            index=index,
            name=name,
            names=self.names[index],
            batches=states.batches,
            config=self.config,
            checkpoint=self.checkpoint,
            widths={k.removeprefix(f"{name}."): bits for k, bits in self.widths.items() if k.startswith(f"{name}.")},
        )

    def _record(self, journal: Journal, index: int, outcome: BlockOutcome, saved: dict[str, Any] | None = None) -> None:
        journal.record(index, outcome.tensors, {**outcome.document, "states": saved})

    @contextmanager
    def _filled(self, index: int) -> Iterator[nn.Module]:
        block, name = self.blocks[index], f"{self.blocks_name}.{index}"
        fill(block, name, self.tensors, torch.float32)
        for local, parameter in block.named_parameters():
            if not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"tensor {name}.{local}: holds NaN or infinite values, so no grid fits it; fetch the model again"
                )
        block.to(self.device)
        try:
            yield block
        finally:
            release(block)
            give_back_memory()

    def assemble(self, journal: Journal, output_dir: Path, ticker: Ticker) -> QuantizationReport:
        """Put the checkpoint together out of the journal and everything outside the blocks."""
        ticker.describe("Writing the checkpoint")
        with journal.writer() as writer:
            for name in self.names[None]:
                writer.add(name, self.checkpoint.read(name))
            for index in range(len(self.blocks)):
                for name, tensor in journal.read(index):
                    writer.add(name, tensor)
            report = self._report(journal, output_dir)
            write_documents(writer, self.checkpoint, report, self._not_converted())
            journal.commit(writer, report.to_dict())
        return report

    def _report(self, journal: Journal, output_dir: Path) -> QuantizationReport:
        """Everything that was measured, now or in an earlier attempt."""
        records = [journal.records[index] for index in range(len(self.blocks))]
        outside = sum(self.checkpoint.info(name).nbytes for name in self.names[None])
        before, after = (sum(record[key] for record in records) for key in ("bytes_before", "bytes_after"))
        blocks = [
            BlockReport(f"{self.blocks_name}.{index}", record["seconds"], record["peak_memory_bytes"])
            for index, record in enumerate(records)
        ]
        return QuantizationReport(
            output_dir=output_dir,
            model=self.model_name,
            config=self.config,
            calibration=None if self.calibration is None else self.calibration.describe(),
            linears=[LinearReport(**linear) for record in records for linear in record["linears"]],
            block_bytes_before=before,
            block_bytes_after=after,
            total_bytes_before=outside + before,
            total_bytes_after=outside + after,
            parameters_quantized=sum(record["parameters"] for record in records),
            seconds=time.monotonic() - self.started + self.seconds_before,
            peak_memory_bytes=max(peak_memory(), *(block.peak_memory_bytes for block in blocks)),
            blocks=blocks,
            threads=torch.get_num_threads(),
            warnings=self.notes + [warning for record in records for warning in record["warnings"]],
            versions=versions(),
            quantized_bytes=sum(record["quantized_bytes"] for record in records),
        )

    def _not_converted(self) -> list[str]:
        """Names every loader understands for what stayed in 16 bit: `lm_head`, routers, what the user excluded."""
        kept = kept_names(self.skeleton, self.blocks_name, self.stored_name, self.tensors)
        return ["lm_head", *kept, *self.config.modules_to_not_convert]
