"""What the fused decoder reaches, and what the machine would allow: steps, prompts, and one matrix at a time.

Times are medians over rounds, of which one more at the start warms up. Bandwidth and arithmetic peak, which they are
held against, are measured beside them with the same threads; what a step must read is counted, not estimated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from halfbyte.device.cpu import BandwidthProbe, native_threads, peak_flops, thread_count
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.generation.model import Model
from halfbyte.runtime.decoder import NativeDecoder

# Rows of activations that the matrices are multiplied with: decoding, and what speculation and small batches ask for.
KERNEL_ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class DecodeSpeed:
    """Steps that append one token to each sequence.

    Attributes:
        context: tokens in each sequence before the first step.
        batch: sequences.
        threads: that computed.
        steps: in a round.
        rounds: that the median is of.
        seconds_per_step: median.
        weight_bytes: of the layers' matrices, which a step reads once.
        head_bytes: of the output head.
        cache_bytes: keys and values a step in the middle of a round reads, of all sequences.
        bandwidth: bytes per second read from a buffer as large as all that a step reads, in turn with the rounds.
    """

    context: int
    batch: int
    threads: int
    steps: int
    rounds: int
    seconds_per_step: float
    weight_bytes: int
    head_bytes: int
    cache_bytes: int
    bandwidth: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds_per_step

    @property
    def bytes_per_token(self) -> float:
        """What is read for a token; sequences that step together share the weights."""
        return (self.weight_bytes + self.head_bytes + self.cache_bytes) / self.batch

    @property
    def bytes_per_second(self) -> float:
        """Read while a step runs."""
        return self.bytes_per_token * self.tokens_per_second

    @property
    def bandwidth_share(self) -> float:
        """1 where a step takes no longer than reading what it needs."""
        return self.bytes_per_second / self.bandwidth


@dataclass(frozen=True)
class PrefillSpeed:
    """Prompts from an empty cache to the logits of their last tokens.

    Attributes:
        context: tokens of a prompt.
        batch: prompts at a time.
        threads: that computed.
        rounds: that the median is of.
        seconds: median.
        flops: of the matrix products alone, two for each weight and token.
        peak_flops: fp32 multiply-adds per second the threads reach; 8-bit arithmetic can exceed it.
    """

    context: int
    batch: int
    threads: int
    rounds: int
    seconds: float
    flops: float
    peak_flops: float

    @property
    def tokens_per_second(self) -> float:
        """Of all prompts together."""
        return self.context * self.batch / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Of the matrix products."""
        return self.flops / self.seconds

    @property
    def peak_share(self) -> float:
        """Of the fp32 peak."""
        return self.flops_per_second / self.peak_flops


@dataclass(frozen=True)
class KernelSpeed:
    """All matrices of one shape and width, one after the other as a step meets them, with some rows of activations.

    Attributes:
        out_features: of each matrix.
        in_features: of each matrix.
        form: how the decoder holds them, such as a8/9: 8-bit activations, nine groups.
        matrices: how many of them the model has.
        rows: of activations.
        threads: that computed.
        rounds: that the median is of.
        seconds: median, for one matrix.
        nbytes: of one matrix.
        ratio: to the time with one row.
        bandwidth: bytes per second read from a buffer of the size of all of them, in turn with the rounds.
    """

    out_features: int
    in_features: int
    form: str
    matrices: int
    rows: int
    threads: int
    rounds: int
    seconds: float
    nbytes: int
    ratio: float
    bandwidth: float

    @property
    def bytes_per_second(self) -> float:
        """Of weights."""
        return self.nbytes / self.seconds

    @property
    def bandwidth_share(self) -> float:
        """1 where a product takes no longer than reading its weights."""
        return self.bytes_per_second / self.bandwidth


def measure_decode(
    model: Model, *, context: int = 0, batch: int = 1, threads: int | None = None, steps: int = 16, rounds: int = 5
) -> DecodeSpeed:
    """Time steps of the fused decoder behind a context, which is filled beforehand and restored after each round.

    Args:
        model: loaded, and run by the fused decoder.
        context: tokens in each sequence before the first step.
        batch: sequences.
        threads: to compute with; `thread_count` if None.
        steps: in a round.
        rounds: to take the median of.

    Raises:
        ConfigError: a number too small.
        UnsupportedError: another engine runs the model.
    """
    decoder = native_decoder(model)
    check_numbers(context=(context, 0), batch=(batch, 1), steps=(steps, 1), rounds=(rounds, 1))
    threads = thread_count() if threads is None else threads
    cache = decoder.new_cache(batch, context + steps)
    ids = random_ids(decoder, batch, context + steps)
    cache_bytes = batch * decoder.cache_bytes(context + (steps + 1) // 2)
    probe = BandwidthProbe(decoder.step_bytes + cache_bytes)
    with native_threads(threads):
        if context:
            decoder.step(cache, [row[:context] for row in ids], logits="none")

        def run() -> None:
            for position in range(context, context + steps):
                decoder.step(cache, [[row[position]] for row in ids])

        def restore() -> None:
            for sequence in range(batch):
                cache.rollback(sequence, steps)
            probe.take()
            decoder.step(cache, [row[context : context + 1] for row in ids])  # brings the weights back
            for sequence in range(batch):
                cache.rollback(sequence, 1)

        seconds = _median_seconds(run, rounds, afterwards=restore) / steps
    head = decoder.matrices["lm_head"].nbytes
    return DecodeSpeed(
        context=context,
        batch=batch,
        threads=threads,
        steps=steps,
        rounds=rounds,
        seconds_per_step=seconds,
        weight_bytes=decoder.step_bytes - head,
        head_bytes=head,
        cache_bytes=cache_bytes,
        bandwidth=probe.bandwidth,
    )


def measure_prefill(
    model: Model, *, context: int = 512, batch: int = 1, threads: int | None = None, rounds: int = 5
) -> PrefillSpeed:
    """Time prompts in the fused decoder.

    Args:
        model: loaded, and run by the fused decoder.
        context: tokens of a prompt.
        batch: prompts at a time.
        threads: to compute with; `thread_count` if None.
        rounds: to take the median of.

    Raises:
        ConfigError: a number too small.
        UnsupportedError: another engine runs the model.
    """
    decoder = native_decoder(model)
    check_numbers(context=(context, 1), batch=(batch, 1), rounds=(rounds, 1))
    threads = thread_count() if threads is None else threads
    cache = decoder.new_cache(batch, context)
    ids = random_ids(decoder, batch, context)

    def forget() -> None:
        for sequence in range(batch):
            cache.rollback(sequence, context)

    with native_threads(threads):
        seconds = _median_seconds(lambda: decoder.step(cache, ids), rounds, afterwards=forget)
    head = decoder.matrices["lm_head"]
    weights = sum(linear.rows * linear.columns for linear in decoder.matrices.values()) - head.rows * head.columns
    return PrefillSpeed(
        context=context,
        batch=batch,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        flops=2.0 * batch * (context * weights + head.rows * head.columns),
        peak_flops=peak_flops(threads=threads),
    )


def measure_kernels(
    model: Model, *, rows: Sequence[int] = KERNEL_ROWS, threads: int | None = None, rounds: int = 15
) -> list[KernelSpeed]:
    """Time the matrices of a model by shape.

    All of one shape are gone through in order, so that caches hold no more of them than in a step.

    Args:
        model: loaded, and run by the fused decoder.
        rows: how many rows of activations, 1 first; each is measured in turn in every round.
        threads: to compute with; `thread_count` if None.
        rounds: to take the median of.

    Raises:
        ConfigError: a number too small, or rows that do not begin with 1.
        UnsupportedError: another engine runs the model.
    """
    from halfbyte import _native

    decoder = native_decoder(model)
    check_numbers(rounds=(rounds, 1), rows=(min(rows, default=0), 1))
    if rows[0] != 1:
        raise ConfigError(f"rows: expected 1 first, which the others are compared with, got {rows[0]}")
    threads = thread_count() if threads is None else threads
    kinds: dict[tuple[int, int, str, int], list[_native.Linear]] = {}
    for linear in decoder.matrices.values():
        form = linear.form if linear.form.startswith("a8") else linear.form.partition("/")[0]
        kinds.setdefault((linear.rows, linear.columns, form, linear.nbytes), []).append(linear)
    results = []
    with native_threads(threads):
        for (outputs, inputs, form, nbytes), linears in kinds.items():
            arrays = {m: (torch.randn(m, inputs).numpy(), torch.empty(m, outputs).numpy()) for m in rows}
            times: dict[int, list[float]] = {m: [] for m in rows}
            probe = BandwidthProbe(len(linears) * nbytes)
            for _ in range(rounds + 1):
                probe.take()
                _native.multiply_each(linears, *arrays[1])  # brings the weights back
                for m, (x, y) in arrays.items():
                    start = time.perf_counter()
                    _native.multiply_each(linears, x, y)
                    times[m].append((time.perf_counter() - start) / len(linears))
            medians = {m: statistics.median(taken[1:]) for m, taken in times.items()}
            results += [
                KernelSpeed(
                    out_features=outputs,
                    in_features=inputs,
                    form=form,
                    matrices=len(linears),
                    rows=m,
                    threads=threads,
                    rounds=rounds,
                    seconds=seconds,
                    nbytes=nbytes,
                    ratio=seconds / medians[1],
                    bandwidth=probe.bandwidth,
                )
                for m, seconds in medians.items()
            ]
    return results


def native_decoder(model: Model) -> NativeDecoder:
    """The fused decoder of a model.

    Raises:
        UnsupportedError: another engine runs it.
    """
    if not isinstance(model.engine, NativeDecoder):
        raise UnsupportedError(
            f"{model.folder}: bench measures the CPU's fused decoder, which does not run it: "
            f"{model.not_fused or f'it is on {model.device}'}; use `halfbyte eval`"
        )
    return model.engine


def check_numbers(**numbers: tuple[int, int]) -> None:
    """Refuse a number below its least: name = (value, least).

    Raises:
        ConfigError: for the first.
    """
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")


def random_ids(decoder: NativeDecoder, sequences: int, tokens: int) -> list[list[int]]:
    """Pseudo-random prompts: speed does not depend on which tokens they are."""
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(decoder.vocabulary, (sequences, tokens), generator=generator).tolist()
    return ids


def _median_seconds(call: Callable[[], object], rounds: int, *, afterwards: Callable[[], None]) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        afterwards()
    return statistics.median(times[1:])
