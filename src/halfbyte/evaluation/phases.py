"""Where the time of one token goes in the fused decoder, part by part, beside what each part must read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from halfbyte.device.cpu import BandwidthProbe, native_threads, thread_count
from halfbyte.evaluation.bench import check_numbers, native_decoder, random_ids
from halfbyte.generation.model import Model
from halfbyte.runtime.decoder import NativeDecoder


@dataclass(frozen=True)
class PhaseSpeed:
    """One part of a step, summed over the layers.

    Attributes:
        phase: the native core's name for it (native/cpu/step_profile.hpp); *_input is what every thread prepares before
            a product: the norm, the activation, the quantization.
        context: tokens in each sequence before the step.
        batch: sequences.
        threads: that computed.
        steps: that the median is of.
        seconds: median, of the thread that called; its waiting for the others is in it.
        whole_seconds: median of the whole step.
        nbytes: weights, or keys and values, that the part reads.
        bandwidth: bytes per second read from a buffer as large as all that a step reads, in turn with the steps.
    """

    phase: str
    context: int
    batch: int
    threads: int
    steps: int
    seconds: float
    whole_seconds: float
    nbytes: int
    bandwidth: float

    @property
    def floor_seconds(self) -> float:
        """What reading its bytes takes."""
        return self.nbytes / self.bandwidth


def measure_phases(
    model: Model, *, context: int = 512, batch: int = 1, threads: int | None = None, steps: int = 64
) -> list[PhaseSpeed]:
    """Time the parts of steps that append one token to each sequence, always at the same place.

    Args:
        model: loaded, and run by the fused decoder.
        context: tokens in each sequence before the step.
        batch: sequences.
        threads: to compute with; `thread_count` if None.
        steps: to take the median of; four more warm up.

    Returns:
        The parts in their order, then "whole step", whose median is of its own.

    Raises:
        ConfigError: a number too small.
        UnsupportedError: another engine runs the model.
    """
    from halfbyte import _native

    decoder = native_decoder(model)
    check_numbers(context=(context, 0), batch=(batch, 1), steps=(steps, 1))
    threads = thread_count() if threads is None else threads
    cache = decoder.new_cache(batch, context + 1)
    ids = random_ids(decoder, batch, context + 1)
    nbytes = _bytes_by_phase(decoder)
    nbytes["attention"] = batch * decoder.cache_bytes(context + 1)
    nbytes["whole step"] = sum(nbytes.values())
    probe = BandwidthProbe(nbytes["whole step"])
    taken: dict[str, list[float]] = {}
    with native_threads(threads):
        if context:
            decoder.step(cache, [row[:context] for row in ids], logits="none")
        for number in range(steps + 4):
            if number % 8 == 0:
                probe.take()
                decoder.step(cache, [row[context:] for row in ids])  # brings the weights back
                for sequence in range(batch):
                    cache.rollback(sequence, 1)
            profile = _native.StepProfile()
            decoder.step(cache, [row[context:] for row in ids], profile=profile)
            for sequence in range(batch):
                cache.rollback(sequence, 1)
            if number >= 4:
                parts = profile.seconds
                for name, seconds in {**parts, "whole step": sum(parts.values())}.items():
                    taken.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    whole = medians["whole step"]
    return [
        PhaseSpeed(name, context, batch, threads, steps, seconds, whole, nbytes.get(name, 0), probe.bandwidth)
        for name, seconds in medians.items()
    ]


def _bytes_by_phase(decoder: NativeDecoder) -> dict[str, int]:
    family = decoder.record.family
    totals = {"qkv": 0, "output": 0, "gate_up": 0, "down": 0, "head": 0}
    for name, linear in decoder.matrices.items():
        if name == "lm_head":
            phase = "head"
        elif name.endswith(tuple(f".{part}" for part in family.qkv)):
            phase = "qkv"
        elif name.endswith(tuple(f".{part}" for part in family.gate_up)):
            phase = "gate_up"
        else:
            phase = "output" if name.endswith(".o_proj") else "down"
        totals[phase] += linear.nbytes
    return totals
