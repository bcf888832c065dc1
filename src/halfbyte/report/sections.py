"""What a report shows of documents the other verbs write: comparisons, profiles, drafts. They may be anybody's files.

Each function takes the document as `to_dict` or `--json` gives it and keeps what the page needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from halfbyte.errors import ConfigError

Document = Mapping[str, Any]
# Title and unit, which way is better, a side → its number, its interval.
Metric = tuple[str, str, str, Callable[[Document], Any], Callable[[Document], Any]]


@contextmanager
def _of(verb: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"report: expected what `halfbyte {verb}` writes, got something else ({what})") from None


def comparison_section(document: Document) -> dict[str, Any]:
    """A table of numbers, the interval of each, and the verdicts.

    Args:
        document: `Comparison.to_dict`.

    Raises:
        ConfigError: it is something else.
    """
    with _of("compare --output-json FILE"):
        sides = [dict(side) for side in document["sides"]]
        labels = [_text(side["label"]) for side in sides]
        reference = _text(document["reference"])
        columns = []
        for title, unit, better, value, spread in _metrics(reference):
            values = [_number(value(side)) for side in sides]
            if any(number is not None for number in values):
                spreads = [_interval(spread(side)) for side in sides]
                columns.append({"title": title, "unit": unit, "better": better, "values": values, "spreads": spreads})
        text = document["text"]
        return {
            "labels": labels,
            "names": [_text(side["name"]) for side in sides],
            "engines": [_text(side.get("engine") or "") for side in sides],
            "columns": columns,
            "verdicts": [_text(pair["verdict"]) for pair in document["pairs"]],
            "pairs": [_pair(pair) for pair in document["pairs"]],
            "reference": reference,
            "provisional": bool(document["provisional"]),
            "text": {
                "name": _text(text["name"]), "tokens": sum(map(int, text["tokens"])),
                "windows": int(text["windows"]), "window": int(text["window"]),
            },
            "manifest": dict(document["manifest"]),
        }  # fmt: skip


def _metrics(reference: str) -> list[Metric]:
    def nothing(side: Document) -> None:
        return None

    def scaled(name: str, factor: float) -> Callable[[Document], Any]:
        return lambda side: None if side.get(name) is None else side[name] * factor

    def estimate(name: str) -> Callable[[Document], Any]:
        return lambda side: (side.get(name) or {}).get("value")

    def ends(name: str) -> Callable[[Document], Any]:
        return lambda side: [(side.get(name) or {}).get(end) for end in ("low", "high")]

    def speed(name: str) -> Callable[[Document], Any]:
        return lambda side: (side.get("throughput") or {}).get(f"{name}_tokens_per_second")

    def rounds(name: str) -> Callable[[Document], Any]:
        def of(side: Document) -> list[float] | None:
            found = side.get("throughput")
            if not found or not found[f"{name}_seconds"]:
                return None
            tokens = found["prompt_tokens"] if name == "prefill" else found["new_tokens"] - 1
            return [tokens / max(found[f"{name}_seconds"]), tokens / min(found[f"{name}_seconds"])]

        return of

    return [
        ("on disk", "MB", "lower", scaled("disk_bytes", 1e-6), nothing),
        ("compression", "×", "higher", scaled("compression", 1), nothing),
        ("in memory", "MB", "lower", scaled("memory_bytes", 1e-6), nothing),
        ("load time", "s", "lower", scaled("load_seconds", 1), nothing),
        ("perplexity", "", "lower", estimate("perplexity"), ends("perplexity")),
        (f"KL divergence to {reference}", "nats", "lower", estimate("kl"), ends("kl")),
        (f"top-1 agreement with {reference}", "%", "higher", scaled("top1_agreement", 100), nothing),
        ("prefill", "tok/s", "higher", speed("prefill"), rounds("prefill")),
        ("decode", "tok/s", "higher", speed("decode"), rounds("decode")),
    ]


def _pair(pair: Document) -> dict[str, Any]:
    ratio = pair["perplexity"]
    return {
        "pair": f"{_text(pair['second'])} to {_text(pair['first'])}",
        "perplexity": _number(ratio["value"]),
        "interval": _interval([ratio.get("low"), ratio.get("high")]),
        "p_value": _number(ratio.get("p_value")),
        "kl": _number((pair.get("kl") or {}).get("value")),
        "prefill": _number((pair.get("prefill") or {}).get("value")),
        "decode": _number((pair.get("decode") or {}).get("value")),
    }


def profile_section(document: Document) -> dict[str, Any]:
    """The rows of a decoder block.

    Args:
        document: `Profile.to_dict`.

    Raises:
        ConfigError: it is something else.
    """
    numbers = (
        "batch_size", "bits", "seconds", "seconds_q25", "seconds_q75", "tokens_per_second", "flops_per_second",
        "bytes_per_second", "intensity", "roofline_share", "speedup", "memory_saved", "bandwidth", "peak_flops",
    )  # fmt: skip
    with _of("profile --json"):
        block = [row for row in document["rows"] if row["layer"] == "block"]
        rows = [
            {"implementation": _text(row["implementation"]), **{name: _needed(row[name]) for name in numbers}}
            for row in block
        ]
        if not rows:
            raise ValueError("no rows of a block")
        subject = document["model"] or f"width {int(document['model_dim']):,}"
        threads = document["threads"]
        where = [document["machine"], document.get("tier"), f"{int(threads)} threads" if threads else None]
        return {
            "subject": _text(subject),
            "machine": ", ".join(_text(part) for part in where if part),
            "group_size": int(document["group_size"]),
            "on_cpu": threads is not None,
            "rows": rows,
        }


def speculation_section(documents: Mapping[str, Document]) -> list[dict[str, Any]]:
    """What came of drafts.

    Args:
        documents: what it is called → counters of a `Speculation`, or what `halfbyte generate --draft D --json` prints.

    Raises:
        ConfigError: one is something else.
    """
    found = []
    with _of("generate --draft DRAFT --json"):
        for name, document in documents.items():
            counters = document.get("speculation") or document
            proposed, accepted = list(map(int, counters["proposed_at"])), list(map(int, counters["accepted_at"]))
            found.append(
                {
                    "name": name,
                    "draft": _text(counters["draft"]),
                    "drafted": int(counters["drafted"]),
                    "accepted": int(counters["accepted"]),
                    "emitted": int(counters["emitted"]),
                    "passes": int(counters["passes"]),
                    "proposed_at": proposed,
                    "by_position": [a / p for a, p in zip(accepted, proposed, strict=True) if p],
                    "seconds": {s: _needed(counters[f"{s}_seconds"]) for s in ("draft", "verify", "sampler")},
                }
            )
    return found


def lessons_section(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Lessons, each with at least one step.

    Args:
        documents: `Lesson.to_dict` of the room `explain`, or what `halfbyte explain LESSON --json` prints.

    Raises:
        ConfigError: one is something else.
    """
    found = []
    with _of("explain LESSON --json"):
        for document in documents:
            steps = [{"heading": _text(step["heading"]), "blocks": list(map(_block, step["blocks"]))}
                     for step in document["steps"]]  # fmt: skip
            named = {name: _text(document[name]) for name in ("lesson", "title", "summary", "language")}
            found.append({**named, "steps": steps})
    return found


def _block(block: Document) -> Document:
    """As it is, if the page can draw it."""
    needed = {
        "text": ("text",), "check": ("statement",), "table": ("caption", "columns", "rows"),
        "drawing": ("caption", "lines"), "chart": ("caption", "x_label", "y_label", "x", "series"),
    }[block["kind"]]  # fmt: skip
    return {"kind": block["kind"], **{name: block[name] for name in needed}}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.60}")
    return value


def _number(value: Any) -> float | None:
    """None for what was not measured, and for what is no finite number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r:.60}")
    return float(value) if math.isfinite(value) else None


def _needed(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise TypeError(f"expected a finite number, got {value!r:.60}")
    return number


def _interval(ends: Sequence[Any] | None) -> list[float] | None:
    if ends is None:
        return None
    low, high = map(_number, ends)
    return None if low is None or high is None else [low, high]
