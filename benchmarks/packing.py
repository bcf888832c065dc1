"""How fast each layout packs and unpacks, on one core, against a copy of the same bytes.

    python benchmarks/packing.py [--shape 4096 4096] [--group-size 128] [--seconds 1] [--autoawq]

Speeds are in bytes of the 16-bit weights that the codes stand for, a second. The floor is the time to read the codes,
a byte each, and to write half a byte each, at the bandwidth of a copy measured in the same turn; `share` is that over
the time taken. The layouts take turns; medians are printed. `--autoawq` adds the packer of AutoAWQ's WQLinear_GEMM, if
it is installed: it packs from the weight, column by column. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from halfbyte.conversion.targets import TARGETS, Traits
from halfbyte.formats.layouts import read_layout
from halfbyte.tensor import QuantizedTensor

NAME = "weight"


def random_weight(rows: int, columns: int, size: int, *, symmetric: bool) -> QuantizedTensor:
    torch.manual_seed(0)
    groups = columns // size
    zeros = torch.full((rows, groups), 8) if symmetric else torch.randint(0, 16, (rows, groups))
    scales = (torch.rand(rows, groups) / 100 + 0.01).half().float()
    return QuantizedTensor(torch.randint(0, 16, (rows, columns), dtype=torch.uint8), scales, zeros.byte(), 4, size)


def jobs(rows: int, columns: int, size: int) -> dict[str, Callable[[], Any]]:
    """Packing and unpacking in every layout that takes the shape."""
    found: dict[str, Callable[[], Any]] = {}
    for name, target in TARGETS.items():
        weight = random_weight(rows, columns, size, symmetric=name == "marlin")
        if target.cannot_hold(weight) is not None:
            continue
        traits = Traits(4, size, name == "marlin", False, ["lm_head"], ["lm_head"])
        packed = target.pack(weight, NAME, traits)
        layout = read_layout({"quantization_config": target.section(traits)})
        assert layout is not None
        found[f"{name} pack"] = partial(target.pack, weight, NAME, traits)
        found[f"{name} unpack"] = partial(layout.unpack, packed, NAME)
    return found


def autoawq(rows: int, columns: int, size: int) -> Callable[[], Any]:
    """AutoAWQ's own packer on the same weight."""
    from awq.modules.linear.gemm import WQLinear_GEMM

    weight = random_weight(rows, columns, size, symmetric=False)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.dequantize()
    scales, zeros = weight.scales.T.contiguous(), weight.zeros.T.contiguous().float()
    return partial(WQLinear_GEMM.from_linear, linear, 4, size, False, scales, zeros)


def measure(work: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + seconds * len(work)
    while time.perf_counter() < end or min(map(len, taken.values())) < 3:
        for name, call in work.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each job")
    parser.add_argument("--autoawq", action="store_true", help="with AutoAWQ's packer beside them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = arguments.shape
    source = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    room = torch.empty_like(source)
    work: dict[str, Callable[[], Any]] = {"copy": lambda: room.copy_(source)}
    work |= jobs(rows, columns, arguments.group_size)
    if arguments.autoawq:
        work["autoawq pack"] = autoawq(rows, columns, arguments.group_size)
    times = measure(work, arguments.seconds)
    # A copy reads and writes each byte; a packer reads one and writes half of one, an unpacker the other way round.
    floor = times.pop("copy") * 0.75
    print(f"{rows} × {columns}, groups of {arguments.group_size}, one thread, {len(times)} jobs in turns")
    print(f"{'':<26}{'GB/s of 16 bit':>15}{'ms':>10}{'share of floor':>16}")
    found = {}
    for name, seconds in times.items():
        found[name] = {"gb_per_s": 2e-9 * rows * columns / seconds, "ms": 1e3 * seconds, "share": floor / seconds}
        print(f"{name:<26}{found[name]['gb_per_s']:>15.2f}{found[name]['ms']:>10.2f}{found[name]['share']:>16.1%}")
    print(json.dumps({"shape": [rows, columns], "group_size": arguments.group_size, "floor_ms": 1e3 * floor, **found}))


if __name__ == "__main__":
    main()
