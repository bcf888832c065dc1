"""One forward pass of a decoder block, seen as products of activations with its matrices.

A `TorchFunctionMode` watches every torch function a block calls, whatever modules it is made of. A product is
recognised by the memory of its weight: a call of `linear`, `addmm`, `matmul` or `bmm` with a view of a parameter. So
experts that are slices of one parameter, a transposed `Conv1D` and a bare router are seen alike. What lies between two
products is kept as a graph of tensors, in which `discovery` looks for what feeds what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from halfbyte.architectures.matrices import matrices_of

Edit = Callable[[torch.Tensor], torch.Tensor]

# Functions that hand on values unchanged, in another shape or dtype, all of them or some of the rows.
_RESHAPING = {
    "view", "reshape", "to", "type", "float", "double", "contiguous", "flatten", "unsqueeze", "squeeze", "dropout",
    "clone", "detach", "type_as", "view_as", "reshape_as",
}  # fmt: skip
_ROW_SELECTING = {"__getitem__", "index_select", "expand", "repeat_interleave", "repeat", "tile"}
_PRODUCTS = {"linear", "addmm", "matmul", "__matmul__", "mm", "bmm"}
_ADDITIONS = {"add", "__add__", "__radd__"}
_LOW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Product:
    """One multiplication of activations by a weight.

    Attributes:
        matrices: names of the matrices the weight holds, in the order of its rows.
        x: [..., in] what is multiplied.
        y: [..., out] the result, with the bias where the call added one.
    """

    matrices: tuple[str, ...]
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """The call that made a tensor: name of the function and its tensor arguments."""

    function: str
    inputs: tuple[torch.Tensor, ...]


class BlockTrace(TorchFunctionMode):
    """Watches a block run; use as a context manager around one forward pass.

    Args:
        block: to find the memory of its matrices.
        edits: matrices of a product → what to make of its result, for experiments.
        double: compute in float64 even where the model asks for float32 (norms, routers, softmax), so that an exact
            identity is not hidden by rounding.
        on_product: called with each product as it happens; the graph is then not kept.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        edits: dict[tuple[str, ...], Edit] | None = None,
        double: bool = False,
        on_product: Callable[[Product], None] | None = None,
    ):
        super().__init__()
        self.products: list[Product] = []
        self.origins: dict[int, Origin] = {}
        self.derived: dict[int, str] = {
            id(parameter): name for name, parameter in block.named_parameters() if parameter.ndim == 1
        }
        self._locate = _WeightLocator(block)
        self._edits = edits or {}
        self._double = double
        self._on_product = on_product
        self._biases = {name: matrix.bias for name, matrix in matrices_of(block).items() if matrix.bias is not None}
        self._awaiting_bias: dict[int, tuple[str, int]] = {}  # product without its bias yet → (bias, index)
        self._alive: list[Any] = []  # an id means something only while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and note what it did."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._double:
            func, args, kwargs = _in_double(func, name, args, kwargs)
        matrices, x = self._multiplied(name, args, kwargs)
        result = func(*args, **kwargs)
        if x is not None:
            result = self._product(matrices, x, result, (*args, *kwargs.values()))
        elif name in _ADDITIONS:
            result = self._add_bias(result, args)
        if self._on_product is None:
            self._note(name, result, args, kwargs)
        return result

    def _multiplied(self, name: str, args: Any, kwargs: Any) -> tuple[tuple[str, ...], torch.Tensor | None]:
        """Names of the matrices in a product, and what is multiplied by them; None if it is no product."""
        if name not in _PRODUCTS:
            return (), None
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for index, weight in enumerate(operands):
            found = self._locate(weight) if weight.ndim >= 2 else ()
            if found:
                others = [value for at, value in enumerate(operands) if at != index and value.ndim >= 2]
                return found, others[0] if others else None
        return (), None

    def _product(self, matrices: tuple[str, ...], x: torch.Tensor, y: torch.Tensor, args: Any) -> torch.Tensor:
        bias = self._biases.get(matrices[0]) if len(matrices) == 1 else None
        if bias is not None and not any(self.derived.get(id(value)) == bias for value in args):
            self._awaiting_bias[id(y)] = (bias, len(self.products))
        else:
            edit = self._edits.get(matrices)
            y = y if edit is None else edit(y)
        product = Product(matrices, x, y)
        if self._on_product is not None:
            self._on_product(product)
        else:
            self.products.append(product)
        return y

    def _add_bias(self, result: Any, args: Any) -> Any:
        """A bias added by a call of its own belongs to the product before it."""
        waiting = [self._awaiting_bias[id(value)] for value in args if id(value) in self._awaiting_bias]
        if self._on_product is None and waiting and waiting[0][0] in {self.derived.get(id(value)) for value in args}:
            index = waiting[0][1]
            before = self.products[index]
            edit = self._edits.get(before.matrices)
            result = result if edit is None else edit(result)
            self.products[index] = Product(before.matrices, before.x, result)
        return result

    def _note(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        inputs = tuple(_tensors((args, kwargs)))
        self._alive.append((result, inputs))
        names = {self.derived.get(id(value)) for value in inputs}
        for value in _tensors(result):
            if len(names) == 1 and None not in names:
                self.derived.setdefault(id(value), next(iter(names)) or "")
            elif not (name in _RESHAPING and any(value is one for one in inputs)):  # `contiguous` may do nothing
                self.origins[id(value)] = Origin(name, inputs)

    def root(self, x: torch.Tensor, *, same_rows: bool = False) -> torch.Tensor:
        """The tensor whose channels `x` has, before reshaping, casting and, unless `same_rows`, selection of rows."""
        while True:
            origin = self.origins.get(id(x))
            allowed = _RESHAPING if same_rows else _RESHAPING | _ROW_SELECTING
            if origin is None or origin.function not in allowed or not origin.inputs:
                return x
            before = origin.inputs[0]
            if before is x or before.shape[-1:] != x.shape[-1:] or (same_rows and before.numel() != x.numel()):
                return x
            x = before

    def upstream(self, x: torch.Tensor) -> list[Product]:
        """Products whose results reach `x` without passing through another product or a norm with a weight."""
        return self._walk(x)[0]

    def functions_behind(self, x: torch.Tensor) -> set[str]:
        """Names of the functions between `x` and those products."""
        return self._walk(x)[1]

    def _walk(self, x: torch.Tensor) -> tuple[list[Product], set[str]]:
        results = {id(product.y): product for product in self.products}
        found: list[Product] = []
        functions: set[str] = set()
        seen: set[int] = set()
        queue = [x]
        while queue:
            tensor = queue.pop(0)
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if id(tensor) in results:
                found.append(results[id(tensor)])
                continue
            origin = self.origins.get(id(tensor))
            if origin is None:
                continue
            functions.add(origin.function)
            if origin.function in _ADDITIONS or not any(id(value) in self.derived for value in origin.inputs):
                queue.extend(origin.inputs)
        return found, functions


@dataclass
class _WeightLocator:
    """View of a parameter → names of the matrices in it, in the order of rows."""

    block: nn.Module
    spans: dict[int, list[tuple[int, int, str]]] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = {}
        for name, matrix in matrices_of(self.block).items():
            view = matrix.view(self.block)
            self.spans.setdefault(view.untyped_storage().data_ptr(), []).append((*_span(view), name))

    def __call__(self, weight: torch.Tensor) -> tuple[str, ...]:
        spans = self.spans.get(weight.untyped_storage().data_ptr())
        if spans is None:
            return ()
        first, last = _span(weight)
        return tuple(name for start, end, name in spans if first <= start and end <= last)


def _span(view: torch.Tensor) -> tuple[int, int]:
    """First and last element of its storage that a view touches."""
    first = int(view.storage_offset())
    return first, first + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))


def _in_double(func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """The same call with float64 wherever it names a shorter dtype."""
    if name in ("float", "half", "bfloat16") and len(args) == 1:
        return torch.Tensor.double, args, kwargs
    if name.startswith("__") and name != "__getitem__":
        return func, args, kwargs
    args = tuple(torch.float64 if any(value is low for low in _LOW) else value for value in args)
    kwargs = {key: torch.float64 if any(value is low for low in _LOW) else value for key, value in kwargs.items()}
    return func, args, kwargs


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
