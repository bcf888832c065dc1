"""A lesson about something broken must fail: the product's functions are replaced by wrong ones, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.explain.lesson import LessonError
from halfbyte.explain.lessons import Options, explain
from halfbyte.formats.runs import split_bytes, word_bytes

Mutant = Callable[[Any], Any]


def backwards(_: Any) -> Any:
    return lambda runs, order: word_bytes(runs[..., ::-1], order)


def unpacked_backwards(_: Any) -> Any:
    def mutant(packed: Any, runs: Any, order: Any) -> None:
        split_bytes(packed[..., ::-1], runs, order)

    return mutant


def off_by_one(original: Any) -> Any:
    def mutant(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        codes = found.codes.clone()
        codes[-1, -1] ^= 1
        return replace(found, codes=codes)

    return mutant


def rounded_to_nearest(_: Any) -> Any:
    def mutant(weight: Any, gram: Any, ranges: Any, grid: Any, *, sweeps: int) -> Any:
        return grid.nearest(weight, ranges.scales, ranges.zeros)

    return mutant


def everything_stands(_: Any) -> Any:
    def mutant(ids: Any, draft: Any, target: Any, **options: Any) -> Any:
        tokens = torch.cat([ids, target[:, -1:].argmax(-1)], dim=1)
        return tokens, torch.full((len(ids),), tokens.shape[1])

    return mutant


def residual_forgotten(original: Any) -> Any:
    """At a rejection draws from p instead of what p has more than q."""

    def mutant(ids: Any, draft: Any, target: Any, **options: Any) -> Any:
        tokens, counts = original(ids, draft, target, **options)
        rows = torch.arange(len(ids))
        at = counts - 1
        drawn = torch.multinomial(target[rows, at], 1, generator=torch.Generator().manual_seed(0))[:, 0]
        return tokens.index_put((rows, at), drawn), counts

    return mutant


def always_the_longest(_: Any) -> Any:
    return lambda self, kinds, room: list(room)


def scaled_by_a_percent(original: Any) -> Any:
    return lambda *arguments: original(*arguments) * np.float32(1.01)


def natural_order(_: Any) -> Any:
    return (0, 1, 2, 3, 4, 5, 6, 7)


def held_twice(original: Any) -> Any:
    """The upper half of the lanes holds what the lower half does."""

    def mutant() -> Any:
        rows, columns = original()
        return rows[np.arange(32) % 16], columns[np.arange(32) % 16]

    return mutant


def registers_unrounded(original: Any) -> Any:
    def mutant(gpu: Any, threads: int, registers: int, shared: int) -> Any:
        return original(gpu, threads, registers // 8 * 8, shared // 2)

    return mutant


def worst_scales(original: Any) -> Any:
    def mutant(*arguments: Any) -> Any:
        found = original(*arguments)
        return replace(found, error=max(error for _, error in found.tried))

    return mutant


def wrong_gram(original: Any) -> Any:
    def mutant(*arguments: Any) -> Any:
        found = original(*arguments)
        found.statistics.gram[::2] *= 1.5
        return found

    return mutant


def other_codes(original: Any) -> Any:
    def mutant(*arguments: Any) -> Any:
        found = original(*arguments)
        return replace(found, codes=found.codes.flip(1), nearest=found.nearest.flip(1))

    return mutant


MUTANTS: list[tuple[str, str, Mutant]] = [
    ("packing", "halfbyte.explain.packing.word_bytes", backwards),
    ("packing", "halfbyte.explain.packing.split_bytes", unpacked_backwards),
    ("packing", "halfbyte.explain.packing.AWQ_ORDER", natural_order),
    ("packing", "halfbyte.explain.packing.NIBBLE_INPUT", natural_order),
    ("packing", "halfbyte.explain.packing.a8_bytes", scaled_by_a_percent),
    ("packing --verify", "halfbyte.quantization.grid.Grid.quantize", off_by_one),
    ("packing --verify", "halfbyte.formats.gemm.unpack", off_by_one),
    ("packing --verify", "halfbyte.formats.native.unpack", off_by_one),
    ("packing --verify", "halfbyte.formats.gptq.unpack", off_by_one),
    ("packing --verify", "halfbyte.formats.compressed_tensors.unpack", off_by_one),
    ("packing --verify", "halfbyte.formats.gemv_fast.unpack", off_by_one),
    ("packing", "halfbyte.explain.packing_others.word_bytes", backwards),
    ("packing", "halfbyte.explain.packing_others.split_bytes", unpacked_backwards),
    ("packing --verify", "halfbyte.kernels.w4a16.NativeLinear.__call__", scaled_by_a_percent),
    ("rounding", "halfbyte.explain.rounding.compensate", rounded_to_nearest),
    ("speculative", "halfbyte.explain.speculative.rejection_sample", everything_stands),
    ("speculative", "halfbyte.explain.speculative.rejection_sample", residual_forgotten),
    ("speculative", "halfbyte.generation.draft_length.DraftLength.plan", always_the_longest),
    ("kernel", "halfbyte.explain.cpu_layout.NIBBLE_INPUT", natural_order),
    ("kernel", "halfbyte.explain.kernel.core_product", scaled_by_a_percent),
    ("kernel", "halfbyte.explain.kernel.dot4", scaled_by_a_percent),
    ("kernel", "halfbyte.explain.tensor_core.word_bytes", backwards),
    ("kernel", "halfbyte.explain.tensor_core.fragment_b", held_twice),
    ("kernel", "halfbyte.explain.tensor_core.mma", scaled_by_a_percent),
    ("gpu", "halfbyte.explain.gpu.occupancy", registers_unrounded),
    ("awq", "halfbyte.explain.awq.search_scales", worst_scales),
    ("awq", "halfbyte.explain.awq.calibrate_layer", wrong_gram),
    ("awq", "halfbyte.explain.awq.choose_codes", other_codes),
]


@pytest.mark.parametrize(("lesson", "target", "mutant"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_function_is_noticed(
    lesson: str, target: str, mutant: Mutant, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, verify = lesson.partition(" ")
    options = Options(model=str(tiny_llama) if name == "awq" else None, verify=bool(verify), progress=False)
    explain(name, options)
    original = _find(target)
    monkeypatch.setattr(target, mutant(original))
    with pytest.raises(LessonError, match=rf"^explain {name}\.\w+: not so: "):
        explain(name, options)


def _find(target: str) -> Any:
    from pkgutil import resolve_name

    return resolve_name(target)
