"""Where the tensors of a checkpoint lie in the model's parameters.

transformers renames and merges weights when it loads them: the experts of a file, one matrix each, become slices of
one 3-D parameter. `ModelTensors` reads parameters whatever the file calls their parts, and says of every tensor on disk
which view of which parameter it is, so that a checkpoint is written back under the names it came with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from halfbyte.errors import CheckpointError, UnsupportedError

# Attribute of a decoder block that holds its part of the map; survives copy.deepcopy, unlike a table beside it.
STORED_ATTRIBUTE = "_halfbyte_stored"

Step = tuple[Any, ...]


class TensorSource(Protocol):
    """Where weights come from: `checkpoints.Checkpoint`, or anything that reads a tensor by its name on disk."""

    def __contains__(self, name: object) -> bool:
        """Whether the source holds the tensor."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk as a view of a parameter.

    Attributes:
        name: on disk.
        parameter: dotted name of the parameter that holds it.
        steps: cuts that lead from the parameter to the view: ("select", axis, index), ("chunk", axis, count, index),
            ("stride", axis, count, index) or ("transpose", axis, axis).
    """

    name: str
    parameter: str
    steps: tuple[Step, ...] = ()

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of `parameter` this tensor is; shares its memory."""
        return cut(parameter, self.steps)


def cut(parameter: torch.Tensor, steps: Iterable[Step]) -> torch.Tensor:
    """Follow `steps` into a parameter; the result shares its memory."""
    view = parameter
    for kind, *arguments in steps:
        if kind == "select":
            view = view.select(*arguments)
        elif kind == "chunk":
            axis, count, index = arguments
            view = view.chunk(count, axis)[index]
        elif kind == "stride":
            axis, count, index = arguments
            view = view.movedim(axis, 0)[index::count].movedim(0, axis)
        else:
            view = view.transpose(*arguments)
    return view


class ModelTensors:
    """The parameters of a model, assembled from a checkpoint's tensors. A `TensorSource` by parameter name.

    Attributes:
        stored: name on disk → the view it is, for each tensor that belongs to a parameter.
    """

    def __init__(self, model: Any, source: TensorSource, names: Iterable[str]):
        """Map the names; nothing is read.

        Args:
            model: a skeleton.
            source: the checkpoint.
            names: of its tensors.
        """
        self.stored: dict[str, StoredTensor] = {}
        self._source = source
        self._parts: dict[str, list[StoredTensor]] = {}
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
        self._locate = _locator(model, self._shapes)
        for name in names:
            stored = self._locate(name)
            if stored is not None:
                self.stored[name] = stored
                self._parts.setdefault(stored.parameter, []).append(stored)

    def locate(self, name: str) -> StoredTensor | None:
        """Where a tensor called `name` on disk would belong, whether or not the checkpoint holds it."""
        stored: StoredTensor | None = self._locate(name)
        return stored

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def read(self, name: str) -> torch.Tensor:
        """The parameter called `name` in the model.

        Raises:
            CheckpointError: one of its parts has another shape than the config implies, or is missing.
        """
        parts = self._parts[name]
        if not parts[0].steps:
            return self._source.read(parts[0].name)
        first = self._source.read(parts[0].name)
        whole = torch.empty(self._shapes[name], dtype=first.dtype)
        filled = 0
        for part in parts:
            tensor = first if part is parts[0] else self._source.read(part.name)
            try:
                view = part.view(whole)
            except (RuntimeError, IndexError):
                raise CheckpointError(f"tensor {part.name}: config.json implies fewer parts of {name}") from None
            if view.shape != tensor.shape:
                raise CheckpointError(
                    f"tensor {part.name}: expected shape {list(view.shape)} from config.json, "
                    f"found {list(tensor.shape)}"
                )
            view.copy_(tensor)
            filled += tensor.numel()
        if filled != whole.numel():
            raise CheckpointError(
                f"tensor {parts[0].name} and its like: {filled:,} of {whole.numel():,} values of {name} are there; "
                f"is the checkpoint complete?"
            )
        return whole

    def prefix(self, module: str) -> str:
        """What the checkpoint calls the module with the dotted name `module`."""
        for name, stored in self.stored.items():
            inside = stored.parameter.removeprefix(module)
            if inside.startswith(".") and not stored.steps and name.endswith(inside):
                return name[: -len(inside)]
        return module

    def annotate(self, blocks: nn.ModuleList, blocks_name: str) -> None:
        """Tell each decoder block which tensors on disk its parameters are; `matrices` reads it."""
        inside: dict[int, list[StoredTensor]] = {index: [] for index in range(len(blocks))}
        for stored in self.stored.values():
            number, _, local = stored.parameter.removeprefix(blocks_name + ".").partition(".")
            if stored.parameter.startswith(blocks_name + ".") and number.isdecimal() and int(number) in inside:
                inside[int(number)].append(replace(stored, parameter=local))
        for index, block in enumerate(blocks):
            prefix = self.prefix(f"{blocks_name}.{index}") + "."
            table = tuple(replace(stored, name=stored.name.removeprefix(prefix)) for stored in inside[index])
            setattr(block, STORED_ATTRIBUTE, table)


def stored_tensors(block: nn.Module) -> Iterator[StoredTensor]:
    """The tensors of a block by their names on disk inside it: as annotated, or one for each parameter."""
    table = getattr(block, STORED_ATTRIBUTE, None)
    if table is not None:
        yield from table
    else:
        for name, _ in block.named_parameters():
            yield StoredTensor(name, name)


def stored_values(block: nn.Module) -> dict[str, torch.Tensor]:
    """What each tensor of a block on disk is now, by its name there inside the block; shares the parameters' memory."""
    parameters = dict(block.named_parameters())
    return {
        stored.name: stored.view(parameters[stored.parameter].data)
        for stored in stored_tensors(block)
        if stored.parameter in parameters
    }


def _locator(model: Any, shapes: dict[str, torch.Size]) -> Any:
    """name on disk → `StoredTensor` or None, by the renaming and merging rules of transformers."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers before 5 keeps the names of the files
        return lambda name: StoredTensor(name, name) if name in shapes else None
    prefix = getattr(model, "base_model_prefix", None) or None

    @cache
    def conversions() -> tuple[list[Any], list[Any], dict[str, Any]]:
        # Asked for when a name needs them: transformers makes the rules of all its models, a quarter of a second.
        rules = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        return [rule for rule in rules if isinstance(rule, WeightRenaming)], converters, by_pattern

    def locate(name: str) -> StoredTensor | None:
        if name in shapes:
            return StoredTensor(name, name)
        if f"{name.rpartition('.')[0]}.weight" in shapes:
            return None  # what stands for the weight of a quantized linear
        # One expert of a 3-D tensor, under the name `matrices` gives it: stored so once it is quantized.
        split = re.fullmatch(r"(.+)\.(\d+)\.(\w+)\.weight", name)
        whole = locate_whole(f"{split[1]}.{split[3]}") if split else None
        owner = None if whole is None else model.get_submodule(whole.parameter.rpartition(".")[0])
        if split and whole is not None and not whole.steps and hasattr(owner, "is_transposed"):
            assert owner is not None
            return StoredTensor(name, whole.parameter, expert_steps(owner, int(split[2])))
        return locate_whole(name)

    def locate_whole(name: str) -> StoredTensor | None:
        renamings, converters, by_pattern = conversions()
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if parameter not in shapes:
            return None
        steps = () if pattern is None else _steps(by_pattern[pattern], pattern, name)
        return StoredTensor(name, parameter, steps)

    return locate


def expert_steps(owner: nn.Module, index: int) -> tuple[Step, ...]:
    """The cuts from a 3-D parameter of `owner`, which says if it is transposed, to expert `index`'s W [out, in]."""
    turned: tuple[Step, ...] = (("transpose", 0, 1),) if getattr(owner, "is_transposed", False) else ()
    return (("select", 0, index), *turned)


def _steps(converter: Any, pattern: str, name: str) -> tuple[Step, ...]:
    """The cuts that undo what `converter` does to the tensor `name`, last operation first."""
    if len(converter.target_patterns) > 1:
        raise UnsupportedError(f"tensor {name}: transformers splits it into several parameters; not supported yet")
    index = converter.source_patterns.index(pattern)
    steps: list[Step] = []
    for operation in reversed(converter.operations):
        kind = type(operation).__name__
        if kind == "Transpose":
            steps.append(("transpose", operation.dim0, operation.dim1))
        elif kind == "Concatenate":
            steps.append(("chunk", operation.dim, len(converter.source_patterns), index))
        elif kind == "Interleave" and len(converter.source_patterns) > 1:
            steps.append(("stride", operation.dim, len(converter.source_patterns), index))
        elif kind == "MergeModulelist":
            found = re.search(pattern.replace("*.", r"(\d+)\."), name)
            if found is None:
                numbers = re.findall(r"\.(\d+)\.", name)
                steps.append(("select", operation.dim, int(numbers[-1])))
            else:
                steps.append(("select", operation.dim, int(found.group(1))))
        else:
            raise UnsupportedError(f"tensor {name}: transformers converts it by {kind}, which is not supported yet")
    return tuple(steps)
