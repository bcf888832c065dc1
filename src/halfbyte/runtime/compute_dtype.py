"""Which dtype a quantized network computes in, and a head that is fast in either regime.

A CPU without bf16 instructions runs bf16 arithmetic by converting back and forth: torch's bf16 matrix product is then
several times slower than its fp32 one, and every norm pays for two conversions. Such a CPU computes in fp32, which is
also the more exact choice; weights stay in 16 bit where they are, because decoding is bound by reading them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.device.cpu import has_bf16_arithmetic

# Up to this many rows a product with a 16-bit weight is bound by reading it; beyond, by arithmetic.
MEMORY_BOUND_ROWS = 4


class HalfWeightLinear(nn.Module):
    """A linear with a 16-bit weight, fp32 in and out, on a CPU without 16-bit arithmetic.

    Attributes:
        weight: [out, in] in bf16 or fp16; may be tied to an embedding.
        bias: [out] or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [..., in] → fp32 [..., out]; few rows are rounded to the weight's dtype on the way in and out."""
        rows = x.numel() // x.shape[-1]
        if rows <= MEMORY_BOUND_ROWS:
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def choose_compute_dtype(network: Any, device: torch.device) -> torch.dtype:
    """Make the network compute in the dtype this device is fast in.

    Args:
        network: quantized, every tensor in place, ties made.
        device: where it will run.

    Returns:
        The dtype of its activations.
    """
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    stored: torch.dtype = embedding.weight.dtype
    plain_head = isinstance(head, nn.Linear)
    if device.type != "cpu" or stored == torch.float32 or not plain_head or has_bf16_arithmetic():
        return stored
    wide = {id(embedding.weight), id(head.weight)}
    for parameter in network.parameters():
        if id(parameter) not in wide:
            parameter.data = parameter.data.float()
    embedding.register_forward_hook(lambda _module, _args, output: output.float())
    network.set_output_embeddings(HalfWeightLinear(head.weight, head.bias))
    return torch.float32
