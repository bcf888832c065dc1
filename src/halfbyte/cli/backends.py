"""`halfbyte backends`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.render import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from halfbyte.kernels.registry import Verdict
    from halfbyte.runtime.kernel_choice import KernelChoices, LayerShape


def command(
    model: Annotated[
        str | None, typer.Argument(help="A quantized checkpoint whose linears to ask about: a folder or a hub name.")
    ] = None,
    in_features: Annotated[int, typer.Option(help="Without a model: inputs of the linear to ask about.")] = 576,
    out_features: Annotated[int, typer.Option(help="Its outputs.")] = 576,
    group_size: Annotated[int, typer.Option(help="Its group size; -1 for whole rows.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Show what this machine has, which kernel runs each kind of linear of a model, or one of a given shape, and why.

    Example: halfbyte backends smollm2-4bit
    """
    from halfbyte.device.cpu import cpu_info, pick_tier, thread_count

    choices = None if model is None else _choices(model, device)
    found = _verdicts(in_features, out_features, group_size, device) if choices is None else []
    cpu, tier, threads = cpu_info(), pick_tier(), thread_count()
    if json:
        kernels = [{"kernel": one.kernel.name, "picked": one.picked, "reason": one.reason} for one in found]
        asked = {"kernels": kernels} if choices is None else {"model": model, **choices.to_dict()}
        print_json({"cpu": vars(cpu), "tier": tier, "threads": threads, **asked})
        return
    print(f"CPU       {cpu.model}, {cpu.physical_cores} cores, {threads} threads used (HALFBYTE_THREADS)")
    print(f"tiers     {', '.join(cpu.tiers)}; used: {tier} (HALFBYTE_ISA)")
    if choices is not None:
        _print_choices(str(model), choices)
        return
    print(
        f"linear    {in_features} → {out_features}, 4 bits, groups of {group_size if group_size != -1 else in_features}"
    )
    rows = [(one.kernel.name, "yes" if one.picked else "no", one.reason, one.kernel.summary) for one in found]
    print_table(("kernel", "picked", "why", "what"), rows)


def _choices(model: str, device: str) -> KernelChoices:
    from halfbyte.runtime.kernel_choice import kernel_choices

    return kernel_choices(model, device)


def _verdicts(in_features: int, out_features: int, group_size: int, device: str) -> list[Verdict]:
    """On a 4-bit linear of that shape."""
    import torch

    from halfbyte.device.torch_device import pick_device
    from halfbyte.errors import ConfigError
    from halfbyte.kernels.w4a16 import verdicts
    from halfbyte.tensor import QuantizedTensor

    size = in_features if group_size == -1 else group_size
    if min(in_features, out_features, size) < 1:
        raise ConfigError("--in-features, --out-features and --group-size: expected positive numbers")
    groups = -(-in_features // size)
    probe = QuantizedTensor(
        torch.zeros(out_features, in_features, dtype=torch.uint8),
        torch.ones(out_features, groups),
        torch.zeros(out_features, groups, dtype=torch.uint8),
        bits=4,
        group_size=size,
    )
    return verdicts(probe, pick_device(device))


def _print_choices(model: str, choices: KernelChoices) -> None:
    print(f"model     {model} on {choices.device}")
    if choices.not_fused is None and choices.device.type == "cuda":
        print("decoder   runs it, by default, a CUDA graph a step, on the kernels below")
    elif choices.not_fused is None:
        print('decoder   runs it whole, by default; the kernels below are those of backend="transformers"')
    else:
        print(f"decoder   does not run it: {choices.not_fused}; the kernels below do")
    rows = [row for shape in choices.shapes for row in _rows(shape)]
    print_table(("linears", "count", "out × in", "bits", "group", "kernel", "picked", "why"), rows)


def _rows(shape: LayerShape) -> list[tuple[str, ...]]:
    """One for each kernel; what they are about stands in the first."""
    size = f"{shape.out_features} × {shape.in_features}"
    about = (", ".join(shape.names), str(shape.count), size, str(shape.bits), str(shape.group_size))
    return [
        (*(about if index == 0 else ("",) * len(about)), one.kernel.name, "yes" if one.picked else "no", one.reason)
        for index, one in enumerate(shape.verdicts)
    ]
