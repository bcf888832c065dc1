"""How much memory a quantization takes, and what gives way when it may take less.

    the process itself + 3 × the largest block in fp32 + its Gram matrices, one of them twice + one batch's activations
    + the block inputs of all batches

With `QuantConfig.propagate` all Gram matrices are there twice: those of one batch beside the sums.

The last goes to disk first, which costs no more than reading it again; then batches get smaller.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from torch import nn

from halfbyte.architectures.matrices import Matrix, matrices_of
from halfbyte.errors import ConfigError
from halfbyte.quantization.capture import BATCH_TOKENS

# Python, torch and transformers, imported and warmed up: measured 420 to 560 MB on Linux with the CPU build.
PROCESS_BYTES = 600_000_000
# The weights, the copy a search works on, and the temporaries of rounding it.
BLOCK_COPIES = 3
# What configs call the number of experts a token goes through.
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "top_k_experts", "moe_top_k", "moe_topk",
    "moe_k",
)  # fmt: skip
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided.

    Attributes:
        batch_tokens: tokens in one forward pass at most, or one calibration block.
        spill: whether the block inputs are kept on disk.
        expected_bytes: estimate of the peak.
    """

    batch_tokens: int
    spill: bool
    expected_bytes: int


def parse_bytes(value: int | str, option: str = "memory_budget") -> int:
    """Bytes: a number, or text such as "2GB", "1.5 GiB", "800MiB".

    Args:
        value: what was given.
        option: whose value it is, for the message.

    Raises:
        ConfigError: not a positive amount.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", str(value).upper())
    unit = "" if match is None else match[2]
    unit += "B" if unit and not unit.endswith("B") else ""
    if match is None or unit not in UNITS or not float(match[1]):
        raise ConfigError(f'{option} {value!r}: expected an amount such as "2GB", "800MiB" or a number of bytes')
    return int(float(match[1]) * UNITS[unit])


def plan_memory(
    blocks: nn.ModuleList,
    linears: Sequence[tuple[str, int]],
    *,
    sequences: Sequence[int],
    hidden_size: int,
    embedding_bytes: int,
    propagate: bool,
    budget: int | str | None,
) -> MemoryPlan:
    """Decide what is kept in memory.

    Args:
        blocks: the decoder blocks; may be without weights.
        linears: (full name, in_features) of what is quantized.
        sequences: tokens in each calibration block; empty without calibration.
        hidden_size: width of the hidden states.
        embedding_bytes: of what is computed before the first block, in fp32 and as stored.
        propagate: whether the Gram matrices of each batch are formed apart, beside their sums.
        budget: peak resident bytes, see `parse_bytes`; None for as much as the machine has.

    Raises:
        ConfigError: no such amount, or less than the least that works.
    """
    limit = None if budget is None else parse_bytes(budget)
    block = BLOCK_COPIES * max(4 * sum(parameter.numel() for parameter in part.parameters()) for part in blocks)
    if not sequences:
        return _affordable(limit, MemoryPlan(BATCH_TOKENS, False, PROCESS_BYTES + block))
    inputs = 4 * hidden_size * sum(sequences)
    per_token = _activation_bytes(blocks, hidden_size)
    longest = max(sequences)

    def working(batch_tokens: int) -> int:
        held = max(block + _gram_bytes(linears, len(blocks), propagate), embedding_bytes)
        return PROCESS_BYTES + held + per_token * max(batch_tokens, longest)

    if limit is None:
        spill = inputs > psutil.virtual_memory().available // 2
        return MemoryPlan(BATCH_TOKENS, spill, working(BATCH_TOKENS) + (0 if spill else inputs))
    sizes = [
        BATCH_TOKENS >> halving for halving in range(BATCH_TOKENS.bit_length()) if BATCH_TOKENS >> halving > longest
    ]
    batch_tokens = next((size for size in sizes if working(size) <= limit), longest)
    expected = working(batch_tokens)
    spill = expected + inputs > limit
    return _affordable(limit, MemoryPlan(batch_tokens, spill, expected + (0 if spill else inputs)))


def _affordable(limit: int | None, plan: MemoryPlan) -> MemoryPlan:
    if limit is not None and limit < plan.expected_bytes:
        least = math.ceil(plan.expected_bytes / 1e8) / 10
        raise ConfigError(
            f"memory_budget: {limit / 1e9:.2g} GB are too little for this model and calibration; the least is "
            f"{least:.1f} GB (shorter calibration blocks, max_calib_seq_len, need less)"
        )
    return plan


def _gram_bytes(linears: Sequence[tuple[str, int]], blocks: int, propagate: bool) -> int:
    """Of one block: at most two inputs of one width in one module (attention has two, an MLP one), one matrix twice.

    With `propagate` all of them twice.
    """
    inputs: dict[tuple[str, int], int] = {}
    for name, width in linears:
        place = (name.rpartition(".")[0], width)
        inputs[place] = min(inputs.get(place, 0) + 1, 2)
    largest = max(width for _, width in linears)
    total = sum(4 * width * width * count for (_, width), count in inputs.items())
    average, single = math.ceil(total / blocks), 4 * largest * largest
    return average + (max(average, single) if propagate else single)


def _activation_bytes(blocks: nn.ModuleList, hidden_size: int) -> int:
    """Per token: every output of the block that has most, the widest twice more, and the hidden states."""
    most = 0
    for block in blocks:
        widest = max((matrix.out_features for matrix in matrices_of(block).values()), default=0)
        most = max(most, outputs_per_token(block) + 2 * widest)
    return 4 * (most + 4 * hidden_size)


def outputs_per_token(block: nn.Module) -> int:
    """Values that the products of a block put out for one token: of its experts, as many as a token goes through.

    Where the block's config does not say how many these are, they are all counted, and so are experts that cannot be
    told apart from their parameter (Llama 4's), because all of them see every token.
    """
    shared, experts = 0, Counter[int]()
    held = {matrix.parameter for matrix in matrices_of(block).values()}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3 and parameter.shape[1] > 1 and name not in held:  # nor a convolution of single channels
            shared += parameter.shape[0] * max(parameter.shape[1:])
    for matrix in matrices_of(block).values():
        expert = _expert_of(matrix)
        if expert is None:
            shared += matrix.out_features
        else:
            experts[expert] += matrix.out_features
    chosen = sorted(experts.values(), reverse=True)[: _experts_per_token(block)]
    return shared + sum(chosen)


def _expert_of(matrix: Matrix) -> int | None:
    """Number of the expert it belongs to: a slice of a parameter, or a module in a list of them."""
    listed = re.search(r"\bexperts\.(\d+)\.", matrix.parameter)
    sliced = next((step[2] for step in matrix.steps if step[0] == "select"), None)
    return int(listed[1]) if listed else sliced


def _experts_per_token(block: nn.Module) -> int | None:
    """As the config says that transformers leaves with the block's modules; None if none does."""
    configs = (getattr(module, "config", None) for module in block.modules())
    counts = (getattr(config, name, None) for config in configs for name in EXPERTS_PER_TOKEN)
    return next((count for count in counts if isinstance(count, int) and count > 0), None)
