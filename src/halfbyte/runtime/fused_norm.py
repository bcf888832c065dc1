"""RMSNorm as one call, where an experiment proves it equal to the module it replaces.

A transformers RMSNorm is six operations of a few microseconds each. Architectures write it in their own ways, (1 + w)
for w, or rounding before the weight rather than after; so candidates are tried on random input, not looked up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from halfbyte.device.cpu import pick_tier
from halfbyte.kernels.rms_norm import rms_norm

Form = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
# Sums in another order: a few units in the last place of fp32. In 16 bit rounding hides that: not a bit may differ.
_TOLERANCE = 8 * torch.finfo(torch.float32).eps


def _plain(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def _offset(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return nn.functional.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), epsilon).to(x.dtype)


def _rounded_first(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * nn.functional.rms_norm(x.float(), weight.shape, None, epsilon).to(x.dtype)


# The three dialects of architectures; all but the last differ from each other in fp32, too.
_FORMS: tuple[Form, ...] = (_plain, _offset, _rounded_first)


class FusedNorm(nn.Module):
    """An RMSNorm in one call: native in fp32 on the CPU where no gradient is wanted, else torch's.

    Attributes:
        weight: [channels], that of the module it replaces.
        epsilon: added to the mean square.
    """

    def __init__(self, original: nn.Module, weight: nn.Parameter, epsilon: float, form: Form):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon
        self._form = form
        self._tier = pick_tier()
        self._original = (original,)  # in a tuple, so that it is no submodule and the weight keeps its one name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., channels] → the same shape and dtype."""
        weight = self.weight
        if x.dtype != weight.dtype or x.shape[-1:] != weight.shape:  # the proof was in the weight's dtype
            y: torch.Tensor = self._original[0](x)
            return y
        tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if tracked or x.dtype != torch.float32 or not (x.is_cpu and weight.is_cpu) or torch.compiler.is_compiling():
            return self.by_torch(x)
        scale = weight + 1.0 if self._form is _offset else weight
        return rms_norm(x, scale, self.epsilon, self._tier)

    def by_torch(self, x: torch.Tensor) -> torch.Tensor:
        """The same by torch alone, with a gradient."""
        return self._form(x, self.weight, self.epsilon)

    def extra_repr(self) -> str:
        """Width and epsilon, as `print(model)` shows them."""
        return f"{self.weight.numel()}, epsilon={self.epsilon}"


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like an RMSNorm of its makers' own: a vector, an epsilon, one argument, "norm" by name."""
    names = [name for name, _ in module.named_parameters()]
    return (
        names == ["weight"]
        and "norm" in type(module).__name__.lower()
        and not isinstance(module, nn.RMSNorm | nn.LayerNorm)
        and len(inspect.signature(module.forward).parameters) == 1
        and _epsilon(module) is not None
    )


def fuse_norm(module: nn.Module) -> FusedNorm | None:
    """The one call that computes what `module` does; None if none was proven to."""
    epsilon, weight = _epsilon(module), module.weight
    assert isinstance(weight, nn.Parameter)
    if epsilon is None or weight.ndim != 1 or not weight.is_contiguous():
        return None
    for form in _FORMS:
        fused = FusedNorm(module, weight, epsilon, form)
        if _equal(module, fused.by_torch, weight) and _equal(module, fused, weight):
            return fused
    return None


@torch.no_grad()
def _equal(module: nn.Module, candidate: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> bool:
    """On random inputs of three magnitudes: at 1e-3 the epsilon counts, at 1e2 a clamp would."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3, 1e2):
        x = (size * torch.randn(2, 5, weight.numel(), generator=generator)).to(weight.device, weight.dtype)
        expected, found = module(x), candidate(x)
        if found.dtype != expected.dtype or found.shape != expected.shape:
            return False
        if weight.dtype != torch.float32:
            if not torch.equal(found, expected):
                return False
        elif not torch.allclose(found, expected, rtol=_TOLERANCE, atol=0.0):
            return False
    return True


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((float(value) for value in found if isinstance(value, float)), None)
