"""A Hugging Face causal language model without weights, filled part by part.

The skeleton is the real transformers module tree with every parameter on the meta device, so the largest model costs
a few megabytes. Buffers (rotary frequencies and the like) are real: they come from the config, not from the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.aliases import load_config
from halfbyte.architectures.matrices import matrices_of
from halfbyte.architectures.stored import TensorSource
from halfbyte.errors import CheckpointError, UnsupportedError


def build_skeleton(folder: str, dtype: torch.dtype) -> Any:
    """The module tree of the model in `folder`, parameters on the meta device, in eval mode.

    Args:
        folder: a Hugging Face model folder; only config.json is read.
        dtype: dtype of the parameters to come.

    A vision-language model is built whole; `find_decoder_blocks` finds its text tower.

    Raises:
        UnsupportedError: transformers cannot build a causal language model from this config.
    """
    import transformers

    try:
        config = load_config(folder)
        build = transformers.AutoModelForCausalLM
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            build = transformers.AutoModelForImageTextToText
        with _parameters_on_meta():
            model = build.from_config(config, dtype=dtype)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the fused ones want all experts in one tensor of floats
    except Exception as error:  # a config is a stranger's file, and each architecture fails on it in a way of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(
            f"{folder}: transformers cannot build a causal language model from it: {reason}"
        ) from error
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device and their buffers where they would be."""
    from transformers import PreTrainedModel

    register, initialise = nn.Module.register_parameter, PreTrainedModel.init_weights

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    # A meta parameter has nothing to draw numbers for, and drawing them takes longer than all the rest.
    PreTrainedModel.init_weights = lambda model: None
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        PreTrainedModel.init_weights = initialise


def find_decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its dotted name.

    It is the longest `ModuleList` whose members hold matrices and are all of one class, or as many as the config
    has layers; the layer count breaks ties. Of a vision-language model it is that of the part that embeds tokens.

    Raises:
        UnsupportedError: there is none.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    layers = getattr(text, "num_hidden_layers", None)
    best: tuple[tuple[bool, bool, int], str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if len({type(child) for child in module}) != 1 and len(module) != layers:
            continue
        if not all(any(parameter.ndim > 1 for parameter in child.parameters()) for child in module):
            continue
        rank = (_embeds_tokens(text_tower(model, name)[1]), len(module) == layers, len(module))
        if best is None or rank > best[0]:
            best = (rank, name, module)
    if best is None:
        raise UnsupportedError(f"{type(model).__name__}: no list of decoder blocks found in the module tree")
    return best[1], best[2]


def text_tower(model: nn.Module, blocks_name: str) -> tuple[str, nn.Module]:
    """The innermost model around the decoder blocks, which takes `input_ids`, and its dotted name."""
    path = blocks_name
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if hasattr(module, "get_input_embeddings"):
            return path, module
    return "", model


def _embeds_tokens(tower: nn.Module) -> bool:
    try:
        return isinstance(tower.get_input_embeddings(), nn.Embedding)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False


def named_linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a block with their names inside it, in module order."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def fill(
    module: nn.Module,
    prefix: str,
    source: TensorSource,
    dtype: torch.dtype | None = None,
    *,
    skip: str | None = None,
) -> None:
    """Read every parameter of `module` that is still on the meta device, and the buffers the source holds.

    Args:
        module: part of a skeleton.
        prefix: its dotted name in the model; "" for the whole model.
        source: where the tensors are.
        dtype: convert to this floating dtype; None keeps the dtype on disk.
        skip: dotted name inside `module` of a part to leave empty, e.g. the list of decoder blocks.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config implies.
    """
    for name, parameter in list(module.named_parameters(remove_duplicate=True)):
        if not parameter.is_meta or (skip is not None and name.startswith(skip + ".")):
            continue
        full = f"{prefix}.{name}" if prefix else name
        if full not in source:
            raise CheckpointError(f"tensor {full}: the config implies it, the checkpoint lacks it; is it complete?")
        tensor = source.read(full)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"tensor {full}: expected shape {list(parameter.shape)} from config.json, found {list(tensor.shape)}"
            )
        set_parameter(module, name, tensor if dtype is None else tensor.to(dtype))
    for name, buffer in module.named_buffers():
        full = f"{prefix}.{name}" if prefix else name
        if full in source and not (skip is not None and name.startswith(skip + ".")):
            stored = source.read(full)
            if stored.shape == buffer.shape:
                buffer.copy_(stored)


def weight_of(block: nn.Module, name: str) -> torch.Tensor:
    """The weight called `name` inside `block`, sharing its memory.

    Args:
        block: a decoder block.
        name: of a matrix (`matrices_of`), whose view is [out, in], or of a module with a weight, such as a norm.
    """
    matrix = matrices_of(block).get(name)
    if matrix is not None:
        return matrix.view(block)
    weight = block.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.data


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter at the dotted `name` inside `module`."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def release(module: nn.Module) -> None:
    """Return every parameter of `module` to the meta device, freeing its memory."""
    for name, parameter in list(module.named_parameters()):
        set_parameter(module, name, torch.empty_like(parameter, device="meta"))
