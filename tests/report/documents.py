"""Documents of other verbs, small and by hand."""

from __future__ import annotations

from typing import Any

from halfbyte.explain.lesson import Chart, Check, Drawing, Lesson, Series, Step, Table, Text, cells


def comparison() -> dict[str, Any]:
    """Of two models, the first with no speed and no interval."""
    first = {
        "label": "A", "name": "original", "engine": "decoder", "disk_bytes": 269_000_000, "compression": 1.0,
        "memory_bytes": 269_000_000, "load_seconds": 0.5, "perplexity": {"value": 26.17, "low": None, "high": None},
        "kl": None, "top1_agreement": None, "throughput": None,
    }  # fmt: skip
    second = {
        **first, "label": "B", "name": "original@awq", "disk_bytes": 113_900_000, "compression": 2.36,
        "perplexity": {"value": 30.26, "low": 28.0, "high": 32.5}, "kl": {"value": 0.1, "low": 0.08, "high": 0.12},
        "top1_agreement": 0.8,
        "throughput": {
            "prefill_tokens_per_second": 600.0, "decode_tokens_per_second": 150.0, "prompt_tokens": 128,
            "new_tokens": 33, "prefill_seconds": [0.2, 0.25], "decode_seconds": [0.2, 0.22],
        },
    }  # fmt: skip
    pair = {
        "first": "A", "second": "B", "verdict": "B has 15.63 % higher perplexity than A.", "kl": None, "prefill": None,
        "perplexity": {"value": 1.1563, "low": 1.1, "high": 1.2, "p_value": 0.0001}, "decode": {"value": 2.4},
    }  # fmt: skip
    return {
        "sides": [first, second], "pairs": [pair], "reference": "A", "provisional": True,
        "text": {"name": "text", "tokens": [31, 31], "windows": 2, "window": 32}, "manifest": {"threads": 2},
    }  # fmt: skip


def profile() -> dict[str, Any]:
    """Of two implementations at two batch sizes."""

    def row(implementation: str, bits: int, batch_size: int, seconds: float) -> dict[str, Any]:
        return {
            "layer": "block", "implementation": implementation, "bits": bits, "batch_size": batch_size,
            "seconds": seconds, "seconds_q25": 0.9 * seconds, "seconds_q75": 1.2 * seconds,
            "tokens_per_second": batch_size / seconds, "flops_per_second": 2e7 * batch_size / seconds,
            "bytes_per_second": 1e6 / seconds, "intensity": 2.0 * batch_size, "roofline_share": 0.6, "speedup": 2.0,
            "memory_saved": 0.7, "bandwidth": 2e10, "peak_flops": 2e11,
        }  # fmt: skip

    rows = [row("bf16", 16, 1, 2e-3), row("bf16", 16, 8, 3e-3), row("int4-a8", 4, 1, 6e-4), row("int4-a8", 4, 8, 1e-3)]
    return {"model": None, "model_dim": 2048, "machine": "a machine", "tier": "avx2", "threads": 2, "group_size": 128,
            "rows": rows}  # fmt: skip


def speculation() -> dict[str, Any]:
    """Counters of a draft."""
    return {
        "draft": "int4", "drafted": 40, "accepted": 30, "emitted": 40, "passes": 10, "proposed_at": [10, 10, 10, 10],
        "accepted_at": [10, 8, 7, 5], "draft_seconds": 0.5, "verify_seconds": 0.8, "sampler_seconds": 0.01,
    }  # fmt: skip


def lesson() -> dict[str, Any]:
    """A lesson with a block of every kind, as `Lesson.to_dict` gives it."""
    chart = Chart(
        "A curve", "x", "y", (0.0, 1.0, 2.0), (Series("one", (1.0, None, 2.0)), Series("two", (0.0, 1.0, 0.5)))
    )
    blocks = (
        Text("Two\n\nparagraphs."),
        Check("One is one."),
        Table("", ("head",), (cells("cell"),)),
        Drawing("Lines", (cells("a", "b"),)),
        chart,
    )
    return Lesson("made", "Made up", "Nothing is learned.", "en", (Step("only", "The only step", blocks),)).to_dict()
