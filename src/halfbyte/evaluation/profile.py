"""16 bit against 4 bits, linear by linear: latency, throughput, and the share of what the machine allows.

Weights are random: speed depends on shapes alone. Every implementation multiplies by several copies of each weight in
turn, together at least twice as large as the last-level cache, so that weights come from memory as they do in a model.
The implementations take turns in every round, with a read of memory between them; nothing is compared across runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from halfbyte.device.cpu import BandwidthProbe, peak_flops, pick_tier, thread_count
from halfbyte.device.torch_device import pick_device
from halfbyte.device.torch_probe import (
    TorchBandwidthProbe,
    device_name,
    last_level_cache,
    matmul_peak_flops,
    timed,
)
from halfbyte.errors import ConfigError
from halfbyte.evaluation.bench import check_numbers
from halfbyte.evaluation.linear_shapes import MODELS, LinearShape, model_shapes, shared_group_size, width_shapes
from halfbyte.evaluation.profile_peers import Peer, make_peers, random_weight
from halfbyte.evaluation.profile_result import BLOCK, LinearSpeed, Profile
from halfbyte.evaluation.sampler import using_threads
from halfbyte.progress import Ticker, progress_bar

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
QUICK_BATCH_SIZES = (1, 4, 16, 64)
MODEL_DIM = 2048
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class _Settings:
    """What is the same for every cell; `seconds` bounds the rounds beyond the least."""

    group_size: int
    least_bytes: int
    rounds: int
    seconds: float


def profile(
    *,
    model: str | None = None,
    model_dim: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    group_size: int | None = None,
    rounds: int | None = None,
    quick: bool = False,
    progress: bool = False,
) -> Profile:
    """Time the linears of a decoder block in 16 bit and in 4, and hold them against the machine's roofline.

    On the CPU: torch's bf16 product, halfbyte's bf16 product, INT4 with activations in fp32 (a16) and in 8 bits (a8).
    On a GPU: torch's bf16 product and the INT4 kernel that `halfbyte.load` would pick there.

    Args:
        model: a key of `evaluation.linear_shapes.MODELS`; or else
        model_dim: D, for four D × D linears and an MLP of D → 4D → D; 2,048 if neither is given.
        batch_sizes: rows of activations, each from 1 to 4,096; `BATCH_SIZES` if None.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: of the CPU; `thread_count` if None.
        group_size: inputs that share a scale; the largest of 128, 64 and 32 that divides every layer if None.
        rounds: at most; never fewer than 3. 15, or 5 if `quick`.
        quick: `QUICK_BATCH_SIZES` unless given, and a second a cell instead of four.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: an unknown model, a number out of range, or a group size that does not divide a layer.
    """
    if model is not None and model_dim is not None:
        raise ConfigError("model, model_dim: expected one of them, not both")
    sizes = list(dict.fromkeys(batch_sizes or (QUICK_BATCH_SIZES if quick else BATCH_SIZES)))
    rounds = (5 if quick else 15) if rounds is None else rounds
    threads = thread_count() if threads is None else threads
    check_numbers(batch_size=(min(sizes), 1), rounds=(rounds, _LEAST_ROUNDS), threads=(threads, 1))
    if max(sizes) > 4096:
        raise ConfigError(f"batch_size: expected at most 4096, got {max(sizes)}")
    shapes, blocks = (
        (width_shapes(MODEL_DIM if model_dim is None else model_dim), None) if model is None else model_shapes(model)
    )
    group_size = shared_group_size(shapes, group_size)
    picked = pick_device(device)
    cache = last_level_cache(picked)
    settings = _Settings(group_size, 2 * cache, rounds, 1.0 if quick else 4.0)
    rows: list[LinearSpeed] = []
    with (
        using_threads(threads),
        torch.inference_mode(),
        progress_bar("Profiling", len(shapes) * len(sizes), enabled=progress, unit="cells") as ticker,
    ):
        for shape in shapes:
            rows += _profile_shape(shape, sizes, picked, settings, ticker)
    on_cpu = picked.type == "cpu"
    return Profile(
        model=model,
        model_dim=shapes[0].in_features if model is None else MODELS[model][0],
        blocks=blocks,
        device=str(picked),
        machine=device_name(picked),
        tier=pick_tier() if on_cpu else None,
        threads=threads if on_cpu else None,
        group_size=group_size,
        cache_bytes=cache,
        rows=rows + _add_up(rows),
    )


class _Machine:
    """The limits of a device, measured in turn with whatever is held against them."""

    def __init__(self, device: torch.device, nbytes: int):
        self._device, on_cpu = device, device.type == "cpu"
        self._probe = BandwidthProbe(nbytes) if on_cpu else TorchBandwidthProbe(nbytes, device)
        self._peak = peak_flops if on_cpu else partial(matmul_peak_flops, device, torch.bfloat16)
        self.take = self._probe.take

    def limits(self) -> tuple[float, float]:
        """Bytes and operations per second."""
        return self._probe.bandwidth, self._peak()


def _profile_shape(
    shape: LinearShape, batch_sizes: Sequence[int], device: torch.device, settings: _Settings, ticker: Ticker
) -> list[LinearSpeed]:
    """All batch sizes on one linear."""
    rows: list[LinearSpeed] = []
    weight = random_weight(shape.out_features, shape.in_features, settings.group_size)
    peers = make_peers(weight, device, settings.least_bytes)
    del weight
    for batch_size in batch_sizes:
        ticker.describe(f"Profiling {shape.out_features} × {shape.in_features}, batch {batch_size}")
        machine = _Machine(device, settings.least_bytes)
        x = torch.randn(batch_size, shape.in_features, generator=torch.Generator().manual_seed(batch_size))
        times = _take_turns([peer.bind(x) for peer in peers], machine, device, settings)
        bandwidth, peak = machine.limits()
        rows += _rows(shape, batch_size, peers, times, bandwidth, peak)
        ticker.advance()
    return rows


def _take_turns(
    calls: Sequence[Callable[[], object]], machine: _Machine, device: torch.device, settings: _Settings
) -> list[list[float]]:
    """Seconds of each call in each round, but for the first, which warms up.

    The read of memory comes behind the first call, torch's, whose threads go on spinning for a while.
    """
    first, *others = calls
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + settings.seconds
    while len(times[0]) <= _LEAST_ROUNDS or (len(times[0]) <= settings.rounds and time.perf_counter() < end):
        times[0].append(timed(first, device))
        machine.take()
        for taken, call in zip(times[1:], others, strict=True):
            taken.append(timed(call, device))
    return [taken[1:] for taken in times]


def _rows(
    shape: LinearShape,
    batch_size: int,
    peers: Sequence[Peer],
    times: Sequence[Sequence[float]],
    bandwidth: float,
    peak: float,
) -> list[LinearSpeed]:
    seconds = [[pass_seconds / peer.copies for pass_seconds in taken] for peer, taken in zip(peers, times, strict=True)]
    quartiles = [statistics.quantiles(taken, n=4, method="inclusive") for taken in seconds]
    wide = [
        (peer.weight_bytes, middle) for peer, (_, middle, _) in zip(peers, quartiles, strict=True) if peer.bits == 16
    ]
    flops = 2.0 * batch_size * shape.out_features * shape.in_features
    rows = []
    for peer, taken, (low, middle, high) in zip(peers, seconds, quartiles, strict=True):
        moved = peer.weight_bytes + peer.item_bytes * batch_size * (shape.out_features + shape.in_features)
        rows.append(
            LinearSpeed(
                layer=shape.name,
                out_features=shape.out_features,
                in_features=shape.in_features,
                count=shape.count,
                batch_size=batch_size,
                implementation=peer.name,
                bits=peer.bits,
                copies=peer.copies,
                rounds=len(taken),
                seconds=middle,
                seconds_q25=low,
                seconds_q75=high,
                weight_bytes=peer.weight_bytes,
                bytes_moved=moved,
                floor_seconds=max(moved / bandwidth, flops / peak),
                flops=flops,
                bandwidth=bandwidth,
                peak_flops=peak,
                baseline_seconds=min(median for _, median in wide),
                baseline_bytes=wide[0][0],
            )
        )
    return rows


def _add_up(rows: Sequence[LinearSpeed]) -> list[LinearSpeed]:
    """All linears of a block one after the other, for each batch size and implementation."""
    cells: dict[tuple[int, str], list[LinearSpeed]] = {}
    for row in rows:
        cells.setdefault((row.batch_size, row.implementation), []).append(row)
    fastest = {
        batch_size: min(
            sum(row.count * row.seconds for row in cell)
            for (other, _), cell in cells.items()
            if other == batch_size and cell[0].bits == 16
        )
        for batch_size, _ in cells
    }

    def total(cell: Sequence[LinearSpeed], name: str) -> Any:
        return sum(row.count * getattr(row, name) for row in cell)

    sums = (
        "seconds",
        "seconds_q25",
        "seconds_q75",
        "weight_bytes",
        "bytes_moved",
        "floor_seconds",
        "flops",
        "baseline_bytes",
    )
    return [
        replace(
            cell[0],
            layer=BLOCK,
            out_features=None,
            in_features=None,
            count=1,
            copies=min(row.copies for row in cell),
            rounds=min(row.rounds for row in cell),
            bandwidth=statistics.median(row.bandwidth for row in cell),
            peak_flops=statistics.median(row.peak_flops for row in cell),
            baseline_seconds=fastest[batch_size],
            **{name: total(cell, name) for name in sums},
        )
        for (batch_size, _), cell in cells.items()
    ]
