from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.errors import CalibrationError, ConfigError
from halfbyte.generation import self_calibration
from halfbyte.generation.self_calibration import write_calibration_text
from halfbyte.quantization import pipeline

SIZES: dict[str, Any] = {"max_calib_samples": 3, "max_calib_seq_len": 32, "progress": False}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> halfbyte.Model:
    return halfbyte.load(tiny_llama, backend="transformers")


def test_a_model_writes_what_the_seed_decides(model: halfbyte.Model) -> None:
    first, again, other = (
        write_calibration_text(model, tokens=96, seed=seed, document_tokens=32, progress=False) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 3
    assert len(set(first)) == 3
    assert all(len(model.tokenizer(document)["input_ids"]) >= 32 for document in first)


def test_text_follows_the_distribution_of_the_model(model: halfbyte.Model) -> None:
    """The first free token after the opening, counted over many documents, against its probability."""
    start = model.tokenizer.eos_token_id
    rows = [
        row
        for seed in range(4)
        for row in self_calibration._write(model, [[start, -1]] * 500, 2, torch.Generator().manual_seed(seed), int)
    ]
    expected = torch.softmax(model.logits([start])[-1], dim=-1)
    found = torch.bincount(torch.tensor(rows)[:, 1], minlength=320) / len(rows)
    assert float((found - expected).abs().sum()) / 2 < 0.2  # total variation; about 0.14 for this many draws


def test_two_ends_in_a_row_end_a_document(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "stop_ids", frozenset(range(320)))
    rows = self_calibration._write(model, [[5, 6], [5, -1]], 10, torch.Generator().manual_seed(0), int)
    assert [len(row) for row in rows] == [2, 2]


def test_numbers_that_leave_nothing_are_refused(model: halfbyte.Model) -> None:
    with pytest.raises(CalibrationError, match="at least 1 token in documents of at least 16"):
        write_calibration_text(model, tokens=0, seed=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def test_quantize_with_text_of_its_own(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    report = halfbyte.quantize(tiny_llama, tmp_path / "out", calibration="self", **SIZES)
    assert report.calibration is not None
    assert report.calibration["source"] == "self"
    assert report.calibration["tokens"] == 3 * 32
    (kept,) = cache.iterdir()
    documents = json.loads(kept.read_text())["documents"]
    again = halfbyte.quantize(tiny_llama, tmp_path / "list", calibration=documents, **SIZES)
    assert again.calibration is not None
    assert again.calibration["sha256"] == report.calibration["sha256"]


def test_the_text_is_written_once(
    tiny_llama: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        self_calibration,
        "write_calibration_text",
        lambda *_, **request: calls.append(request) or ["The crow sat. " * 99],
    )
    options = {name: value for name, value in SIZES.items() if name != "progress"}
    for _ in range(2):
        assert self_calibration._kept_text(tiny_llama, options) == ["The crow sat. " * 99]
    assert [call["tokens"] for call in calls] == [96]
    next(cache.iterdir()).write_text("{ damaged")
    self_calibration._kept_text(tiny_llama, options)
    self_calibration._kept_text(tiny_llama, {**options, "seed": 1})
    assert [call["seed"] for call in calls] == [0, 0, 1]


def test_nothing_is_written_for_what_needs_no_text(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_calibration, "write_calibration_text", pytest.fail)
    halfbyte.quantize(tiny_llama, tmp_path / "out", halfbyte.QuantConfig(method="rtn"), calibration="self", **SIZES)
    with pytest.raises(halfbyte.HalfbyteError, match="exists"):
        halfbyte.quantize(tiny_llama, tmp_path / "out", calibration="self", **SIZES)


def test_a_budget_below_the_model_is_refused(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="memory_budget: to write its calibration text"):
        halfbyte.quantize(tiny_llama, tmp_path / "out", calibration="self", memory_budget=1000, **SIZES)


def test_the_public_signature_is_the_pipelines() -> None:
    assert inspect.signature(halfbyte.quantize) == inspect.signature(pipeline.quantize)
    assert halfbyte.quantize.__doc__ == pipeline.quantize.__doc__
