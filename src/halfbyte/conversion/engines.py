"""Whether other engines load a checkpoint and run each linear on their fast kernel: their rules, as data.

Read from their sources, not run here: AutoAWQ 0.2.9, transformers 5.23 (which loads AWQ through GPTQModel 7.3),
vLLM, whose older releases (until about 2026) send what does not fit Marlin to a slower kernel; newer ones pad it; and
SGLang as of 2026, which took Marlin over from the older ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.architectures.splitting import FUSED, Heads, Weights, half_quantized, split
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.conversion.targets import format_of
from halfbyte.conversion.verification import Check
from halfbyte.errors import HalfbyteError
from halfbyte.formats.checks import read_names

_PADDED = "newer releases pad them on every call, older ones take a slower kernel"


@dataclass(frozen=True)
class Kernel:
    """What one kernel of an engine asks for.

    Attributes:
        name: for messages.
        misfit: outputs, inputs and group size of what one GPU holds → why it cannot run it; None if it can.
        half_only: whether its activations must be fp16.
    """

    name: str
    misfit: Callable[[int, int, int], str | None]
    half_only: bool = False


@dataclass(frozen=True)
class Engine:
    """The rules of one engine.

    Attributes:
        formats: that it opens, as `targets.TARGETS` has them.
        kernels: by format, the fastest first.
        excluded: (name of a linear, entries of modules_to_not_convert) → whether the engine leaves it in 16 bit.
        sections: checks of the quantization_config, each a problem or None.
        unknown: formats that it opens by rules not known here.
        fused: whether it makes one product of linears that share an input, and splits products over GPUs.
        looks: whether it finds what is in 16 bit by looking into the files if config.json names nothing.
    """

    formats: tuple[str, ...]
    kernels: Mapping[str, tuple[Kernel, ...]]
    excluded: Callable[[str, Sequence[str]], bool]
    sections: tuple[Callable[[Mapping[str, Any]], str | None], ...]
    unknown: tuple[str, ...] = ()
    fused: bool = False
    looks: bool = False


def _classic(outputs: int, inputs: int, size: int) -> str | None:
    """The AWQ GEMM kernel of AutoAWQ_kernels, and vLLM's plain one (N % 64, G % 32, N % G)."""
    if outputs % 64:
        return f"{outputs} outputs are no multiple of 64"
    if size % 32:
        return f"groups of {size} are no multiple of 32"
    return f"{outputs} outputs are no multiple of the group size {size}" if outputs % size else None


def _marlin(outputs: int, inputs: int, size: int) -> str | None:
    """Marlin as vLLM makes it while loading, newer releases: only what padding does not mend."""
    if size not in (32, 64, 128, inputs):
        return f"groups of {size}; it knows 32, 64, 128 and whole rows"
    return f"{inputs} inputs are no whole groups of {size}" if inputs % size else None


def _marlin_unpadded(outputs: int, inputs: int, size: int) -> str | None:
    """The same without padding: N % 64 and K % 128, or N % 128 and K % 64."""
    reason = _marlin(outputs, inputs, size)
    if reason is not None:
        return reason
    if (outputs % 64 == 0 and inputs % 128 == 0) or (outputs % 128 == 0 and inputs % 64 == 0):
        return None
    return f"{outputs} outputs and {inputs} inputs, it needs multiples of 64 and 128 or of 128 and 64; {_PADDED}"


def _marlin_of_sglang(outputs: int, inputs: int, size: int) -> str | None:
    """SGLang's: N % 64 and K % 128, nothing else, and no padding."""
    reason = _marlin(outputs, inputs, size)
    if reason is None and (outputs % 64 or inputs % 128):
        reason = f"{outputs} outputs and {inputs} inputs, it needs multiples of 64 and of 128"
    return reason


def _plain_of_sglang(outputs: int, inputs: int, size: int) -> str | None:
    """SGLang's AWQ kernel, which dequantizes before torch multiplies; its loader wants whole groups and words."""
    if inputs % size:
        return f"{inputs} inputs are no whole groups of {size}"
    return f"{outputs} outputs are no multiple of 8" if outputs % 8 else None


def _gptqmodel(outputs: int, inputs: int, size: int) -> str | None:
    """Group sizes that GPTQModel's AWQ classes know."""
    return None if size in (16, 32, 64, 128, inputs) else f"groups of {size}; it knows 16, 32, 64, 128 and whole rows"


def _substring(name: str, entries: Sequence[str]) -> bool:
    """vLLM: any part of the full name."""
    return any(entry in name for entry in entries)


def _substring_of_product(name: str, entries: Sequence[str]) -> bool:
    """SGLang: any part of the full name of the product that the linear becomes a part of."""
    path, _, leaf = name.rpartition(".")
    product = next((product for product, parts in FUSED.items() if leaf in parts), leaf)
    return any(entry in f"{path}.{product}" for entry in entries)


def _substring_in_block(name: str, entries: Sequence[str]) -> bool:
    """AutoAWQ: any part of the name inside the decoder block, all that it sees of it."""
    inside = re.sub(r"^.*?\.\d+\.", "", name, count=1)
    return any(entry in inside for entry in entries)


def _by_transformers(name: str, entries: Sequence[str]) -> bool:
    """transformers: a pattern from the start of the name to a dot or the end, or the end of the name."""
    # As a pattern an entry's dots would mean any character; no name of a module hangs on that.
    return any(f"{name}.".startswith(f"{entry.rstrip('.')}.") or name.endswith(entry) for entry in entries)


def _old_keys(section: Mapping[str, Any]) -> str | None:
    old = [key for key in ("w_bit", "q_group_size") if key in section]
    return f"config.json: {' and '.join(old)}: not read there, 4 bits and groups of 128 are assumed" if old else None


def _needs_zero_point(section: Mapping[str, Any]) -> str | None:
    if section.get("quant_method") == "awq" and section.get("zero_point") is not True:
        return "config.json: zero_point: must be there and true"
    return None


_AWQ_MARLIN = (Kernel("Marlin", _marlin_unpadded), Kernel("the plain AWQ kernel", _classic, half_only=True))
_AWQ_OF_SGLANG = (Kernel("Marlin", _marlin_of_sglang), Kernel("the plain AWQ kernel", _plain_of_sglang))
# AutoAWQ makes an fp16 model of whatever it loads.
_GEMM = (Kernel("the AWQ GEMM kernel", _classic),)
_ALL_OF_GPTQMODEL = (Kernel("GPTQModel", _gptqmodel),)
ENGINES: dict[str, Engine] = {
    # `version` is ignored: whatever it says, tensors are taken for the GEMM layout.
    "vllm": Engine(
        ("gemm", "compressed-tensors"),
        {"gemm": _AWQ_MARLIN, "compressed-tensors": (Kernel("Marlin", _marlin_unpadded),)},
        _substring,
        (_needs_zero_point,),
        ("gptq",),
        fused=True,
        looks=True,
    ),
    "sglang": Engine(
        ("gemm", "compressed-tensors"),
        {"gemm": _AWQ_OF_SGLANG, "compressed-tensors": _AWQ_OF_SGLANG[:1]},
        _substring_of_product,
        (_needs_zero_point,),
        ("gptq",),
        fused=True,
    ),
    "transformers": Engine(
        ("gemm", "gemv", "gemv_fast", "llm-awq", "compressed-tensors"),
        {"gemm": _ALL_OF_GPTQMODEL},
        _by_transformers,
        (_old_keys,),
        ("gptq",),
    ),
    "autoawq": Engine(
        ("gemm", "gemv", "gemv_fast", "marlin"),
        {"gemm": _GEMM},
        _substring_in_block,
        (),
    ),
}


def check_engine(
    name: str, weights: Weights, quantized: QuantizedCheckpoint | None, checkpoint: Checkpoint, tensor_parallel: int
) -> Check:
    """What of a checkpoint an engine would not load (problems), or not run on its fast kernel (notes).

    Args:
        name: of `ENGINES`.
        weights: of the quantized linears.
        quantized: the same; None if the model is not quantized.
        checkpoint: opened.
        tensor_parallel: GPUs that each linear is split over, where the engine does.
    """
    check, engine = Check(f"for {name}"), ENGINES[name]
    if quantized is None:
        check.skipped, check.detail = True, "no quantized linears to check"
        return check
    section = checkpoint.config["quantization_config"]
    format = format_of(section)
    if format in engine.unknown:
        check.skipped, check.detail = True, f"its rules for the {format} layout are not known here"
        return check
    if format not in engine.formats:
        check.problems.append(
            f"the {format} layout is not opened there; halfbyte convert makes {' or '.join(engine.formats)} of it"
        )
        return check
    check.problems += [problem for rule in engine.sections if (problem := rule(section)) is not None]
    if format != "compressed-tensors":
        check.problems += _excluded(engine, quantized, _entries(section))
    gpus, shapes = 1, weights
    if engine.fused:
        gpus = tensor_parallel
        shapes, uneven = split(weights, gpus, Heads.of(checkpoint.config))
        check.problems += uneven + half_quantized(weights)
    fast = _check_kernels(check, engine.kernels.get(format, ()), shapes, _model_dtype(checkpoint))
    over = f", split over {gpus} GPUs" if gpus > 1 else ""
    check.detail = f"{format}, {len(weights)} linears{over}"
    if format in engine.kernels:
        check.detail += f"; {fast} of {len(shapes)} products on {engine.kernels[format][0].name}"
    return check


def _entries(section: Mapping[str, Any]) -> tuple[str, ...]:
    key = "modules_to_not_convert"
    return read_names(section.get(key) or None, key)


def _excluded(engine: Engine, quantized: QuantizedCheckpoint, entries: Sequence[str]) -> list[str]:
    """Linears that the engine takes for quantized and which are not, or the other way round."""
    if not entries and engine.looks:
        return []
    problems = [
        f"{linear}: is quantized, but an entry of modules_to_not_convert matches it by that engine's rule"
        for linear in quantized.linears
        if engine.excluded(linear, entries)
    ]
    try:
        kept = quantized.kept_linears
    except HalfbyteError:
        return problems  # the check of names has said why
    for linear in kept:
        in_block = re.search(r"\.\d+\.", linear) is not None
        if in_block and not engine.excluded(linear, entries):
            problems.append(f"{linear}: is in 16 bit, but no entry of modules_to_not_convert matches it by its rule")
    return problems


def _check_kernels(check: Check, kernels: Sequence[Kernel], shapes: Weights, dtype: torch.dtype | None) -> int:
    """How many products the first kernel takes; the others become notes, those that none takes problems."""
    fast = 0
    for name, shape in shapes.items():
        reasons = []
        for kernel in kernels:
            reason = kernel.misfit(*shape)
            if reason is None and kernel.half_only and dtype not in (None, torch.float16):
                reason = f"activations in {str(dtype).removeprefix('torch.')}, it takes float16"
            if reason is None:
                break
            reasons.append(f"{kernel.name}: {reason}")
        if not reasons:
            fast += 1
        elif len(reasons) == len(kernels) and _PADDED not in reasons[0]:
            check.problems.append(f"{name}: no kernel takes it ({'; '.join(reasons)})")
        else:
            check.notes.append(f"{name}: falls off the fast kernel ({'; '.join(reasons)})")
    return fast


def _model_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """That config.json names."""
    named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None
