"""The INT4 linear kernels against torch's own linear, on the shapes of SmolLM2-135M and one larger.

    python benchmarks/linear_kernels.py [--seconds 0.3] [--group-size 64]

Every cell pairs the peers in one run: they take turns in bursts, the first call of a burst (which pays for the other's
cache contents and for threads the other left spinning) is not counted, and the median of the rest is printed. `GB/s`
counts weights, activations and results once; `floor` is the share of the time that the machine could not do without:
the larger of bytes ÷ read bandwidth measured on a buffer of that size and flops ÷ fp32 multiply-add peak, both measured
here on the same threads. A weight that fits a cache is held against that cache's bandwidth. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from halfbyte import _native
from halfbyte.device.cpu import cpu_info, peak_flops, read_bandwidth, thread_count
from halfbyte.kernels.w4a16 import prepare
from halfbyte.tensor import QuantizedTensor

# (out, in): q and o, k and v, gate and up, down of SmolLM2-135M; then what an 8B model's layers are made of.
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 8192)]
ROWS = [1, 8, 512]
BURST = 6


def random_weight(rows: int, columns: int, group_size: int) -> QuantizedTensor:
    groups = -(-columns // group_size)
    return QuantizedTensor(
        torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        torch.rand(rows, groups) / 100,
        torch.randint(0, 16, (rows, groups), dtype=torch.uint8),
        4,
        group_size,
    )


def take_turns(peers: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, in alternating bursts, `seconds` for each or two bursts at least."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    bursts = 0
    end = time.perf_counter() + seconds * len(peers)
    while time.perf_counter() < end or bursts < 2:
        bursts += 1
        for name, call in peers.items():
            call()
            for _ in range(BURST):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in times.items()}


@cache
def bandwidth(size: int) -> float:
    return read_bandwidth(max(size, 1 << 16))


def measure(rows: int, columns: int, group_size: int, seconds: float, peak: float) -> list[dict[str, Any]]:
    weight = random_weight(rows, columns, group_size)
    dense = weight.dequantize()
    sixteen = dense.bfloat16()
    linears = {}
    for tier in _native.available_tiers():
        os.environ["HALFBYTE_ISA"] = tier
        linears[f"native {tier}"] = prepare(weight, backend="native", device=torch.device("cpu"))[1]
    os.environ.pop("HALFBYTE_ISA")
    results = []
    for m in ROWS:
        x16 = torch.randn(m, columns).bfloat16()
        peers: dict[str, Callable[[], Any]] = {name: partial(linear, x16) for name, linear in linears.items()}
        peers["torch bf16"] = partial(torch.nn.functional.linear, x16, sixteen)
        peers["torch fp32"] = partial(torch.nn.functional.linear, x16.float(), dense)
        sizes = {name: linear.nbytes for name, linear in linears.items()}
        sizes |= {"torch bf16": 2 * dense.numel(), "torch fp32": 4 * dense.numel()}
        for name, taken in take_turns(peers, seconds).items():
            moved = sizes[name] + (4 if name == "torch fp32" else 2) * m * (rows + columns)
            flops = 2 * m * rows * columns
            floor = max(moved / bandwidth(sizes[name]), flops / peak)
            results.append(
                {"out": rows, "in": columns, "m": m, "kernel": name, "microseconds": taken * 1e6,
                 "gb_per_s": moved / taken / 1e9, "gflop_per_s": flops / taken / 1e9, "floor_share": floor / taken}
            )  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each peer of each cell")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(thread_count())
    info, peak = cpu_info(), peak_flops()
    print(f"{info.model}, {thread_count()} threads, {peak / 1e9:.0f} GFLOP/s fp32, group size {options.group_size}")
    print(f"{'out × in':>12} {'M':>4}  {'kernel':<20} {'µs':>10} {'GB/s':>7} {'GFLOP/s':>8} {'floor':>6} {'× bf16':>7}")
    results = []
    for rows, columns in SHAPES:
        cell = measure(rows, columns, options.group_size, options.seconds, peak)
        base = {r["m"]: r["microseconds"] for r in cell if r["kernel"] == "torch bf16"}
        for r in cell:
            speed = f"{r['gb_per_s']:>7.1f} {r['gflop_per_s']:>8.1f} {r['floor_share']:>6.0%}"
            shape = f"{rows:>5} × {columns:<5}{r['m']:>4}"
            ratio = base[r["m"]] / r["microseconds"]
            print(f"{shape}  {r['kernel']:<20} {r['microseconds']:>10.1f} {speed} {ratio:>7.2f}")
        results += cell
    print(json.dumps({"cpu": info.model, "threads": thread_count(), "peak_flops": peak,
                      "group_size": options.group_size, "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
