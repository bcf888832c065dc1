"""The W4A16 linear: y [..., out] = x [..., in] · Ŵᵀ + bias, x and y in bf16, fp16 or fp32, Ŵ in integer codes.

Implementations of one contract, each of which honours every field of `QuantizedTensor` that it does not refuse:

    cuda       halfbyte's own CUDA C++ (native/cuda/w4a16_gemm.cu), NVIDIA GPUs from Ampere on: codes of 2 to 4 bits
               stay packed and meet fp16 or bf16 in the tensor cores
    native     halfbyte's own C++ (native/cpu/w4_kernel.hpp), CPU: codes stay packed, arithmetic in fp32. Codes of 2 to
               4 bits take 4 bits, those of 5 to 8 bits a byte; columns kept in 16 bit stay in 16 bit
    torch      any device: Ŵ formed anew for each call in x's dtype, then torch's matrix product
    reference  the definition, in fp64: what the others are tested against
    marlin     GPTQModel's Marlin (marlin_linear.py), NVIDIA GPUs: a peer to compare `cuda` with, where it is installed

bitsandbytes is known by name, too, to say why it runs none of these weights.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.registry import Kernel, PreparedLinear, Verdict, explain, pick
from halfbyte.tensor import QuantizedTensor

_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pack_native(weight: QuantizedTensor, tier: str) -> Any:
    """The native core's packed matrix of a weight on the CPU."""
    from halfbyte import _native

    index, scale, columns, kept = weight.group_index, weight.input_scale, weight.kept_columns, weight.kept_weight
    return _native.W4Matrix(
        codes=weight.codes.contiguous().numpy(),
        scales=weight.scales.contiguous().numpy(),
        offsets=weight.offsets.contiguous().numpy(),
        bias=None if weight.bias is None else weight.bias.detach().float().contiguous().numpy(),
        group_size=min(weight.group_size, weight.in_features),
        tier=tier,
        bits=4 if weight.bits <= 4 else 8,
        group_index=None if index is None else index.contiguous().numpy(),
        input_scale=None if scale is None else scale.contiguous().numpy(),
        kept_columns=None if columns is None else columns.contiguous().numpy(),
        kept_weight=None if kept is None else kept.contiguous().view(torch.uint16).numpy(),
        kept_dtype=_NATIVE_DTYPES[torch.bfloat16 if kept is None else kept.dtype],
    )


class NativeLinear:
    """A weight in the native core's layout. Its memory is the packed matrix alone."""

    def __init__(self, weight: QuantizedTensor, device: torch.device):
        from halfbyte import _native
        from halfbyte.device.cpu import pick_tier, thread_count

        del device  # always the CPU: the registry saw to it
        _native.set_threads(thread_count())
        self._matrix = pack_native(weight, pick_tier())
        self._multiply = self._matrix.multiply
        self._in, self._out = weight.in_features, weight.out_features
        self.nbytes = self._matrix.nbytes

    @property
    def tier(self) -> str:
        """The instruction-set tier it was laid out for."""
        tier: str = self._matrix.tier
        return tier

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `PreparedLinear`."""
        # 210 of these calls make a token of a small model, so each line was timed: 4.2 µs, half of it the new tensor.
        dtype, shape = _NATIVE_DTYPES.get(x.dtype), x.shape
        if dtype is None or not x.is_cpu or shape[-1] != self._in:
            raise UnsupportedError(
                f"native W4A16 linear: expected a CPU tensor [..., {self._in}] in fp32, bf16 or fp16, "
                f"got {x.dtype} {list(shape)} on {x.device}"
            )
        y = x.new_empty((*shape[:-1], self._out))
        rows = x.numel() // self._in
        if rows:
            flat = x.contiguous()
            self._multiply(flat.data_ptr(), self._in, y.data_ptr(), rows, dtype)
        return y

    def dequantize(self) -> torch.Tensor:
        """See `PreparedLinear`."""
        out = torch.empty(self._out, self._in)
        self._matrix.dequantize(out.numpy())
        return out


class TorchLinear:
    """Codes, scales and zeros as plain tensors. Ŵ lives for one call: keeping it would undo the saving in memory."""

    def __init__(self, weight: QuantizedTensor, device: torch.device):
        self._weight = weight.to(device)
        self.nbytes = self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `PreparedLinear`."""
        bias = None if self._weight.bias is None else self._weight.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self._weight.dequantize().to(x.dtype), bias)

    def dequantize(self) -> torch.Tensor:
        """See `PreparedLinear`."""
        return self._weight.dequantize()


class ReferenceLinear(TorchLinear):
    """The definition, every step in fp64."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `PreparedLinear`."""
        bias = None if self._weight.bias is None else self._weight.bias.double()
        return torch.nn.functional.linear(x.double(), self._weight.dequantize().double(), bias).to(x.dtype)


def _lay_out_for_cuda(weight: QuantizedTensor, device: torch.device) -> PreparedLinear:
    from halfbyte.kernels.cuda_linear import CudaLinear

    return CudaLinear(weight, device)


def _cuda_available(device: torch.device) -> str | None:
    from halfbyte.kernels.cuda_build import unavailable

    return unavailable(device)


def _lay_out_for_marlin(weight: QuantizedTensor, device: torch.device) -> PreparedLinear:
    from halfbyte.kernels.marlin_linear import MarlinLinear

    return MarlinLinear(weight, device)


def _why_not_marlin(weight: QuantizedTensor) -> str | None:
    from halfbyte.kernels.marlin_linear import why_not

    return why_not(weight)


def _marlin_available(device: torch.device) -> str | None:
    from halfbyte.kernels.cuda_build import gpu_missing

    return gpu_missing(device)


def _why_not_bitsandbytes(weight: QuantizedTensor) -> str:
    del weight  # of whatever kind
    return "computes in NF4, whose values integer codes are not; use halfbyte compare MODEL MODEL@nf4"


def _refuse_for_bitsandbytes(weight: QuantizedTensor, device: torch.device) -> PreparedLinear:
    del device
    raise UnsupportedError(f"backend bitsandbytes: {_why_not_bitsandbytes(weight)}")


def _native_available(device: torch.device) -> str | None:
    del device
    try:
        from halfbyte import _native  # noqa: F401
    except ImportError as error:
        return f"the native core is not built ({error})"
    return None


def _always_available(device: torch.device) -> None:
    del device


ANY_BITS = frozenset(range(2, 9))
CUDA = Kernel(
    "cuda", _lay_out_for_cuda, frozenset({"cuda"}), frozenset({2, 3, 4}), group_multiple=32, priority=100,
    available=_cuda_available, summary="CUDA C++ on tensor cores, codes stay packed in 4 bits",
    float_zeros=False, uneven_groups=False,
)  # fmt: skip
MARLIN = Kernel(
    "marlin", _lay_out_for_marlin, frozenset({"cuda"}), frozenset({2, 3, 4}), group_multiple=32, priority=0,
    available=_marlin_available, summary="GPTQModel's Marlin on tensor cores: a peer, the same codes",
    float_zeros=False, uneven_groups=False, misfit=_why_not_marlin, package="gptqmodel",
)  # fmt: skip
KERNELS = [
    CUDA,
    Kernel(
        "native", NativeLinear, frozenset({"cpu"}), ANY_BITS, group_multiple=1, priority=100,
        available=_native_available, summary="C++ on the CPU, codes stay packed in 4 or 8 bits",
    ),
    Kernel(
        "torch", TorchLinear, frozenset(), ANY_BITS, group_multiple=1, priority=10,
        available=_always_available, summary="dequantize, then torch's matrix product; any device",
    ),
    Kernel(
        "reference", ReferenceLinear, frozenset(), ANY_BITS, group_multiple=1, priority=0,
        available=_always_available, summary="the definition in fp64, for checking",
    ),
    MARLIN,
    Kernel(
        "bitsandbytes", _refuse_for_bitsandbytes, frozenset(), ANY_BITS, group_multiple=1, priority=0,
        available=_always_available, summary="NF4: a peer of whole models, not of these codes",
        misfit=_why_not_bitsandbytes,
    ),
]  # fmt: skip


def prepare(weight: QuantizedTensor, *, backend: str = "auto", device: torch.device) -> tuple[Kernel, PreparedLinear]:
    """Lay a weight out for the fastest kernel that fits, or the one named.

    Warns, once for each reason, where a GPU's own kernel was passed over.

    Raises:
        ConfigError: no kernel of that name.
        UnsupportedError: it, or every one, refuses the weight.
    """
    kernel = pick(weight, device, KERNELS, backend)
    if backend == "auto" and device.type == "cuda" and kernel is not CUDA:
        _tell_why(kernel.name, CUDA.refuses(weight, device))
    return kernel, kernel.prepare(weight, device)


@functools.cache
def _tell_why(picked: str, reason: str | None) -> None:
    warnings.warn(f"4-bit linears run on backend {picked}: the CUDA kernel {reason}", stacklevel=4)


def verdicts(weight: QuantizedTensor, device: torch.device) -> list[Verdict]:
    """Why each kernel would, or would not, run the weight."""
    return explain(weight, device, KERNELS)
