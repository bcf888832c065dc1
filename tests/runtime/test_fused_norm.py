"""Norms in one call: only what an experiment proved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from halfbyte import _native
from halfbyte.kernels.rms_norm import rms_norm
from halfbyte.runtime.fused_norm import FusedNorm, fuse_norm, is_norm


class ClampedNorm(LlamaRMSNorm):
    """Like an RMSNorm, but for large values."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).clamp(-2.0, 2.0)


class OtherEpsilonNorm(LlamaRMSNorm):
    """Says one epsilon and uses another."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + 1e-3) * self.weight


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(hidden_states)
        return y if gate is None else y * gate


def randomized(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return module.to(dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("shape", [(40,), (1, 1, 40), (3, 5, 40), (0, 40)])
def test_it_is_the_norm_it_replaces(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    module = randomized(kind(40, eps=1e-5))
    fused = fuse_norm(module)
    assert fused is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), module(x), rtol=2e-6, atol=0.0)
    # strides do not matter
    wide = torch.randn(6, 80, generator=torch.Generator().manual_seed(1))[:, ::2]
    with torch.no_grad():
        torch.testing.assert_close(fused(wide), module(wide), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_not_a_bit_differs(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = randomized(kind(64), dtype)
    fused = fuse_norm(module)
    assert fused is not None
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        assert torch.equal(fused(x), module(x))
        single = x.float()  # not the dtype of the proof: as the original has it
        assert torch.equal(fused(single), module(single))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_gradients_are_those_of_the_norm_it_replaces(kind: type[nn.Module]) -> None:
    module = randomized(kind(40))
    fused = fuse_norm(module)
    assert fused is not None
    gradients = []
    for norm in (module, fused):
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module.weight.grad = None
        norm(x).sin().sum().backward()
        gradients.append((x.grad, module.weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_follows_its_weight() -> None:
    module = randomized(Gemma2RMSNorm(40))
    fused = fuse_norm(module)
    assert fused is not None
    assert list(fused.state_dict()) == ["weight"]
    x = torch.randn(2, 40)
    with torch.no_grad():
        module.weight.mul_(2)
        torch.testing.assert_close(fused(x), module(x), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("kind", [ClampedNorm, OtherEpsilonNorm])
def test_what_only_looks_like_a_norm_is_left(kind: type[LlamaRMSNorm]) -> None:
    module = randomized(kind(40))
    assert is_norm(module)
    assert fuse_norm(module) is None


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.RMSNorm(8), GatedNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8)])
def test_what_is_no_rms_norm_is_not_looked_at(module: nn.Module) -> None:
    assert not is_norm(module)


@pytest.mark.parametrize("tier", _native.available_tiers())
@pytest.mark.parametrize("channels", [1, 31, 32, 576, 577])
def test_every_tier_is_close_to_fp64(tier: str, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, channels, generator=generator), torch.randn(channels, generator=generator)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, tier).double(), expected, rtol=2e-6, atol=0.0)


def test_it_says_what_it_is() -> None:
    fused = fuse_norm(LlamaRMSNorm(40, eps=1e-5))
    assert isinstance(fused, FusedNorm)
    assert repr(fused) == "FusedNorm(40, epsilon=1e-05)"
