"""The inputs of the decoder blocks, without ever holding more than one block's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import TensorSource, fill, release

# Tokens in one forward pass: enough for the matrix products to run at full speed, little enough for activations of an
# MLP (tokens × intermediate × 4 bytes) to stay in the tens of megabytes.
BATCH_TOKENS = 2048


@dataclass
class Batch:
    """Token blocks of one length on their way through the model.

    Attributes:
        hidden: float32 [blocks, tokens, hidden], input of the decoder block reached so far.
        kwargs: what the model passes beside it, for each decoder block (masks, rotary embeddings).
        propagated: the same as `hidden` through the blocks as they were quantized, where the method wants it.
    """

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]
    propagated: torch.Tensor | None = None


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
) -> Iterator[Batch]:
    """Run everything before the first block, yielding batch by batch what every block would be called with.

    Args:
        model: a skeleton; its parts outside the blocks are filled while this runs and empty again afterwards.
        blocks_name: dotted name of the list of decoder blocks.
        token_blocks: int64 [tokens] each.
        source: the checkpoint.
        device: where to compute.
        batch_tokens: see `make_token_batches`.
    """
    base = model.base_model
    base_name = "" if base is model else model.base_model_prefix
    fill(base, base_name, source, torch.float32, skip=blocks_name.removeprefix(base_name).lstrip("."))
    blocks = model.get_submodule(blocks_name)
    for part in base.children():
        if part is not blocks:
            part.to(device)

    for tokens in make_token_batches(token_blocks, batch_tokens):
        batch = Batch(torch.empty(0), [{} for _ in blocks])
        for index, block in enumerate(blocks):
            block.forward = _recorder(batch, index)
        try:
            base(input_ids=tokens.to(device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward
        yield batch
    for part in base.children():
        if part is not blocks:
            release(part)


def _recorder(batch: Batch, index: int) -> Any:
    """A forward that notes its arguments and passes the hidden states on."""

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if index == 0:
            batch.hidden = hidden_states
        batch.kwargs[index] = kwargs
        return hidden_states

    return forward


def quantizable_linears(blocks: nn.ModuleList, blocks_name: str) -> list[tuple[str, int]]:
    """(full name, in_features) of every linear inside the decoder blocks."""
    return [
        (f"{blocks_name}.{name}", module.in_features)
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    ]
