"""A linear of a real model with what it sees: a little calibration, one decoder block in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.architectures.skeleton import build_skeleton, fill, find_decoder_blocks, release, weight_of
from halfbyte.architectures.stored import ModelTensors
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.errors import UnsupportedError
from halfbyte.explain.lessons import SAMPLE, Options
from halfbyte.explain.matrix import pick_layer
from halfbyte.progress import progress_bar
from halfbyte.quantization.calibration import build_calibration_set, builtin_documents
from halfbyte.quantization.capture import Batch, capture_block_inputs, quantizable_linears
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.discovery import Trial, discover_folds
from halfbyte.quantization.statistics import InputStatistics, StatisticsCollector, block_output
from halfbyte.quantization.tracing import BlockTrace, Product

# Sequences that are calibrated on, others that results are measured on, and tokens in each.
SEQUENCES, OTHERS, TOKENS = 4, 2, 256
# One in so many is tokenized: there is text enough in them.
DOCUMENTS = 10
CPU = torch.device("cpu")


@dataclass
class CalibratedLayer:
    """One linear, its input, and the fold that can scale it.

    Attributes:
        name: full name on disk.
        weight: float32 [out, in].
        rows: float32 [tokens, in], every input that the statistics saw.
        others: float32 [tokens, in], inputs they did not see; none for an expert, whose tokens are its own.
        statistics: of that input.
        shared: names inside the block of all matrices with the same input, this one among them.
        weights: float32 [out, in] of each of those the fold scales.
        trial: the fold that scales this linear's input, and how far it moves the block's output; None if there is none.
        config: of a quantization by `awq`, group size resolved.
    """

    name: str
    weight: torch.Tensor
    rows: torch.Tensor
    others: torch.Tensor
    statistics: InputStatistics
    shared: tuple[str, ...]
    weights: list[torch.Tensor]
    trial: Trial | None
    config: QuantConfig


@torch.no_grad()
def calibrate_layer(options: Options) -> CalibratedLayer:
    """Run some thousand tokens through the model up to the layer's block, and look at what reaches the layer.

    Raises:
        HalfbyteError: the model cannot be read, is quantized already, or has no such layer.
    """
    source = options.source or SAMPLE
    checkpoint = Checkpoint.open(resolve_model(source, progress=options.progress))
    if "quantization_config" in checkpoint.config:
        raise UnsupportedError(f"{source}: is quantized already; give the model it was made from")
    skeleton = build_skeleton(str(checkpoint.folder), torch.float32)
    blocks_name, blocks = find_decoder_blocks(skeleton)
    tensors = ModelTensors(skeleton, checkpoint, checkpoint.names())
    tensors.annotate(blocks, blocks_name)
    stored_name = tensors.prefix(blocks_name)
    linears = quantizable_linears(blocks, stored_name)
    name = pick_layer(list(linears), options)
    number, _, local = name.removeprefix(f"{stored_name}.").partition(".")
    config = QuantConfig().resolved([(name, linears[name].in_features)])
    documents = builtin_documents()[::DOCUMENTS]
    calibration = build_calibration_set(
        load_tokenizer(checkpoint.folder),
        documents,
        max_calib_samples=SEQUENCES + OTHERS,
        max_calib_seq_len=TOKENS,
        seed=0,
    )
    with progress_bar("Running the model", int(number) + 2, enabled=options.progress, unit="blocks") as ticker:
        masks = [torch.full((len(block),), n < SEQUENCES) for n, block in enumerate(calibration.blocks)]
        batches = list(capture_block_inputs(skeleton, blocks_name, calibration.blocks, tensors, CPU, masks=masks))
        ticker.advance()
        for index in range(int(number)):
            fill(blocks[index], f"{blocks_name}.{index}", tensors, torch.float32)
            for batch in batches:
                batch.hidden = block_output(blocks[index](batch.hidden, **batch.kwargs[index]))
            release(blocks[index])
            ticker.advance()
        fill(blocks[int(number)], f"{blocks_name}.{number}", tensors, torch.float32)
        found = _look(blocks[int(number)], int(number), batches, name, local, config)
        ticker.advance()
    return found


def _look(
    block: nn.Module, index: int, batches: list[Batch], name: str, local: str, config: QuantConfig
) -> CalibratedLayer:
    discovery = discover_folds(block, batches[0].hidden, batches[0].kwargs[index])
    shared = next((names for names in discovery.shared_inputs if local in names), None)
    if shared is None:
        raise UnsupportedError(f"--layer {name}: no token of the experiment reached it; take another")
    rows: list[torch.Tensor] = []
    others: list[torch.Tensor] = []

    def note(product: Product) -> None:
        if local in product.matrices:
            x = product.x.reshape(-1, product.x.shape[-1]).float()
            assert batch.counts is not None
            counts = batch.counts.reshape(-1) if batch.counts.numel() == len(x) else torch.ones(len(x)).bool()
            rows.append(x[counts])
            others.append(x[~counts])

    collector = StatisticsCollector(block, discovery.shared_inputs)
    for batch in batches:
        collector.observe(batch.hidden, batch.kwargs[index], batch.counts)
        with BlockTrace(block, on_product=note):
            block(batch.hidden, **batch.kwargs[index])
    collector.finish()
    trial = next((t for t in discovery.trials if t.fold is not None and local in t.consumers), None)
    scaled = trial.consumers if trial is not None else (local,)
    weights = [weight_of(block, consumer).clone() for consumer in scaled if consumer in shared]
    return CalibratedLayer(
        name,
        weight_of(block, local).clone(),
        torch.cat(rows),
        torch.cat(others),
        collector.statistics[shared[0]],
        shared,
        weights,
        trial,
        config,
    )
