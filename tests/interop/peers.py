"""The peers: how each is imported, opened and run, with what it takes on a small machine without a GPU.

What had to be worked around (gptqmodel 7.4.0):

* It imports torchvision, which it does not list among what it needs, for a family of vision models. A torchvision for
  the CPU build of torch cannot be had from the package index, so an empty one stands there during the import.
* Its pools of threads want two workers out of (CPUs + 1) / 2: on a machine with two CPUs it stops with "Virtual pool
  'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1". GPTQMODEL_CPU_WORKERS says otherwise.
* AWQ is quantized with a packing class for CUDA unless `backend=BACKEND.AWQ_TORCH` names another.
* GPTQ's packer is C++, compiled when it is first used; `pack_impl="original"` is the same in torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.formats.layouts import read_layout


def import_peer(name: str) -> ModuleType:
    """The package; skips the test, with the reason, where it is not installed."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed here; make test-interop")
    return import_module(name)


def import_gptqmodel() -> ModuleType:
    """gptqmodel, worked around."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # transformers and what it loads must ask for torchvision before an empty one is there.
    import_peer("transformers").utils.is_torchvision_available()
    with without_torchvision():
        return import_peer("gptqmodel")


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Inside, the names that gptqmodel imports from torchvision exist, and mean nothing."""
    if find_spec("torchvision") is not None:
        yield
        return
    top, transforms, functional = (
        ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    )
    top.transforms, transforms.functional, functional.InterpolationMode = transforms, functional, object  # type: ignore[attr-defined]
    modules = {module.__name__: module for module in (top, transforms, functional)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def opened(folder: Path, **options: Any) -> Any:
    """By transformers' own `from_pretrained`, in fp32 unless told otherwise."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def logits(network: Any, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Of all positions, [tokens, vocabulary] in float32."""
    with torch.no_grad():
        found: torch.Tensor = network(torch.as_tensor(ids)[None]).logits[0].float()
    return found


def greedy(network: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The tokens chosen behind a prompt by transformers' `generate`."""
    ids = torch.tensor([prompt])
    found = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tuple(found[0, len(prompt) :].tolist())


def quantized_checkpoint(folder: Path) -> QuantizedCheckpoint:
    """As halfbyte reads it."""
    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    assert layout is not None
    return QuantizedCheckpoint(checkpoint, layout)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized linear as halfbyte reads it: name → float32 [out, in]."""
    quantized = quantized_checkpoint(folder)
    return {name: quantized.read(name).dequantize() for name in quantized.linears}
