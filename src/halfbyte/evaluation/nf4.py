"""MODEL@nf4: the 4-bit normal float of bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314), as a peer to compare.

It is quantized while it is loaded and never stored. On a CPU every product expands its weights again, so that steps of
one token take about as long as short prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from halfbyte.device.cpu import has_bf16_arithmetic
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import UnsupportedError
from halfbyte.generation.model import Model
from halfbyte.runtime.engine import TransformersEngine
from halfbyte.runtime.loading import LoadedModel

SUFFIX = "@nf4"
QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
PACKAGES = ("bitsandbytes", "accelerate")


class Nf4Engine(TransformersEngine):
    """A transformers module with linears of bitsandbytes."""

    @property
    def nbytes(self) -> int:
        """Parameters, which the codes are among, and the scale of each block of weights."""
        return super().nbytes + sum(int(linear.weight.quant_state.absmax.nbytes) for linear in self.linears)

    @property
    def linears(self) -> list[Any]:
        """Those that are quantized."""
        return [module for module in self.network.modules() if hasattr(getattr(module, "weight", None), "quant_state")]


def check_nf4(name: str) -> None:
    """Refuse MODEL@nf4 where it cannot be had.

    Raises:
        UnsupportedError: a package is missing.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise UnsupportedError(f'{name}: needs {" and ".join(missing)}; install it with: pip install "halfbyte[nf4]"')


def load_nf4(folder: Path, *, device: str = "auto") -> Model:
    """A model with its linears quantized by bitsandbytes, the output head in 16 bit; in fp32 where the CPU has no bf16.

    Args:
        folder: of a model that is not quantized.
        device: as in `load`.

    Raises:
        UnsupportedError: transformers or bitsandbytes refuse it.
    """
    import transformers

    target = pick_device(device)
    dtype = torch.float32 if target.type == "cpu" and not has_bf16_arithmetic() else torch.bfloat16
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    try:
        with _quiet():
            network = transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=settings, dtype=dtype, device_map={"": str(target)}, local_files_only=True
            )
    except Exception as error:  # the libraries raise what their parts do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"{folder}{SUFFIX}: bitsandbytes does not run it ({reason})") from error
    engine = Nf4Engine(network.eval())
    return Model(
        LoadedModel(
            engine=engine,
            config=network.config,
            stop_ids=frozenset(),
            device=target,
            folder=folder,
            quantized=True,
            kernels={"bitsandbytes nf4": len(engine.linears)},
            not_fused="bitsandbytes runs it in transformers",
            fused=None,
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws its bar into pipes, too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
