"""What a model's blocks can fold, without quantizing it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import matrices_of
from halfbyte.architectures.skeleton import build_skeleton, fill, find_decoder_blocks, release
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.errors import ConfigError
from halfbyte.quantization.capture import capture_block_inputs
from halfbyte.quantization.discovery import Discovery, Trial, discover_folds

# Random tokens: what a block computes does not depend on them, and no tokenizer is needed.
SEQUENCES, TOKENS = 4, 64


@dataclass(frozen=True)
class BlockFolds:
    """The folds of one decoder block.

    Attributes:
        name: of the block, on disk.
        block_class: name of its class.
        alike: blocks of the same structure that it stands for, itself among them.
        discovery: what was found.
        kept: matrices that are never quantized, such as routers.
    """

    name: str
    block_class: str
    alike: int
    discovery: Discovery
    kept: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "block_class": self.block_class,
            "alike": self.alike,
            "shared_inputs": [list(names) for names in self.discovery.shared_inputs],
            "folds": [_describe(trial) for trial in self.discovery.trials],
            "unscaled": list(self.discovery.unscaled),
            "unreached": list(self.discovery.unreached),
            "never_quantized": list(self.kept),
        }


@torch.no_grad()
def inspect_folds(model: str | Path, *, every_block: bool = False, progress: bool = True) -> list[BlockFolds]:
    """Find the folds of a model, one block in memory at a time.

    Args:
        model: a folder, "sample:NAME" or a hub name, not quantized.
        every_block: look at each block, rather than at the first of each structure.
        progress: show a download's progress on a terminal.

    Raises:
        ConfigError: the model is quantized.
        HalfbyteError: it is missing, broken, or has no decoder blocks.
    """
    checkpoint = Checkpoint.open(resolve_model(str(model), progress=progress))
    if checkpoint.config.get("quantization_config") is not None:
        raise ConfigError(f"{model}: is quantized already; folds are looked for in the original")
    skeleton = build_skeleton(str(checkpoint.folder), torch.float32)
    blocks_name, blocks = find_decoder_blocks(skeleton)
    tensors = ModelTensors(skeleton, checkpoint, checkpoint.names())
    tensors.annotate(blocks, blocks_name)
    vocabulary = skeleton.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    (batch,) = capture_block_inputs(skeleton, blocks_name, list(tokens), tensors, torch.device("cpu"))
    alike: dict[Hashable, list[int]] = {}
    for index, block in enumerate(blocks):
        alike.setdefault(index if every_block else block_structure(block), []).append(index)
    found = []
    for indices in alike.values():
        index = indices[0]
        block = blocks[index]
        fill(block, f"{blocks_name}.{index}", tensors, torch.float32)
        discovery = discover_folds(block, batch.hidden, batch.kwargs[index], thorough=True)
        release(block)
        kept = tuple(name for name, matrix in matrices_of(block).items() if not matrix.quantizable)
        name = tensors.prefix(f"{blocks_name}.{index}")
        found.append(BlockFolds(name, type(block).__name__, len(indices), discovery, kept))
    return found


def block_structure(block: nn.Module) -> Hashable:
    """Equal for blocks of one class with the same parameters."""
    return type(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def _describe(trial: Trial) -> dict[str, Any]:
    fold = trial.fold
    return {
        "producer": trial.producer,
        "consumers": list(trial.consumers),
        "kind": trial.kind,
        "found": fold is not None,
        "reason": trial.reason,
        "deviation": trial.deviation,
        "channels": None if fold is None else fold.channels,
        "offset": None if fold is None else fold.offset,
        "producer_rows": None if fold is None or fold.rows is None else fold.rows.tolist(),
    }
