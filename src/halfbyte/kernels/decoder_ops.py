"""What a decoder does between matrix products, in torch's functions on any device.

Norms, rotation with append to the cache, and the gated activation; arithmetic is fp32, results have the dtype of their
inputs. On NVIDIA GPUs the kernels of native/cuda do the same (`halfbyte.kernels.cuda_ops`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from halfbyte.errors import ConfigError

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's numbers.

    Attributes:
        weight: [channels], in the dtype of what is normed.
        epsilon: added to the mean square.
        offset: added to the weight: 1 where the model stores it less 1, else 0.
        round_first: round before the weight as well as after it.
    """

    weight: torch.Tensor
    epsilon: float
    offset: float = 0.0
    round_first: bool = False


@dataclass(frozen=True)
class Heads:
    """How a row of q, k and v is divided, and how heads turn.

    Attributes:
        heads: of q.
        kv_heads: of k, and of v.
        head_dim: numbers of a head.
        cosines: float32 [capacity, pairs], of the angle by which numbers i and i + pairs of a head turn together.
        sines: likewise.
        q_norm: over a head of q; None where the model has none.
        k_norm: over a head of k; one where the other is.
    """

    heads: int
    kv_heads: int
    head_dim: int
    cosines: torch.Tensor
    sines: torch.Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None


class DecoderOps(Protocol):
    """The operations; tensors are contiguous, and on one device."""

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """The norm of each row of x [rows, channels] (Zhang and Sennrich 2019, eq. 4)."""

    def add_rms_norm(self, x: torch.Tensor, branch: torch.Tensor, scale: float, norm: Norm) -> torch.Tensor:
        """x += scale · branch, in place and rounded to its dtype, and the norm of that; [rows, channels] all."""

    def rotate_append(
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, heads: Heads
    ) -> None:
        """Norm the heads of q and k where there are such norms, turn them, and put k and v into the cache.

        Args:
            qkv: [rows, (heads + 2 · kv_heads) · head_dim]; q is changed in place, k and v are undefined behind it. The
                rows of a sequence are neighbours, as many for each.
            keys: [sequences, kv_heads, capacity, head_dim], each sequence contiguous.
            values: likewise.
            positions: int32 [rows], below capacity - 1. A row of position -1 is left out: its q is undefined, and its k
                and v are nowhere, or in the last position, which is kept for that.
            heads: of the layer.
        """

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """f(gate) · up [rows, width] of gate_up [rows, 2 · width]; f out of `ACTIVATIONS`."""


class TorchOps:
    """`DecoderOps` in torch's functions."""

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `DecoderOps`."""
        y = functional.rms_norm(x.float(), norm.weight.shape, None, norm.epsilon)
        if norm.round_first:
            y = y.to(x.dtype).float()
        return (y * (norm.offset + norm.weight.float())).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, branch: torch.Tensor, scale: float, norm: Norm) -> torch.Tensor:
        """See `DecoderOps`."""
        x.copy_(torch.add(x.float(), branch.float(), alpha=scale))
        return self.rms_norm(x, norm)

    def rotate_append(
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, heads: Heads
    ) -> None:
        """See `DecoderOps`."""
        rows, (sequences, kv_heads, capacity, head_dim) = qkv.shape[0], keys.shape
        split = qkv.view(rows, heads.heads + 2 * kv_heads, head_dim)
        q, k, v = split.split_with_sizes([heads.heads, kv_heads, kv_heads], 1)
        spare = capacity - 1  # a number of rows that depended on how many are left out would have to be known here
        at = torch.where(positions < 0, spare, positions).long()
        tables = heads.cosines[at].unsqueeze(1), heads.sines[at].unsqueeze(1)
        q.copy_(_turned(q.float(), heads.q_norm, *tables))
        of_row = torch.arange(rows, device=qkv.device) // (rows // sequences)
        keys[of_row, :, at] = _turned(k.float(), heads.k_norm, *tables).to(keys.dtype)
        values[of_row, :, at] = v

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """See `DecoderOps`."""
        check_activation(activation)
        gate, up = gate_up.float().chunk(2, -1)
        if activation == "silu":
            gate = functional.silu(gate)
        elif activation in ("gelu", "gelu_tanh"):
            gate = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
        else:
            gate = functional.relu(gate)
        return (gate * up).to(gate_up.dtype)


def check_activation(activation: str) -> None:
    """Refuse what is not out of `ACTIVATIONS`.

    Raises:
        ConfigError: it is not.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation: expected {', '.join(ACTIVATIONS)}, got {activation!r}")


def _turned(heads: torch.Tensor, norm: Norm | None, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads float32 [rows, heads, head_dim], normed and turned; tables [rows, 1, pairs]."""
    if norm is not None:
        heads = functional.rms_norm(heads, norm.weight.shape, norm.offset + norm.weight.float(), norm.epsilon)
    pairs = cosines.shape[-1]
    a, b, rest = heads.split_with_sizes([pairs, pairs, heads.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines, rest], -1)
