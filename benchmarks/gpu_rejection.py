"""Claim: on a GPU the rejection sampler takes one launch, and reads little more than it must.

    python benchmarks/gpu_rejection.py [--rounds 50] [--memory 8]

Three tables. Batches: the plain Python loop of `sampler_baseline.py` on the same GPU, `vectorized`, and the kernel, as
calls from Python to an idle GPU; the kernel also as a CUDA graph (with the setting of its records to zero), handed over
while the GPU is busy, so that only its work is timed; probabilities, four drafts, an acceptance of 0.7. Bandwidth: many
calls on inputs of their own in one graph, so that none finds its rows in the L2 cache; `copy` is the share of the
bandwidth that copying 1 GiB reaches in the same run, for what must be read: p and q at a rejection, p behind the last
draft. Filters: logits, against `vectorized`. Uniform numbers are drawn before.
Peers take turns; medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_common import as_graph, copy_bandwidth, describe, find_gpu, take_turns
from sampler_baseline import rejection_sample_loop

from halfbyte.device.torch_probe import last_level_cache
from halfbyte.evaluation.sampler import SamplerCase, synthetic_case
from halfbyte.sampling.rejection import rejection_sample

ACCEPTANCE, DRAFTS = 0.7, 4
BATCHES = ((1, 32_000), (4, 32_000), (16, 32_000), (64, 32_000), (256, 32_000), (64, 128_000))
STREAMED = ((1, 32_000), (16, 128_000), (64, 128_000), (256, 128_000))
FILTERED = ((1, 32_000), (16, 128_000), (64, 128_000))
FILTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "temperature 0.7, top-k 50, top-p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


def make_case(batch: int, vocabulary: int, device: torch.device, *, logits: bool = False, seed: int = 0) -> SamplerCase:
    """A synthetic case on the device."""
    case = synthetic_case(batch, DRAFTS, vocabulary, ACCEPTANCE, logits=logits, seed=seed)
    ids, draft, target = (part.to(device) for part in (case.draft_ids, case.draft_probs, case.target))
    return replace(case, draft_ids=ids, draft_probs=draft, target=target)


def sampler(case: SamplerCase, implementation: str, **filters: Any) -> Callable[[], torch.Tensor]:
    """A call on the case, with uniform numbers drawn once; it returns the counts."""
    batch, drafts = case.draft_ids.shape
    uniforms = torch.rand(batch, drafts + 1, device=case.target.device)

    def call() -> torch.Tensor:
        return rejection_sample(
            case.draft_ids, case.draft_probs, case.target,
            uniforms=uniforms, logits=case.logits, implementation=implementation, **filters,
        )[1]  # fmt: skip

    return call


def bytes_needed(counts: torch.Tensor, vocabulary: int) -> int:
    """What no sampler can do without, with probabilities: one row of p, and one of q where a draft was rejected."""
    return 4 * vocabulary * (len(counts) + int((counts <= DRAFTS).sum()))


def measure_batches(device: torch.device, rounds: int, kernel: str = "cuda") -> list[dict[str, Any]]:
    """Seconds of a call, by implementation."""
    cells = []
    for batch, vocabulary in BATCHES:
        case = make_case(batch, vocabulary, device)
        call = sampler(case, kernel)
        peers: dict[str, Callable[[], object]] = {
            "loop": lambda case=case: rejection_sample_loop(case.draft_ids, case.draft_probs, case.target),
            "vectorized": sampler(case, "vectorized"),
            "kernel": call,
            "graph": as_graph(call, device),
        }
        seconds = take_turns(peers, device, rounds)
        cells.append(
            {"batch": batch, "vocabulary": vocabulary, **seconds, "ratio": seconds["loop"] / seconds["kernel"]}
        )
    return cells


def measure_bandwidth(device: torch.device, rounds: int, memory: float, kernel: str = "cuda") -> list[dict[str, Any]]:
    """Bytes a second of what must be read, from memory."""
    cells = []
    for batch, vocabulary in STREAMED:
        nbytes = 4 * batch * vocabulary * (2 * DRAFTS + 1)
        # Two rows of each case are read: as many cases as make that twice the cache.
        cases = 2 + 2 * last_level_cache(device) // (8 * batch * vocabulary)
        if cases * nbytes > memory * 1e9:
            print(
                f"batch {batch}, V {vocabulary:,}: left out, needs {cases * nbytes / 1e9:.1f} GB, --memory is {memory}"
            )
            continue
        calls = [sampler(make_case(batch, vocabulary, device, seed=seed), kernel) for seed in range(cases)]
        needed = sum(bytes_needed(call(), vocabulary) for call in calls)
        graph = as_graph(lambda calls=calls: [call() for call in calls][-1], device)
        seconds = take_turns({"kernel": graph}, device, rounds)["kernel"]
        cells.append(
            {"batch": batch, "vocabulary": vocabulary, "calls": cases, "seconds": seconds / cases,
             "bytes": needed / cases, "bytes_per_s": needed / seconds}
        )  # fmt: skip
    return cells


def measure_filters(device: torch.device, rounds: int, kernel: str = "cuda") -> list[dict[str, Any]]:
    """Seconds of a call with logits, by filter."""
    cells = []
    for batch, vocabulary in FILTERED:
        case = make_case(batch, vocabulary, device, logits=True)
        for name, filters in FILTERS.items():
            call = sampler(case, kernel, **filters)
            peers = {"vectorized": sampler(case, "vectorized", **filters), "graph": as_graph(call, device)}
            cells.append(
                {"batch": batch, "vocabulary": vocabulary, "filters": name, **take_turns(peers, device, rounds)}
            )
    return cells


def print_tables(
    batches: list[dict[str, Any]], streamed: list[dict[str, Any]], filtered: list[dict[str, Any]], bandwidth: float
) -> None:
    """Microseconds."""
    print(f"{'batch':>6}{'V':>9}{'loop':>13}{'vectorized':>13}{'kernel':>13}{'graph':>13}{'loop / kernel':>15}")
    for cell in batches:
        times = "".join(f"{1e6 * cell[name]:>13,.1f}" for name in ("loop", "vectorized", "kernel", "graph"))
        print(f"{cell['batch']:>6}{cell['vocabulary']:>9,}{times}{cell['ratio']:>14.1f}×")
    print(f"\n{'batch':>6}{'V':>9}{'calls':>7}{'µs a call':>11}{'MB':>8}{'GB/s':>8}{'copy':>7}")
    for cell in streamed:
        size = f"{1e6 * cell['seconds']:>11.1f}{cell['bytes'] / 1e6:>8.1f}"
        rate = f"{cell['bytes_per_s'] / 1e9:>8,.0f}{cell['bytes_per_s'] / bandwidth:>7.0%}"
        print(f"{cell['batch']:>6}{cell['vocabulary']:>9,}{cell['calls']:>7}{size}{rate}")
    print(f"\n{'batch':>6}{'V':>9}{'vectorized':>13}{'graph':>13}  filters")
    for cell in filtered:
        times = f"{1e6 * cell['vectorized']:>13,.1f}{1e6 * cell['graph']:>13,.1f}"
        print(f"{cell['batch']:>6}{cell['vocabulary']:>9,}{times}  {cell['filters']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="of which the median is taken")
    parser.add_argument("--memory", type=float, default=8.0, help="gigabytes that the inputs of a cell may take")
    options = parser.parse_args()
    device = find_gpu("gpu_rejection")
    if device is None:
        return 2
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(f"{describe(device)}; {DRAFTS} drafts, acceptance {ACCEPTANCE}")
    bandwidth = copy_bandwidth(device)
    print(f"copying {bandwidth / 1e9:,.0f} GB/s read and written")
    batches = measure_batches(device, options.rounds)
    streamed = measure_bandwidth(device, options.rounds, options.memory)
    filtered = measure_filters(device, options.rounds)
    print_tables(batches, streamed, filtered, bandwidth)
    document = {"gpu": describe(device), "copy_bytes_per_s": bandwidth, "batches": batches}
    print(json.dumps({**document, "bandwidth": streamed, "filters": filtered}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
