"""Layer fusion inside a transformers model: which linears and norms, found by experiment.

The model runs once, hollow: every weight one zero, every linear a stand-in that notes its input. Linears of one module
that were given the very same tensors can be one product, whatever the architecture calls them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.runtime.fused_linear import FusedSlice, SharedProduct, misfit, stack
from halfbyte.runtime.fused_norm import fuse_norm, is_norm
from halfbyte.runtime.quant_linear import QuantLinear
from halfbyte.tensor import QuantizedTensor

KINDS = ("attention", "mlp", "layernorm")
# What else transformers' AwqConfig has in this dictionary. Here the model itself says these.
_KNOWN_FROM_THE_MODEL = ("use_alibi", "num_attention_heads", "num_key_value_heads", "hidden_size", "max_seq_len")

ModulesToFuse = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Fusion:
    """What was fused, and what was not.

    Attributes:
        linears: dotted names of the linears that share one product.
        norms: dotted names of the norms that are one call.
        left: what was looked at and left as it is → why.
        max_seq_len: most tokens a sequence may have, prompt included; None for no limit.
        by_decoder: the fused decoder runs the model, whole.
    """

    linears: tuple[tuple[str, ...], ...] = ()
    norms: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    max_seq_len: int | None = None
    by_decoder: bool = False

    def __str__(self) -> str:
        if self.by_decoder:
            return "everything, in the fused decoder"
        kinds = Counter(" + ".join(name.rpartition(".")[2] for name in group) for group in self.linears)
        parts = [f"{count} × {kind}" for kind, count in kinds.items()]
        parts += [f"{len(self.norms)} norms"] if self.norms else []
        reasons = "; ".join(f"{name}: {why}" for name, why in list(self.left.items())[:3])
        return ", ".join(parts) or f"nothing: {reasons or 'no two quantized linears of a module share an input'}"


class Selection:
    """What may be fused, as `modules_to_fuse` says it.

    Args:
        wanted: None for everything; names out of `KINDS`; or such a name → the last names of the modules it allows.

    Raises:
        ConfigError: not a name out of `KINDS`, or not a list of names.
    """

    def __init__(self, wanted: ModulesToFuse | None):
        self._names: dict[str, tuple[str, ...] | None] = dict.fromkeys(KINDS) if wanted is None else {}
        if isinstance(wanted, str):
            raise ConfigError(f'modules_to_fuse: expected a list such as ["attention", "mlp"], got {wanted!r}')
        for kind in wanted or ():
            if kind in _KNOWN_FROM_THE_MODEL and isinstance(wanted, Mapping):
                continue
            if kind not in KINDS:
                raise ConfigError(f"modules_to_fuse: expected names out of {', '.join(KINDS)}, got {kind!r}")
            names = wanted[kind] if isinstance(wanted, Mapping) else None
            if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
                raise ConfigError(f"modules_to_fuse: {kind}: expected a list of module names, got {names!r}")
            self._names[kind] = None if names is None else tuple(names)

    def allows(self, kind: str, path: str) -> bool:
        """Whether the module at `path` may be fused as part of `kind`."""
        names = self._names.get(kind, ())
        return names is None or path.rpartition(".")[2] in names

    def check(self, network: nn.Module) -> None:
        """Refuse names that no module of the network has.

        Raises:
            ConfigError: the first of them.
        """
        there = {path.rpartition(".")[2] for path, _ in network.named_modules()}
        for kind, names in self._names.items():
            for name in names or ():
                if name not in there:
                    raise ConfigError(f"modules_to_fuse: {kind}: the model has no module called {name!r}")


@dataclass(frozen=True)
class FuseOptions:
    """What the caller of `load` asked for.

    Attributes:
        selection: what may be fused.
        max_seq_len: most tokens a sequence may have; None for no limit.
        chosen: whether the selection is the caller's.
    """

    selection: Selection
    max_seq_len: int | None
    chosen: bool


def read_fuse_options(
    fuse_layers: bool, modules_to_fuse: ModulesToFuse | None, fuse_max_seq_len: int | None
) -> FuseOptions | None:
    """The options, checked; None if nothing is to be fused.

    Raises:
        ConfigError: out of range, or given without `fuse_layers`.
    """
    if not fuse_layers:
        for name, value in (("modules_to_fuse", modules_to_fuse), ("fuse_max_seq_len", fuse_max_seq_len)):
            if value is not None:
                raise ConfigError(f"{name}: only with fuse_layers=True")
        return None
    if fuse_max_seq_len is not None and fuse_max_seq_len < 1:
        raise ConfigError(f"fuse_max_seq_len: expected at least 1, got {fuse_max_seq_len}")
    return FuseOptions(Selection(modules_to_fuse), fuse_max_seq_len, modules_to_fuse is not None)


class LinearFuser:
    """Collects the weights of linears that share an input, and stacks them when all are there.

    Args:
        groups: from `shared_inputs`.
        selection: what may be fused.
        device_of: path → device.

    Attributes:
        fused: paths of the linears of each product made so far.
        left: linear that shares an input and nothing else → why.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, ...]],
        selection: Selection,
        device_of: Callable[[str], torch.device],
    ):
        self._group_of: dict[str, tuple[str, ...]] = {}
        self._found: dict[str, QuantizedTensor] = {}
        self._device_of = device_of
        self.fused: list[tuple[str, ...]] = []
        self.left: dict[str, str] = {}
        for group in groups:
            allowed = tuple(path for path in group if selection.allows(_kind(path), path))
            if len(allowed) > 1:
                self._group_of.update(dict.fromkeys(allowed, allowed))

    def takes(self, path: str) -> bool:
        """Whether the linear at `path` is to be fused."""
        return path in self._group_of

    def add(
        self, path: str, weight: QuantizedTensor, make: Callable[[QuantizedTensor, torch.device], QuantLinear]
    ) -> Iterator[tuple[str, nn.Module, QuantLinear]]:
        """Take a weight; once its group is whole, all its modules.

        Args:
            path: of the linear.
            weight: its weight, kept until then.
            make: stacked weight, device → module.

        Yields:
            Path, the module to put there, and the linear that computes it.
        """
        self._found[path] = weight
        group = self._group_of[path]
        if any(other not in self._found for other in group):
            return
        for members in self._alike({other: self._found.pop(other) for other in group}):
            paths = tuple(members)
            linear = make(stack(list(members.values())), self._device_of(paths[0]))
            if len(paths) == 1:
                yield paths[0], linear, linear
                continue
            self.fused.append(paths)
            product = SharedProduct(linear, [weight.out_features for weight in members.values()])
            for index, other in enumerate(paths):
                yield other, FusedSlice(product, index), linear

    def _alike(self, weights: dict[str, QuantizedTensor]) -> list[dict[str, QuantizedTensor]]:
        """Weights that can be stacked, together; one that can be with no other says why."""
        sets: list[dict[str, QuantizedTensor]] = []
        why: dict[str, str] = {}
        for path, weight in weights.items():
            for one in sets:
                other = next(iter(one))
                reason = self._misfit(other, one[other], path, weight)
                if reason is None:
                    one[path] = weight
                    break
                why[path] = reason
                why.setdefault(other, reason)
            else:
                sets.append({path: weight})
        self.left |= {path: why[path] for one in sets if len(one) == 1 for path in one}
        return sets

    def _misfit(self, a: str, first: QuantizedTensor, b: str, second: QuantizedTensor) -> str | None:
        reason = misfit(first, second)
        if reason is None and self._device_of(a) != self._device_of(b):
            reason = f"{self._device_of(a)} and {self._device_of(b)}"
        names = f"{a.rpartition('.')[2]} and {b.rpartition('.')[2]}"
        return None if reason is None else f"{names} share an input, but have {reason}"


def fuse_norms(
    network: nn.Module, selection: Selection, device_of: Callable[[str], torch.device]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Replace every RMSNorm that an experiment allows to.

    Args:
        network: every tensor in place.
        selection: what may be fused.
        device_of: path → device; the proof is made where the norm will compute.

    Returns:
        Names of the fused ones, and of those left → why.
    """
    fused, left = [], {}
    for path, module in list(network.named_modules()):
        if not is_norm(module) or not selection.allows("layernorm", path):
            continue
        norm = fuse_norm(module.to(device_of(path)))
        if norm is None:
            left[path] = f"{type(module).__name__} is not an RMSNorm as torch computes it"
        else:
            network.set_submodule(path, norm)
            fused.append(path)
    return tuple(fused), left


class _Witness(nn.Module):
    """Stands for a linear: notes what it is given, computes nothing."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.inputs: list[tuple[torch.Tensor, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append((x, x._version))  # the tensor itself: an id means something only while it lives
        return x.new_zeros((*x.shape[:-1], self.out_features))


def shared_inputs(network: Any, linears: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Linears of one module that are given the very same, unchanged tensors.

    Args:
        network: a skeleton, parameters on the meta device; as it was when this returns.
        linears: dotted name → rows.

    Returns:
        Names of at least two, in the order of the model's modules.

    Raises:
        UnsupportedError: the model does not run on token ids alone.
    """
    if not linears:
        return []
    originals = {path: module for path, module in network.named_modules() if path in linears}
    witnesses = {path: _Witness(linears[path]) for path in originals}
    try:
        for path, witness in witnesses.items():
            network.set_submodule(path, witness)
        body = network.base_model  # without the head, the largest product
        hollow = {name: torch.zeros((), dtype=p.dtype).expand(p.shape) for name, p in body.named_parameters()}
        with torch.no_grad():
            kwargs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "use_cache": False}
            torch.func.functional_call(body, hollow, kwargs=kwargs)
    except Exception as error:  # every architecture fails in a way of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(
            f"fuse_layers: {type(network).__name__} cannot be traced: {reason}; load it without"
        ) from error
    finally:
        for path, module in originals.items():
            network.set_submodule(path, module)
    groups: dict[Any, list[str]] = {}
    for path, witness in witnesses.items():
        if witness.inputs:
            seen = tuple((id(x), version) for x, version in witness.inputs)
            groups.setdefault((path.rpartition(".")[0], seen), []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _kind(path: str) -> str:
    """Attention or MLP, by the name of the module around a linear."""
    return "attention" if "att" in path.rpartition(".")[0].rpartition(".")[2].lower() else "mlp"
