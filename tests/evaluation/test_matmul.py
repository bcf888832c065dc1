"""Matrix products that are timed; their speed is nobody's business here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluation import matmul
from halfbyte.evaluation.matmul import benchmark_matmul


def test_every_kind_is_held_against_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "measured_peak", lambda kind: {"fp32": 1e12, "bf16": None}[kind])
    found = benchmark_matmul(sizes=[64, 128, 64], device="cpu", threads=1, rounds=3)
    assert [(row.size, row.kind) for row in found.rows] == [
        (size, kind) for size in (64, 128) for kind in ("fp32", "fp16", "bf16", "int4")
    ]
    for row in found.rows:
        assert row.seconds_q25 <= row.seconds <= row.seconds_q75
        assert row.flops == pytest.approx(2 * row.size**3 / row.seconds)
        assert (row.share, row.rounds, row.peak_kind) == (pytest.approx(row.flops / 1e12), 3, "fp32 multiply-adds")
    assert (found.rows[3].implementation, found.threads, torch.get_num_threads() >= 1) == ("native kernel", 1, True)
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["share"] == found.rows[0].share
    columns, rows = found.table()
    assert {len(row) for row in rows} == {len(columns)}


def test_bf16_is_held_against_its_own_peak_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "measured_peak", lambda kind: {"fp32": 1e12, "bf16": 4e12}[kind])
    kinds = {row.kind: (row.peak, row.peak_kind) for row in benchmark_matmul(sizes=[64], device="cpu", rounds=3).rows}
    assert kinds["bf16"] == (4e12, "bf16 multiply-adds")
    assert kinds["int4"] == (1e12, "fp32 multiply-adds")


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "measured_peak", lambda kind: 1e12)
    slow = {"fp16": 2.0, "bf16": 0.1}

    def timed(call: Any, device: torch.device) -> float:
        kind = next(name for name, dtype in matmul._DTYPES.items() if call.args[0].dtype == dtype)
        return slow.get(kind, 0.01)

    monkeypatch.setattr(matmul, "timed", timed)
    found = benchmark_matmul(sizes=[64, 128], device="cpu", threads=1, rounds=3, seconds=3.0)
    assert [row.kind for row in found.rows if row.size == 128] == ["fp32", "bf16", "int4"]
    assert found.skipped == ("fp16 at 128: one product would take about 16 s (2 at 64)",)


def test_all_are_held_against_the_best_peak_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rising = iter(range(1, 1000))
    monkeypatch.setattr(matmul, "measured_peak", lambda kind: 1e12 * next(rising))
    found = benchmark_matmul(sizes=[64, 128], device="cpu", threads=1, rounds=3)
    assert len({row.peak for row in found.rows if row.peak_kind == "fp32 multiply-adds"}) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sizes": [100]}, "sizes: expected multiples of 64 up to 32,768, got 100"),
        ({"sizes": [65536]}, "got 65536"),
        ({"sizes": []}, "sizes: expected at least one"),
        ({"rounds": 2}, "rounds: expected at least 3, got 2"),
        ({"device": "cuda:99"}, "device cuda:99"),
    ],
)
def test_what_cannot_be_timed_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        benchmark_matmul(**settings)  # type: ignore[arg-type]
