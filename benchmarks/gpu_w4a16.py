"""Claim: the INT4 kernel is right at every shape, and few rows of x cost what reading packed weights costs.

    python benchmarks/gpu_w4a16.py [--dtype fp16] [--rounds 50] [--skip-sweep] [--peers marlin nf4]

First the sweep: rows, columns, group sizes, zero points, against fp64 on the same GPU; the error is ‖y - ŷ‖ / ‖ŷ‖.
Then the speed against torch's own linear with the same weight in 16 bit. Both run as CUDA graphs of several products,
with weights of their own that are more than the L2 cache holds, and take turns; medians. `copy` is the share of the
bandwidth that copying 1 GiB reaches, for weights, activations and results once; `dense` that of the rate of torch's
product of two 8192 × 8192 matrices; both are measured in the same run. `--peers` adds GPTQModel's Marlin and
bitsandbytes' NF4, where they are installed, to the turns. Exits with 1 if the sweep finds an error that is too large.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from gpu_common import as_graph, copy_bandwidth, describe, find_gpu, take_turns
from gpu_peers import PEERS, Linear

from halfbyte.device.torch_probe import last_level_cache, matmul_peak_flops
from halfbyte.kernels.registry import PreparedLinear
from halfbyte.kernels.w4a16 import prepare
from halfbyte.tensor import QuantizedTensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# y is rounded to 11 bits, or to 8.
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
SWEEP_ROWS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 257, 512, 1000, 1024)
# (out, in): multiples of the tile, and remainders of all kinds.
SWEEP_SHAPES = ((256, 512), (192, 320), (64, 64), (100, 200), (1000, 1096), (4096, 4096))
SWEEP_GROUPS = (32, 64, 128, -1)
SPEED_SHAPES = ((28672, 8192), (4096, 4096))
SPEED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def random_weight(
    rows: int, columns: int, group_size: int, device: torch.device, *, zero_point: bool
) -> QuantizedTensor:
    """Codes of 4 bits; scales that fp16 holds."""
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    scales = (torch.rand(rows, groups, device=device) * 0.01 + 0.001).half().float()
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8, device=device)
    if zero_point:
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device=device)
    return QuantizedTensor(codes, scales, zeros, 4, size)


def relative_error(linear: PreparedLinear, weight: QuantizedTensor, x: torch.Tensor) -> float:
    """Of x · Ŵᵀ, against fp64."""
    expected = x.double() @ weight.dequantize().double().T
    return float((linear(x).double() - expected).norm() / expected.norm())


def sweep(device: torch.device, dtype: torch.dtype, kernel: str = "cuda") -> list[dict[str, Any]]:
    """The largest error of each shape, group size and kind of zero points, and at how many rows."""
    found = []
    for (rows, columns), group_size, zero_point in itertools.product(SWEEP_SHAPES, SWEEP_GROUPS, (False, True)):
        weight = random_weight(rows, columns, group_size, device, zero_point=zero_point)
        linear = prepare(weight, backend=kernel, device=device)[1]
        x = torch.randn(max(SWEEP_ROWS), columns, device=device).to(dtype)
        error, at = max((relative_error(linear, weight, x[:m]), m) for m in SWEEP_ROWS)
        found.append(
            {"out": rows, "in": columns, "group_size": group_size, "zero_point": zero_point, "error": error, "m": at}
        )
    return found


def copies_needed(nbytes: int, device: torch.device) -> int:
    """Of a weight, so that going through them leaves none of it in the last-level cache."""
    return 2 + 2 * last_level_cache(device) // nbytes


def build_peers(
    names: Sequence[str], weight: QuantizedTensor, dtype: torch.dtype, count: int
) -> dict[str, list[Linear]]:
    """`count` linears of each peer that can be had; the others are named with what they raise."""
    found = {}
    for name in names:
        try:
            found[name] = [PEERS[name](weight, dtype) for _ in range(count)]
        except Exception as error:  # a package of others, on whatever machine this is
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"{name}: left out ({type(error).__name__}: {reason})", file=sys.stderr)
    return found


def measure(
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    kernel: str = "cuda",
    peers: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Seconds of one product, packed, in 16 bit and by peers, for each number of rows of x."""
    weight = random_weight(rows, columns, 128, device, zero_point=True)
    packed = prepare(weight, backend=kernel, device=device)[1]
    linears = [packed, *(copy.deepcopy(packed) for _ in range(copies_needed(packed.nbytes, device) - 1))]
    dense = weight.dequantize().to(dtype)
    matrices = [dense, *(dense.clone() for _ in range(copies_needed(dense.nbytes, device) - 1))]
    sides: dict[str, Sequence[Linear]] = {
        "int4": linears,
        "half": [partial(torch.nn.functional.linear, weight=matrix) for matrix in matrices],
        **build_peers(peers, weight, dtype, len(linears)),
    }
    found = []
    for m in SPEED_ROWS:
        x = torch.randn(m, columns, device=device).to(dtype)
        turns = {name: as_graph(partial(_last, side, x), device) for name, side in sides.items()}
        seconds = take_turns(turns, device, rounds)
        each = {name: seconds[name] / len(side) for name, side in sides.items()}
        mine, theirs = each.pop("int4"), each.pop("half")
        moved = packed.nbytes + 2 * m * (rows + columns)
        found.append(
            {"out": rows, "in": columns, "m": m, "int4": mine, "half": theirs, "ratio": theirs / mine,
             "bytes_per_s": moved / mine, "flops": 2 * m * rows * columns / mine, "peers": each}
        )  # fmt: skip
    return found


def _last(linears: Sequence[Linear], x: torch.Tensor) -> torch.Tensor:
    return [linear(x) for linear in linears][-1]


def print_speed(cells: list[dict[str, Any]], bandwidth: float, peak: float) -> None:
    """A line for each shape and number of rows."""
    names = "".join(f"{f'{name} µs':>11}" for name in cells[0]["peers"])
    print(
        f"{'out × in':>14}{'M':>6}{'int4 µs':>10}{'16 bit µs':>11}{'ratio':>8}{'GB/s':>8}{'copy':>7}{'dense':>7}{names}"
    )
    for cell in cells:
        shape = f"{cell['out']} × {cell['in']}"
        shares = f"{cell['bytes_per_s'] / bandwidth:>7.0%}{cell['flops'] / peak:>7.0%}"
        times = f"{1e6 * cell['int4']:>10.1f}{1e6 * cell['half']:>11.1f}{cell['ratio']:>7.2f}×"
        peers = "".join(f"{1e6 * seconds:>11.1f}" for seconds in cell["peers"].values())
        print(f"{shape:>14}{cell['m']:>6}{times}{cell['bytes_per_s'] / 1e9:>8.0f}{shares}{peers}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of activations")
    parser.add_argument("--rounds", type=int, default=50, help="of which the median is taken")
    parser.add_argument("--skip-sweep", action="store_true", help="only measure")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="of other packages, taking turns")
    options = parser.parse_args()
    device = find_gpu("gpu_w4a16")
    if device is None:
        return 2
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    dtype = DTYPES[options.dtype]
    print(f"{describe(device)}, {options.dtype}")
    errors = [] if options.skip_sweep else sweep(device, dtype)
    wrong = [cell for cell in errors if not cell["error"] <= LIMITS[dtype]]
    if errors:
        worst = max(errors, key=lambda cell: cell["error"])
        print(f"sweep: {len(errors)} weights × {len(SWEEP_ROWS)} numbers of rows, worst {worst}")
    for cell in wrong:
        print(f"too large: {cell}")
    bandwidth, peak = copy_bandwidth(device), matmul_peak_flops(device, dtype, size=8192)
    print(f"copying {bandwidth / 1e9:,.0f} GB/s read and written, {options.dtype} products {peak / 1e12:,.0f} TFLOP/s")
    cells = []
    for shape in SPEED_SHAPES:
        measured = measure(*shape, device, dtype, options.rounds, peers=options.peers)
        print_speed(measured, bandwidth, peak)
        cells += measured
    document = {"gpu": describe(device), "dtype": options.dtype, "copy_bytes_per_s": bandwidth, "dense_flops": peak}
    print(json.dumps({**document, "errors": errors, "wrong": len(wrong), "speed": cells}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
