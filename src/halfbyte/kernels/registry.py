"""What each kernel supports, as data; one place that picks, and can say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.tensor import QuantizedTensor


class PreparedLinear(Protocol):
    """A weight in the layout of one kernel.

    Attributes:
        nbytes: bytes held.
    """

    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → x · Ŵᵀ + bias [..., out], in x's dtype."""

    def dequantize(self) -> torch.Tensor:
        """Ŵ as float32 [out, in]."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of the W4A16 product.

    Attributes:
        name: what `backend=` and `halfbyte backends` call it.
        prepare: lays a weight out for it on a device.
        device_types: torch device types it runs on; empty for any.
        bits: code widths.
        group_multiple: the group size must be a multiple of this.
        priority: the highest that fits is picked.
        available: why it cannot run on a device at all, or None if it can.
        summary: one line for people.
        float_zeros: whether it holds floating minima as well as integer zero points.
        uneven_groups: whether the groups of columns in any order may differ in size.
        misfit: what else it refuses of a weight, or None if nothing.
        package: of others in which it is, not always there. Such a kernel is a peer to compare with: it runs what it is
            asked for by name, and is never picked.
    """

    name: str
    prepare: Callable[[QuantizedTensor, torch.device], PreparedLinear]
    device_types: frozenset[str]
    bits: frozenset[int]
    group_multiple: int
    priority: int
    available: Callable[[torch.device], str | None]
    summary: str
    float_zeros: bool = True
    uneven_groups: bool = True
    misfit: Callable[[QuantizedTensor], str | None] | None = None
    package: str | None = None

    def refuses(self, weight: QuantizedTensor, device: torch.device) -> str | None:
        """Why this kernel cannot hold the weight, or None if it can."""
        missing = []
        if self.device_types and device.type not in self.device_types:
            missing.append(f"runs on {', '.join(sorted(self.device_types))}, not on {device.type}")
        if self.package is not None and find_spec(self.package) is None:
            missing.append(f"{self.package} is not installed: pip install {self.package}")
        if missing:
            return "; ".join(missing)
        if weight.bits not in self.bits:
            return f"holds {', '.join(map(str, sorted(self.bits)))} bits, not {weight.bits}"
        if weight.group_size % self.group_multiple and weight.groups > 1:
            return f"needs a group size that is a multiple of {self.group_multiple}, not {weight.group_size}"
        if weight.zeros.is_floating_point() and not self.float_zeros:
            return "needs integer zero points, not floating minima"
        if not self.uneven_groups and not weight.has_even_groups:
            return f"needs {weight.group_size} columns in each group"
        reason = None if self.misfit is None else self.misfit(weight)
        return reason or self.available(device)


@dataclass(frozen=True)
class Verdict:
    """What became of one kernel.

    Attributes:
        kernel: the kernel.
        picked: whether it runs the weight.
        reason: in words.
    """

    kernel: Kernel
    picked: bool
    reason: str


def explain(weight: QuantizedTensor, device: torch.device, kernels: list[Kernel]) -> list[Verdict]:
    """A verdict on every kernel, best first."""
    verdicts: list[Verdict] = []
    for kernel in sorted(kernels, key=lambda kernel: -kernel.priority):
        reason = kernel.refuses(weight, device)
        best = next((verdict.kernel for verdict in verdicts if verdict.picked), None)
        if reason is not None:
            verdicts.append(Verdict(kernel, False, reason))
        elif kernel.package is not None:
            verdicts.append(Verdict(kernel, False, f'fits; a peer, for backend="{kernel.name}" alone'))
        elif best is not None:
            verdicts.append(Verdict(kernel, False, f"fits, but {best.name} is faster"))
        else:
            verdicts.append(Verdict(kernel, True, "the fastest that fits"))
    return verdicts


def pick(weight: QuantizedTensor, device: torch.device, kernels: list[Kernel], backend: str = "auto") -> Kernel:
    """The kernel for a weight.

    Args:
        weight: to be laid out.
        device: where it will run.
        kernels: to choose from.
        backend: a kernel's name, or "auto".

    Raises:
        ConfigError: no kernel of that name.
        UnsupportedError: the named kernel, or every kernel, refuses the weight.
    """
    if backend == "auto":
        verdicts = explain(weight, device, kernels)
        for verdict in verdicts:
            if verdict.picked:
                return verdict.kernel
        reasons = "; ".join(f"{verdict.kernel.name} {verdict.reason}" for verdict in verdicts)
        raise UnsupportedError(f"no kernel fits this weight: {reasons}")
    for kernel in kernels:
        if kernel.name == backend:
            reason = kernel.refuses(weight, device)
            if reason is not None:
                raise UnsupportedError(f"backend {backend}: {reason}")
            return kernel
    raise ConfigError(f'backend {backend!r}: expected "auto" or one of {", ".join(k.name for k in kernels)}')
