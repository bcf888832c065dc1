"""How a quantized network computes on a CPU: in which dtype, and on whose threads.

A CPU without bf16 instructions runs bf16 arithmetic by converting back and forth: torch's bf16 matrix product is then
several times slower than its fp32 one, and every norm pays for two conversions. Such a CPU computes in fp32, which is
also the more exact choice; the embedding and the head keep their 16-bit weight, because reading it is what they cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.device.cpu import has_bf16_arithmetic, pick_tier
from halfbyte.kernels.half_linear import half_linear

# A step of at most this many tokens leaves torch nothing worth sharing between threads.
SMALL_STEP_TOKENS = 16


class HalfWeightLinear(nn.Module):
    """A linear with a 16-bit weight, fp32 in and out.

    Attributes:
        weight: [out, in] in bf16 or fp16; may be tied to an embedding.
        bias: [out] or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self._tier = pick_tier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [..., in] → fp32 [..., out]."""
        return half_linear(x, self.weight, self.bias, self._tier)


def prepare_for_cpu(network: Any) -> None:
    """Make a quantized network on the CPU compute in the dtype and on the threads it is fast with.

    Args:
        network: every tensor in place, ties made.
    """
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if embedding.weight.dtype == torch.float32 or type(head) is not nn.Linear or has_bf16_arithmetic():
        return
    kept = {id(embedding.weight), id(head.weight)}
    for parameter in network.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.float()
    embedding.register_forward_hook(lambda _module, _args, output: output.float())
    network.set_output_embeddings(HalfWeightLinear(nn.Parameter(head.weight.data, requires_grad=False), head.bias))
    _keep_torch_single_threaded_in_small_steps(network)


def _keep_torch_single_threaded_in_small_steps(network: Any) -> None:
    """While decoding, leave the cores to the native pool.

    torch's share of such a step is a few microseconds an operation. Its OpenMP threads would spin between them and take
    the cores from ours: measured, attention over 128 tokens went from 0.1 ms to 5 ms that way.
    """
    before: list[int] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        small = isinstance(ids, torch.Tensor) and ids.numel() <= SMALL_STEP_TOKENS
        before.append(torch.get_num_threads())
        if small:
            torch.set_num_threads(1)

    def leave(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        torch.set_num_threads(before.pop())

    network.register_forward_pre_hook(enter, with_kwargs=True)
    network.register_forward_hook(leave, always_call=True)
