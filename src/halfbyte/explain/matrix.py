"""The weights a lesson is about: made up without torch, or a layer of a real model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from halfbyte.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.explain.lessons import Options
    from halfbyte.tensor import QuantizedTensor

GROUP_SIZES = (128, 64, 32)
OUTPUTS = 8
MOST_WEIGHTS = 1 << 26
MIN_SCALE = np.float32(2.0**-14)


@dataclass(frozen=True)
class Matrix:
    """A matrix and its 4-bit codes; W = scale · (code - zero).

    Attributes:
        name: of the layer, or "" for made-up weights.
        weight: float32 [out, in].
        codes: uint8 [out, in].
        scales: float32 [out, groups], exact in fp16.
        zeros: uint8 [out, groups].
        group_size: inputs that share a scale.
    """

    name: str
    weight: npt.NDArray[np.float32]
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8]
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def dequantized(self) -> npt.NDArray[np.float32]:
        """float32 [out, in]: what the codes stand for."""
        zeros = np.repeat(self.zeros.astype(np.float32), self.group_size, axis=1)
        scales = np.repeat(self.scales, self.group_size, axis=1)
        result: npt.NDArray[np.float32] = (self.codes.astype(np.float32) - zeros) * scales
        return result

    @property
    def tensor(self) -> QuantizedTensor:
        """The same as quantizers make it. Imports torch."""
        import torch

        from halfbyte.tensor import QuantizedTensor

        codes, scales, zeros = (torch.from_numpy(part) for part in (self.codes, self.scales, self.zeros))
        return QuantizedTensor(codes, scales, zeros, 4, self.group_size)


def read_matrix(options: Options, outputs: int, inputs: int) -> Matrix:
    """The matrix that the options ask for, or a made-up one of this shape where they do not say.

    Raises:
        ConfigError: a shape that the layouts cannot hold, or one given beside a layer.
        HalfbyteError: the layer cannot be read.
    """
    if options.source is not None:
        given = next((name for name in ("n", "k") if getattr(options, name) is not None), None)
        if given is not None:
            raise ConfigError(
                f"--{given}: a layer has a shape of its own; leave it out, or leave out --layer and --model"
            )
        return _layer(options)
    rows = _at_least("n", options.n, outputs, OUTPUTS, "the AWQ GEMM layout packs eight outputs to a word")
    columns = _at_least("k", options.k, inputs, GROUP_SIZES[-1], "that is the smallest group of inputs with one scale")
    if rows * columns > MOST_WEIGHTS:
        raise ConfigError(f"--n {rows} --k {columns}: expected at most {MOST_WEIGHTS:,} weights in a lesson")
    weight = np.random.default_rng(4).normal(0, 0.02, (rows, columns)).astype(np.float32)
    return quantize("", weight, _group_size(columns))


def _at_least(name: str, given: int | None, usual: int, multiple: int, reason: str) -> int:
    value = usual if given is None else given
    if value < multiple or value % multiple:
        raise ConfigError(f"--{name} {value}: expected a multiple of {multiple}; {reason}")
    return value


def _group_size(columns: int) -> int:
    return next(size for size in GROUP_SIZES if columns % size == 0)


def quantize(name: str, weight: npt.NDArray[np.float32], group_size: int) -> Matrix:
    """Round to nearest as `quantization.grid.Grid.quantize` does, asymmetric, 4 bits, without torch."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    scales = np.maximum((high - low) / np.float32(15), MIN_SCALE).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, 15)
    return Matrix(
        name, weight, codes.astype(np.uint8).reshape(weight.shape), scales, zeros.astype(np.uint8), group_size
    )


def _layer(options: Options) -> Matrix:
    """One linear of a model on disk, by its name there."""
    import torch

    from halfbyte.checkpoints.reader import Checkpoint
    from halfbyte.checkpoints.sources import resolve_model

    assert options.source is not None
    checkpoint = Checkpoint.open(resolve_model(options.source, progress=options.progress))
    if "quantization_config" in checkpoint.config:
        raise UnsupportedError(f"{options.source}: is quantized already; give the model it was made from")
    name = pick_layer(linear_names(checkpoint.names()), options)
    info = checkpoint.info(f"{name}.weight")
    if len(info.shape) != 2 or not info.dtype.is_floating_point:
        raise ConfigError(f"--layer {name}: expected a matrix of numbers, found {info.dtype} {list(info.shape)}")
    rows, columns = info.shape
    if rows % OUTPUTS or columns % GROUP_SIZES[-1]:
        raise UnsupportedError(
            f"--layer {name}: {rows} × {columns}; expected outputs in eights and inputs in groups of {GROUP_SIZES[-1]}"
        )
    weight = checkpoint.read(f"{name}.weight").to(torch.float32).numpy()
    return quantize(name, weight, _group_size(columns))


def linear_names(tensors: list[str]) -> list[str]:
    """Names of what may be linears of decoder blocks: those with a number in them, in the model's order."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and "norm" not in name]
    inside = [name for name in names if any(part.isdecimal() for part in name.split("."))]
    return sorted(inside, key=lambda name: [int(part) if part.isdecimal() else -1 for part in name.split(".")])


def pick_layer(names: list[str], options: Options) -> str:
    """The layer that was asked for; else one of the middle block.

    Raises:
        ConfigError: there is none of that name.
    """
    if options.layer is None:
        if not names:
            raise UnsupportedError(f"{options.source}: no linear in a decoder block was found; name one with --layer")
        ups = [name for name in names if name.endswith(("up_proj", "fc1", "c_fc", "dense_h_to_4h"))] or names
        return ups[len(ups) // 2]
    name = options.layer.removesuffix(".weight")
    if name not in names:
        close = [known for known in names if known.endswith(name.rpartition(".")[2])][:3] or names[:3]
        raise ConfigError(f"--layer {options.layer}: {options.source} has none; some it has: {', '.join(close)}")
    return name
