"""`Comparison`: what `compare` found, as data, in words and as a table."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from halfbyte.evaluation.bootstrap import Estimate, bootstrap_mean
from halfbyte.evaluation.throughput import Throughput
from halfbyte.notebook import html_table

SIGNIFICANT = 0.05
# Ratios of speeds nearer to 1 are told in per cent.
NEARLY = 1.25
# Where rounds disagree about who is faster, by no more than this both are about as fast; by more nothing can be said.
ABOUT = 1.2
# Sizes that differ by less are not worth a word.
SAME_SIZE = 0.01


@dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Attributes:
        label: A, B, … in the order they were given.
        name: as it was given.
        folder: where its files are.
        quantized: whether its linears are.
        measured: False for what `skip_original` left out: only `disk_bytes` and `compression` are known then.
        disk_bytes: of all its tensors on disk; None for what is quantized while it is loaded.
        compression: `disk_bytes` of the first model over this one's.
        quantization: the checkpoint's own account: its manifest's config and calibration, or `quantization_config`.
        memory_bytes: of the weights as held to run.
        load_seconds: from the folder to a model that can run, once, code imported before; files may be cached.
        engine: what runs it.
        not_fused: why the fused decoder does not; None if it does.
        kernels: kernel or native form → number of quantized linears.
        window_nll: mean loss of each window, nats.
        window_kl: mean KL divergence to the reference of each window, nats; empty of the reference.
        window_agreement: share of positions with the reference's most likely token, likewise.
        perplexity: over all windows.
        kl: mean over all tokens, nats; None of the reference.
        top1_agreement: the share over all tokens; None of the reference.
        throughput: None where speed was not measured.
    """

    label: str
    name: str
    folder: Path
    quantized: bool
    measured: bool
    disk_bytes: int | None
    compression: float | None
    quantization: dict[str, Any] | None
    memory_bytes: int | None = None
    load_seconds: float | None = None
    engine: str | None = None
    not_fused: str | None = None
    kernels: dict[str, int] | None = None
    window_nll: tuple[float, ...] = ()
    window_kl: tuple[float, ...] = ()
    window_agreement: tuple[float, ...] = ()
    perplexity: Estimate | None = None
    kl: Estimate | None = None
    top1_agreement: float | None = None
    throughput: Throughput | None = None


@dataclass(frozen=True)
class SpeedRatio:
    """The second model's speed over the first one's.

    Attributes:
        value: ratio of the medians.
        low: least ratio of a round, in which both ran one after the other.
        high: largest.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> SpeedRatio:
        """From the seconds of every round."""
        rounds = [a / b for a, b in zip(first, second, strict=True)]
        return cls(statistics.median(first) / statistics.median(second), min(rounds), max(rounds))

    @property
    def clear(self) -> bool:
        """Whether the same one was faster in every round, and there were some."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Pair:
    """Two models side by side.

    Attributes:
        first: label.
        second: label.
        perplexity: the second's over the first's, paired by window; its p-value is of their being equal.
        kl: the second's divergence to the reference less the first's, nats, paired; None where one is the reference.
        prefill: speeds; None where they were not measured.
        decode: likewise.
        verdict: all this in a sentence.
    """

    first: str
    second: str
    perplexity: Estimate
    kl: Estimate | None
    prefill: SpeedRatio | None
    decode: SpeedRatio | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The result of `halfbyte.compare`.

    Attributes:
        sides: the models, in the order they were given.
        pairs: every two of those that were measured.
        reference: label of the model that divergence and agreement are of: the first that was measured.
        provisional: whether it was a quick one.
        calibration: blocks and tokens a block at most for what was quantized on the fly; None if nothing was.
        text: name, sha256 and characters of the text; windows, tokens a window at most, predicted tokens of each.
        manifest: versions, machine, threads, seed and number of resamples.
        seconds: it took, with all it had to quantize.
    """

    sides: tuple[Side, ...]
    pairs: tuple[Pair, ...]
    reference: str
    provisional: bool
    calibration: dict[str, int] | None
    text: dict[str, Any]
    manifest: dict[str, Any]
    seconds: float

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each pair."""
        return [pair.verdict for pair in self.pairs]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sides = [{**asdict(side), "folder": str(side.folder)} for side in self.sides]
        return {**asdict(self), "sides": sides, "verdicts": self.verdicts}

    def __str__(self) -> str:
        names = [f"{side.label}: {side.name}" for side in self.sides]
        return "\n".join([*names, *self.verdicts])

    def _repr_html_(self) -> str:
        """A table for notebooks, and the verdicts below it."""
        notes = [*(["Provisional: a quick comparison."] if self.provisional else []), *self.verdicts]
        listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        return f"{html_table(*table(self))}<ul>{listed}</ul>"


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows with units, a row for each model; what was not measured is a dash."""
    reference = comparison.reference
    columns: dict[str, Callable[[Side], str]] = {
        "": lambda side: side.label,
        "model": lambda side: side.name,
        "on disk": lambda side: _megabytes(side.disk_bytes),
        "smaller": lambda side: _form(side.compression, "{:.2f} ×"),
        "in memory": lambda side: _megabytes(side.memory_bytes),
        "load": lambda side: _form(side.load_seconds, "{:.2f} s"),
        "perplexity": lambda side: _form(_value(side.perplexity), "{:.3f}"),
        "95 % interval": lambda side: interval(side.perplexity),
        f"KL to {reference}, nats": lambda side: _form(_value(side.kl), "{:.4f}"),
        f"top-1 as {reference}": lambda side: _percent(side.top1_agreement),
        "prefill": lambda side: _speed(side.throughput, "prefill_tokens_per_second"),
        "decode": lambda side: _speed(side.throughput, "decode_tokens_per_second"),
    }
    return list(columns), [[cell(side) for cell in columns.values()] for side in comparison.sides]


def interval(estimate: Estimate | None) -> str:
    """Its ends, or a dash."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return "–"
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def pair_up(sides: Sequence[Side], tokens: Sequence[int], *, reference: str, seed: int) -> tuple[Pair, ...]:
    """Every two of the measured sides, the earlier one first.

    Args:
        sides: of one comparison.
        tokens: predicted in each window.
        reference: label of the model that divergences are to.
        seed: of the bootstrap.
    """
    pairs = []
    for first, second in combinations([side for side in sides if side.measured], 2):
        losses = [b - a for a, b in zip(first.window_nll, second.window_nll, strict=True)]
        perplexity = bootstrap_mean(losses, tokens, test=True, seed=seed).exp()
        kl, prefill, decode = None, None, None
        if first.window_kl and second.window_kl:
            gaps = [b - a for a, b in zip(first.window_kl, second.window_kl, strict=True)]
            kl = bootstrap_mean(gaps, tokens, test=True, seed=seed)
        if first.throughput and second.throughput:
            prefill = SpeedRatio.of(first.throughput.prefill_seconds, second.throughput.prefill_seconds)
            decode = SpeedRatio.of(first.throughput.decode_seconds, second.throughput.decode_seconds)
        parts = [
            _perplexity_words(first.label, second.label, perplexity),
            _kl_words(kl, first, reference),
            _speed_words(prefill, decode),
            _size_words(first, second),
        ]
        verdict = "; it ".join(filter(None, parts)) + "."
        pairs.append(Pair(first.label, second.label, perplexity, kl, prefill, decode, verdict))
    return tuple(pairs)


def _perplexity_words(first: str, second: str, ratio: Estimate) -> str:
    change = ratio.value - 1
    if ratio.low is None or ratio.high is None or ratio.p_value is None:
        return f"{second} has {_more(change)} perplexity than {first}, over too few windows for a test"
    if ratio.low == ratio.high == 1:
        return f"{second} has the same perplexity as {first}"
    evidence = f"95 %: {100 * (ratio.low - 1):+.2f} to {100 * (ratio.high - 1):+.2f} %, {p_words(ratio.p_value)}"
    if ratio.p_value < SIGNIFICANT:
        return f"{second} has {_more(change)} perplexity than {first} ({evidence})"
    return f"{second} has a perplexity that cannot be told from that of {first} ({evidence})"


def _kl_words(gap: Estimate | None, first: Side, reference: str) -> str:
    if gap is None or gap.p_value is None or gap.p_value >= SIGNIFICANT or first.kl is None or not first.kl.value:
        return ""
    where = f"stays closer to {reference}" if gap.value < 0 else f"departs further from {reference}"
    return f"{where} (KL divergence {_more(gap.value / first.kl.value)}, {p_words(gap.p_value)})"


def _speed_words(prefill: SpeedRatio | None, decode: SpeedRatio | None) -> str:
    if prefill is None or decode is None:
        return ""
    return f"{_faster('decodes', decode)} and {_faster('prefills', prefill)}"


def _faster(does: str, ratio: SpeedRatio) -> str:
    if not ratio.clear:
        rounds = f"({ratio.low:.2f} to {ratio.high:.2f} times, round by round)"
        if ratio.low > 1 / ABOUT and ratio.high < ABOUT:
            return f"{does} about as fast {rounds}"
        return f"{does} at a speed that this run cannot tell apart {rounds}"
    if 1 / NEARLY < ratio.value < NEARLY:
        return f"{does} {100 * abs(ratio.value - 1):.1f} % {'faster' if ratio.value > 1 else 'slower'}"
    return f"{does} {ratio.value:.2f} times as fast"


def _size_words(first: Side, second: Side) -> str:
    if not first.disk_bytes or not second.disk_bytes:
        return ""
    share = second.disk_bytes / first.disk_bytes
    if abs(share - 1) < SAME_SIZE:
        return ""
    return f"is {1 / share:.2f} times smaller on disk" if share < 1 else f"takes {share:.2f} times the space on disk"


def _more(change: float) -> str:
    return f"{100 * abs(change):.2f} % {'higher' if change > 0 else 'lower'}"


def p_words(p_value: float) -> str:
    """As papers have it."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _form(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _megabytes(nbytes: int | None) -> str:
    return _form(None if nbytes is None else nbytes / 1e6, "{:,.1f} MB")


def _percent(share: float | None) -> str:
    return _form(None if share is None else 100 * share, "{:.1f} %")


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _speed(throughput: Throughput | None, which: str) -> str:
    return _form(None if throughput is None else getattr(throughput, which), "{:,.1f} tok/s")
