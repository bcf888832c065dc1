"""MLPs made wider by channels of zeros, so that tensor parallelism can split them (`tp_align`).

A width of 11008 in groups of 128 gives each of 4 GPUs 21½ groups, which no engine takes; 11264 gives 22. The channels
that are added compute act(0) · 0 = 0 and multiply nothing, so the model stays the same function. They are added to
what was quantized, so the codes of the others are those of the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from halfbyte.architectures.matrices import Matrix
from halfbyte.architectures.splitting import BY_INPUTS, Heads
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.quantization.config import QuantConfig
from halfbyte.tensor import QuantizedTensor

# Last parts of the names of linears whose outputs, and whose inputs, are the channels of an MLP.
OUTPUTS, INPUTS = ("gate_proj", "up_proj"), ("down_proj",)
# What Marlin takes of K and N without padding on each GPU, in every engine (conversion/engines.py).
TILE = 128


@dataclass(frozen=True)
class Widening:
    """How wide MLPs become.

    Attributes:
        gpus: that are to share each of them.
        unit: every width becomes a multiple of this.
        whole_rows: whether a row of a weight is one group, however wide.
    """

    gpus: int
    unit: int
    whole_rows: bool

    @classmethod
    def of(cls, config: QuantConfig) -> Widening | None:
        """What a config asks for, None for nothing; the same before and after its group size is resolved."""
        if not config.tp_align:
            return None
        size = config.group_size if isinstance(config.group_size, int) and config.group_size > 0 else TILE
        return cls(config.tp_align, config.tp_align * math.lcm(TILE, size), config.group_size == -1)

    def width(self, before: int) -> int:
        """Of an MLP that was `before` wide."""
        return -(-before // self.unit) * self.unit

    def shape(self, name: str, rows: int, columns: int) -> tuple[int, int]:
        """[out, in] of a linear that was [rows, columns]."""
        side = _side(name)
        return (self.width(rows) if side == 0 else rows, self.width(columns) if side == 1 else columns)

    def per_gpu(self, linears: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """(name, inputs) of linears as each GPU will have them; the name says so."""
        found = []
        for name, inputs in linears:
            leaf = name.rpartition(".")[2]
            if leaf in INPUTS:
                found.append((name, self.width(inputs) // self.gpus))
            elif leaf in BY_INPUTS and self.gpus > 1:
                found.append((f"{name} on each of {self.gpus} GPUs", inputs // self.gpus))
            else:
                found.append((name, inputs))
        return found

    def check(self, config: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> None:
        """Refuse a model whose MLPs are not known to stay the same, or whose attention cannot be split.

        Args:
            config: config.json.
            matrices: every matrix of the decoder blocks by name.

        Raises:
            UnsupportedError: MLPs of another kind.
            ConfigError: attention heads that cannot be split.
        """
        asked = f"tp_align {self.gpus}"
        found = {name.rpartition(".")[2] for name in matrices}
        if not {*OUTPUTS, *INPUTS} <= found:
            raise UnsupportedError(
                f"{asked}: widens MLPs of gate_proj, up_proj and down_proj; this model's linears are "
                f"{', '.join(sorted(found))}"
            )
        known = {before for _, before in _width_keys(config)}
        for name, matrix in matrices.items():
            side = _side(name)
            if side is None:
                continue
            if matrix.stored != f"{matrix.name}.weight":
                raise UnsupportedError(f"{asked}: {name} is one of several matrices in one tensor; leave it out")
            before = matrix.out_features if side == 0 else matrix.in_features
            if before not in known:
                raise UnsupportedError(
                    f"{asked}: {name} is {before} wide, which no intermediate_size in config.json is; leave it out"
                )
        heads = Heads.of(config)
        misfit = None if heads is None else heads.misfit(self.gpus)
        if misfit is not None:
            raise ConfigError(f"{asked}: {misfit}, and heads cannot be padded")

    def note(self, config: Mapping[str, Any]) -> str:
        """What becomes of the MLPs, for people."""
        widths = sorted({before for _, before in _width_keys(config) if self.width(before) != before})
        if not widths:
            return f"MLPs are as wide as {self.gpus} GPUs need; none was widened"
        changed = ", ".join(f"from {before:,} to {self.width(before):,} channels" for before in widths)
        return f"MLPs are widened with zeros {changed}, so that {self.gpus} GPUs can share them"

    def widen_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the wider model."""
        wider = {key: self.width(before) for key, before in _width_keys(config)}
        text = config.get("text_config")
        if isinstance(text, dict):
            return {**config, "text_config": {**text, **wider}}
        return {**config, **wider}

    def quantized(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """A weight with channels of zeros, if it is one of an MLP.

        Args:
            name: of the linear.
            tensor: as quantized, with integer zero points and neighbours in groups. What it holds stays where it is.
        """
        side = _side(name)
        if side is None:
            return tensor
        return self._with_rows(tensor) if side == 0 else self._with_columns(tensor)

    def plain(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is not quantized, likewise.

        Args:
            name: of the tensor: that of the linear and ".weight" or ".bias".
            tensor: weight [out, in] or bias [out].
        """
        linear, _, leaf = name.rpartition(".")
        side = _side(linear)
        if side is None or (leaf == "bias" and side == 1):
            return tensor
        missing = self.width(tensor.shape[side]) - tensor.shape[side]
        return torch.nn.functional.pad(tensor, (0, missing) if side == tensor.ndim - 1 else (0, 0, 0, missing))

    def _with_rows(self, tensor: QuantizedTensor) -> QuantizedTensor:
        missing = self.width(tensor.out_features) - tensor.out_features

        def more(part: torch.Tensor, value: float) -> torch.Tensor:
            return torch.cat([part, torch.full((missing, *part.shape[1:]), value, dtype=part.dtype)])

        zero = 1 << (tensor.bits - 1)
        return replace(
            tensor,
            codes=more(tensor.codes, zero),
            scales=more(tensor.scales, 1.0),
            zeros=more(tensor.zeros, zero),
            bias=None if tensor.bias is None else more(tensor.bias, 0.0),
            kept_weight=None if tensor.kept_weight is None else more(tensor.kept_weight, 0.0),
        )

    def _with_columns(self, tensor: QuantizedTensor) -> QuantizedTensor:
        columns = self.width(tensor.in_features)
        size = columns if self.whole_rows else tensor.group_size
        missing = -(-columns // size) - tensor.groups
        # The last group's scale and zero point again, so that none is larger than what is there.
        last = [part[:, -1:].expand(-1, missing) for part in (tensor.scales, tensor.zeros)]
        scales, zeros = torch.cat([tensor.scales, last[0]], 1), torch.cat([tensor.zeros, last[1]], 1)
        zero_codes = zeros[:, torch.arange(tensor.in_features, columns) // size]
        scale = tensor.input_scale
        if scale is not None:
            scale = torch.cat([scale, scale.new_ones(columns - tensor.in_features)])
        return replace(
            tensor,
            codes=torch.cat([tensor.codes, zero_codes], 1),
            scales=scales,
            zeros=zeros,
            group_size=size,
            input_scale=scale,
        )


def narrowed(tensor: QuantizedTensor, rows: int, columns: int) -> QuantizedTensor:
    """The inverse of `Widening.quantized`, for a weight that was [rows, columns]."""
    groups = -(-columns // tensor.group_size)
    return replace(
        tensor,
        codes=tensor.codes[:rows, :columns],
        scales=tensor.scales[:rows, :groups],
        zeros=tensor.zeros[:rows, :groups],
        bias=None if tensor.bias is None else tensor.bias[:rows],
        input_scale=None if tensor.input_scale is None else tensor.input_scale[:columns],
        kept_weight=None if tensor.kept_weight is None else tensor.kept_weight[:rows],
    )


def _side(linear: str) -> int | None:
    """Which dimension of a linear's weight counts channels of an MLP, if one does."""
    leaf = linear.rpartition(".")[2]
    return 0 if leaf in OUTPUTS else 1 if leaf in INPUTS else None


def _width_keys(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What config.json calls the widths of MLPs."""
    text = config.get("text_config")
    entries = (text if isinstance(text, dict) else config).items()
    return [(key, value) for key, value in entries if key.endswith("intermediate_size") and type(value) is int]
