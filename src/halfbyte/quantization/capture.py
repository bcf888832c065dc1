"""The inputs of the decoder blocks, without ever holding more than one block's weights."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import Matrix, matrices_of, quantizable_matrices
from halfbyte.architectures.skeleton import fill, set_parameter, text_tower
from halfbyte.architectures.stored import ModelTensors, TensorSource
from halfbyte.errors import UnsupportedError

# Tokens in one forward pass: enough for the matrix products to run at full speed, little enough for activations of an
# MLP (tokens × intermediate × 4 bytes) to stay in the tens of megabytes.
BATCH_TOKENS = 2048


@dataclass
class Batch:
    """Token blocks of one length on their way through the model.

    Attributes:
        hidden: float32 [blocks, tokens, hidden], input of the decoder block reached so far; through earlier blocks as
            they were, or as they were quantized (`QuantConfig.propagate`).
        kwargs: what the model passes beside it, for each decoder block (masks, rotary embeddings).
        counts: bool [blocks, tokens], which tokens' activations count in the statistics; None for all.
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    counts: torch.Tensor | None = None


def make_token_batches(blocks: Sequence[torch.Tensor], batch_tokens: int = BATCH_TOKENS) -> list[torch.Tensor]:
    """Stack neighbouring blocks of equal length: int64 [blocks, tokens] of at most `batch_tokens` (or one block)."""
    batches: list[list[torch.Tensor]] = []
    for block in blocks:
        last = batches[-1] if batches else None
        if last and len(last[0]) == len(block) and (len(last) + 1) * len(block) <= batch_tokens:
            last.append(block)
        else:
            batches.append([block])
    return [torch.stack(batch) for batch in batches]


@torch.no_grad()
def capture_block_inputs(
    model: Any,
    blocks_name: str,
    token_blocks: Sequence[torch.Tensor],
    source: TensorSource,
    device: torch.device,
    batch_tokens: int = BATCH_TOKENS,
    masks: Sequence[torch.Tensor] | None = None,
) -> Iterator[Batch]:
    """Run everything before the first block, yielding batch by batch what every block would be called with.

    Args:
        model: a skeleton; its parts outside the blocks are filled while this runs and empty again afterwards.
        blocks_name: dotted name of the list of decoder blocks.
        token_blocks: int64 [tokens] each.
        source: the checkpoint.
        device: where to compute.
        batch_tokens: see `make_token_batches`.
        masks: bool [tokens] for each block, which of them count in the statistics; None for all.
    """
    tower_name, tower = text_tower(model, blocks_name)
    fill(tower, tower_name, source, torch.float32, skip=blocks_name.removeprefix(tower_name).lstrip("."))
    blocks = model.get_submodule(blocks_name)
    _move_around(tower, blocks, device)
    counted = make_token_batches(masks, batch_tokens) if masks is not None else itertools.repeat(None)
    for tokens, counts in zip(make_token_batches(token_blocks, batch_tokens), counted, strict=False):
        batch = _capture(tower, blocks, tokens.to(device))
        batch.counts = None if counts is None else counts.to(device)
        yield batch
    inside = {id(parameter) for parameter in blocks.parameters()}
    for name, parameter in list(tower.named_parameters()):
        if id(parameter) not in inside:
            set_parameter(tower, name, torch.empty_like(parameter, device="meta"))


def _move_around(tower: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Everything but the blocks, which are empty, to the device."""
    inside = {id(module) for module in blocks.modules()}
    for module in tower.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def _capture(tower: Any, blocks: nn.ModuleList, tokens: torch.Tensor) -> Batch:
    """One batch through everything around the blocks, which hand on what they get.

    Some models expect a block to return the hidden states, others a tuple that begins with them; nothing says which,
    but with the wrong one the second block gets something else than the first handed on.
    """
    for length in range(4):
        batch = Batch(torch.empty(0), [{} for _ in blocks])
        seen: list[torch.Tensor] = []
        for index, block in enumerate(blocks):
            block.forward = _recorder(batch, index, inspect.signature(type(block).forward), seen, length)
        try:
            tower(input_ids=tokens, use_cache=False)
        except (IndexError, RuntimeError, TypeError, ValueError, AttributeError):
            continue
        finally:
            for block in blocks:
                del block.forward
        if len(seen) == len(blocks) and all(hidden.shape == seen[0].shape for hidden in seen):
            return batch
    raise UnsupportedError(f"{type(tower).__name__}: its decoder blocks do not hand hidden states from one to the next")


def _recorder(batch: Batch, index: int, signature: inspect.Signature, seen: list[torch.Tensor], length: int) -> Any:
    """A forward that notes its arguments by name and passes the hidden states on, in a tuple if `length` is not 0."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        names = list(signature.parameters)[1:]  # without self
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = arguments.pop(names[0])
        if index == 0:
            batch.hidden = hidden
        seen.append(hidden)
        batch.kwargs[index] = arguments
        return (hidden, None, None)[:length] if length else hidden

    return forward


def quantizable_linears(blocks: nn.ModuleList, blocks_name: str) -> dict[str, Matrix]:
    """Every matrix of the decoder blocks that may be quantized, by its full name on disk.

    Args:
        blocks: the decoder blocks.
        blocks_name: what the checkpoint calls their list.
    """
    return {
        f"{blocks_name}.{index}.{name}": matrix
        for index, block in enumerate(blocks)
        for name, matrix in quantizable_matrices(block).items()
    }


def kept_names(model: nn.Module, blocks_name: str, stored_name: str, tensors: ModelTensors) -> list[str]:
    """What is never quantized, by name on disk: routers and gates in the blocks, and the towers beside the text.

    Args:
        model: a skeleton whose blocks are annotated.
        blocks_name: dotted name of the list of decoder blocks in the model.
        stored_name: the same on disk.
        tensors: of the checkpoint.
    """
    tower = text_tower(model, blocks_name)[0]
    found: dict[str, None] = {}
    for name, stored in tensors.stored.items():
        if tower and not stored.parameter.startswith((tower + ".", "lm_head")):
            parts = name.split(".")
            depth = next(
                (at for at in range(1, len(parts)) if not stored_name.startswith(".".join(parts[:at]) + ".")), 0
            )
            found[".".join(parts[:depth])] = None
    blocks = model.get_submodule(blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    for index, block in enumerate(blocks):
        for local, matrix in matrices_of(block).items():
            if not matrix.quantizable and matrix.stored.endswith(".weight"):
                found[f"{stored_name}.{index}.{local}"] = None
    return [name for name in found if name]
