"""Quantized linears that are broken or lie, in every layout, each made from a sound one by one change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from halfbyte.conversion.targets import TARGETS, Traits
from tests.formats.weights import random_tensor

OUTPUTS, INPUTS, GROUP = 256, 256, 128
NAME = "model.layers.0.mlp.up_proj"
# What can be absent.
OPTIONAL = ("bias", "g_idx", "weight_zero_point", "weight_g_idx", "weight_shape")

Linear = tuple[dict[str, Any], dict[str, torch.Tensor]]


def sound(layout: str) -> Linear:
    """The `quantization_config` and the tensors, by key, of a linear that opens."""
    tensor = random_tensor(1, OUTPUTS, INPUTS, GROUP, bias=True, symmetric=layout == "marlin", lowest_zero=1)
    traits = Traits(4, GROUP, layout == "marlin", False, ["lm_head"], ["lm_head"])
    target = TARGETS[layout]
    return target.section(traits), target.pack(tensor, NAME, traits)


def broken(layout: str) -> Iterator[tuple[str, Linear]]:
    """What is wrong, and a linear of which only that is."""
    section, tensors = sound(layout)
    for key, tensor in tensors.items():
        if key not in OPTIONAL:
            yield f"{key} missing", (section, {k: v for k, v in tensors.items() if k != key})
        for what, changed in _changed(key, tensor):
            yield f"{key} {what}", (section, {**tensors, key: changed})
    for what, values in _out_of_range(layout, tensors).items():
        yield what, (section, {**tensors, **values})
    for what, changed_section in _changed_sections(layout, section):
        yield f"config with {what}", (changed_section, tensors)


def _changed(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for dtype in (torch.bool, torch.float64, torch.int8):
        yield f"in {dtype}", tensor.to(dtype)
    yield "of one number", tensor.new_ones(())
    yield "with an axis more", tensor[None]
    yield "empty", tensor[:0]
    yield "cut short", tensor[:-1]
    yield "too long", torch.cat([tensor, tensor[:1]])
    if tensor.ndim == 2:
        yield "without columns", tensor[:, :0]
        yield "a column short", tensor[:, :-1]
    if tensor.is_floating_point():
        for value in (torch.nan, torch.inf, -torch.inf):
            changed = tensor.clone()
            changed.view(-1)[-1] = value
            yield f"with {value}", changed
    if key in ("grid", "g_idx", "weight_g_idx", "group_index", "weight_shape"):
        for value in (-1, -(2**31), 2**31 - 1):
            changed = tensor.clone()
            changed[-1] = value
            yield f"with {value}", changed


def _out_of_range(layout: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Zero points above 15 or between two integers, where a layout could express them."""
    if layout not in ("gemv_fast", "llm-awq"):
        return {}
    key = "qzeros" if layout == "gemv_fast" else "scaled_zeros"
    scales = tensors["scales"].float()
    points = {"16": -16 * scales, "-1": scales, "7.5": -7.5 * scales}
    return {f"a zero point of {point}": {key: product.half()} for point, product in points.items()}


def _changed_sections(layout: str, section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    group = ("config_groups", "group_0", "weights") if layout == "compressed-tensors" else ()
    for value in (0, -2, 2**62, 10**400, "128", 64.5, True, [128], {}):
        if layout == "native" and value in (2**62, 10**400):
            continue  # each linear says its own
        yield f"group_size {value!r:.20}", _with(section, (*group, "group_size"), value)
    for value in (0, -4, 5, 17, 2**70, "four", None, []):
        if layout == "native" and value == 5:
            continue  # its codes may be that wide
        yield f"bits {value!r}", _with(section, (*group, "num_bits" if group else "bits"), value)
    for value in (["awq"], 3, "exl2", "a\nb\x1b[2J"):
        yield f"method {value!r}", {**section, "quant_method": value}


def _with(section: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = path
    return {**section, head: _with(section[head], tuple(rest), value) if rest else value}
