"""`halfbyte backends`."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.render import JsonFlag, print_json, print_table


def command(
    in_features: Annotated[int, typer.Option(help="Inputs of the linear to ask about.")] = 576,
    out_features: Annotated[int, typer.Option(help="Its outputs.")] = 576,
    group_size: Annotated[int, typer.Option(help="Its group size; -1 for whole rows.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Show what this machine has, which kernel would run a 4-bit linear, and why.

    Example: halfbyte backends --in-features 4096 --out-features 4096 --group-size 128
    """
    import torch

    from halfbyte.device.cpu import cpu_info, pick_tier, thread_count
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
    found = verdicts(probe, pick_device(device))
    cpu, tier, threads = cpu_info(), pick_tier(), thread_count()
    if json:
        kernels = [
            {"kernel": verdict.kernel.name, "picked": verdict.picked, "reason": verdict.reason} for verdict in found
        ]
        print_json({"cpu": vars(cpu), "tier": tier, "threads": threads, "kernels": kernels})
        return
    print(f"CPU       {cpu.model}, {cpu.physical_cores} cores, {threads} threads used (HALFBYTE_THREADS)")
    print(f"tiers     {', '.join(cpu.tiers)}; used: {tier} (HALFBYTE_ISA)")
    print(f"linear    {in_features} → {out_features}, 4 bits, groups of {size}")
    rows = [
        (verdict.kernel.name, "yes" if verdict.picked else "no", verdict.reason, verdict.kernel.summary)
        for verdict in found
    ]
    print_table(("kernel", "picked", "why", "what"), rows)
