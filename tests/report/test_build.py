"""What a report is made of."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from halfbyte.analysis.layers import layer_errors
from halfbyte.analysis.pair import Pair
from halfbyte.analysis.weights import weight_distribution
from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.quantization.grid import Grid
from halfbyte.report import Report, build_report
from halfbyte.report.examined import search_curve
from halfbyte.report.figures import write_figures, write_tables
from halfbyte.report.html_report import embed, rounded
from tests.conftest import TEXT
from tests.report import documents

QUICK: dict[str, Any] = {"calibration": [TEXT], "n_samples": 2, "progress": False}
HOSTILE = "</script><script>alert(1)</script>\u2028\ud800 & \"'<img src=x onerror=alert(1)>@@DATA@@"


@pytest.fixture(scope="module")
def report(quantized_llama: Path) -> Report:
    return build_report(
        quantized_llama,
        comparison=documents.comparison(),
        profile=documents.profile(),
        speculation={"run": documents.speculation()},
        **QUICK,
    )


def test_every_number_of_a_linear_is_that_of_the_analysis(report: Report, quantized_llama: Path) -> None:
    (model,) = report.data["models"]
    expected = layer_errors(quantized_llama, calibration=[TEXT], n_samples=2, progress=False)
    assert model["columns"]["name"] == [layer.name for layer in expected.layers]
    assert model["columns"]["output_error"] == pytest.approx([layer.output_error for layer in expected.layers])
    assert model["columns"]["stages_gain_db"] == pytest.approx([layer.stages_gain_db for layer in expected.layers])
    assert set(model["columns"]["kind"]) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    }  # fmt: skip
    assert model["columns"]["block"] == [0] * 7 + [1] * 7
    spread = weight_distribution(quantized_llama, progress=False).layers
    for detail, one in zip(model["details"], spread, strict=True):
        assert detail["errors"] == [one.errors.below, *one.errors.counts, one.errors.above]
        assert sum(detail["before"]) == one.weights
    assert sum(model["total"]["codes"][4]) == sum(sum(one.codes[4]) for one in spread)
    assert model["manifest"]["config"]["method"] == "awq"


def test_a_search_curve_is_the_error_at_each_ratio(quantized_llama: Path) -> None:
    """By hand at one ratio: scale with x^r, round, undo, weigh with G."""
    pair = Pair.open(quantized_llama)
    tokens = pair.calibration([TEXT], 2)
    name = "model.layers.1.mlp.down_proj"
    (matrix,) = pair.matrices(layer=name, calibration=tokens, progress=False)
    curve = search_curve(matrix)
    assert curve is not None
    assert matrix.statistics is not None
    weight, gram = matrix.reference, matrix.statistics.gram
    grid = Grid(4, 32, zero_point=True)

    def error(ratio: float) -> float:
        scales = matrix.statistics.mean_abs.clamp(min=1e-30) ** ratio  # type: ignore[union-attr]
        scales = scales / (scales.max() * scales.min()).sqrt()
        delta = grid.fake_quantize(weight * scales) / scales - weight
        return float((delta @ gram * delta).sum())

    for ratio, found in curve.activations:
        assert found == pytest.approx(error(ratio) / error(0.0), rel=1e-3)
    assert len(curve.activations) >= 6
    assert [ratio for ratio, _ in curve.duo] == sorted(ratio for ratio, _ in curve.duo)


def test_channels_are_those_of_the_largest_activations(report: Report) -> None:
    for detail in report.data["models"][0]["details"]:
        activation = detail["channels"]["by_rank"]["activation"]
        assert activation == sorted(activation, reverse=True)
        assert detail["channels"]["of_critical"]["activation"][0] >= activation[0] * (1 - 1e-6)


def test_without_activations_only_weights_are_told(quantized_llama: Path) -> None:
    (model,) = build_report(quantized_llama, activations=False, progress=False).data["models"]
    assert model["calibration"] is None
    assert set(model["columns"]["output_error"]) == {None}
    assert all(detail["channels"] is None and detail["curve"] is None for detail in model["details"])
    assert all(error > 0 for error in model["columns"]["weight_error"])


def test_the_numbers_of_other_documents_arrive(report: Report) -> None:
    found = report.data["comparison"]
    columns = {column["title"]: column for column in found["columns"]}
    assert columns["on disk"]["values"] == pytest.approx([269.0, 113.9])
    assert columns["perplexity"]["spreads"] == [None, [28.0, 32.5]]
    assert columns["decode"]["values"] == [None, 150.0]
    assert columns["decode"]["spreads"][1] == pytest.approx([32 / 0.22, 32 / 0.2])
    assert found["text"]["tokens"] == 62
    assert report.data["speculation"][0]["by_position"] == [1.0, 0.8, 0.7, 0.5]
    assert report.data["profile"]["subject"] == "width 2,048"


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("comparison", {}),
        ("comparison", {**documents.comparison(), "sides": [{"label": 3}]}),
        ("comparison", {**documents.comparison(), "sides": "AB"}),
        ("comparison", {**documents.comparison(), "text": []}),
        ("profile", {**documents.profile(), "rows": []}),
        ("profile", {**documents.profile(), "rows": [{**documents.profile()["rows"][0], "seconds": "fast"}]}),
        ("profile", {**documents.profile(), "rows": [{**documents.profile()["rows"][0], "seconds": float("nan")}]}),
        ("speculation", {"x": {**documents.speculation(), "accepted_at": [1]}}),
        ("speculation", {"x": {"text": "generated without a draft"}}),
    ],
)
def test_a_document_that_is_something_else_is_refused(kind: str, broken: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"report: expected what `halfbyte (compare|profile|generate) .*`"):
        build_report(**{kind: broken})


def test_nothing_to_report_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a model, a comparison, a profile"):
        build_report()


def test_a_page_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    page = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "default-src 'none'" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == json.loads(json.dumps(report.to_dict()))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    page = Report(HOSTILE, {"names": [HOSTILE]}).write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert "<img" not in page
    data = page.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["names"] == [HOSTILE]
    assert "onerror=alert(1)>" not in Report(HOSTILE, {})._repr_html_()


def test_numbers_are_short_and_json_can_hold_them() -> None:
    assert rounded({1: [0.123456789, float("nan"), float("inf"), 3.0, (True, 7)]}) == {
        "1": [0.12346, None, None, 3, [True, 7]]
    }
    assert embed("<&>\u2028") == '"\\u003c\\u0026\\u003e\\u2028"'


def test_a_notebook_shows_the_page_in_a_frame(report: Report) -> None:
    frame = report._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts' in frame


def test_tables_and_figures_as_files(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables, figures = write_tables(report, tmp_path / "out"), write_figures(report, tmp_path / "out")
    assert [path.name for path in tables] == [
        "comparison.csv", "pairs.csv", "layers.csv", "histograms.csv", "profile.csv", "acceptance.csv", "report.json"
    ]  # fmt: skip
    assert [path.name for path in figures] == [
        "comparison.png", "layer_errors.png", "weights.png", "rounding_errors.png", "search_curves.png",
        "throughput_scaling.png", "latency_comparison.png", "roofline.png", "acceptance.png",
    ]  # fmt: skip
    with (tmp_path / "out" / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = report.data["models"][0]["columns"]
    assert [float(row["bias"]) for row in rows] == pytest.approx(columns["bias"])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


def test_a_linear_too_many_keeps_its_numbers(
    quantized_llama: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.report.build.DETAILED", 3)
    (model,) = build_report(quantized_llama, **QUICK).data["models"]
    errors = model["columns"]["output_error"]
    kept = [error for error, detail in zip(errors, model["details"], strict=True) if detail is not None]
    assert sorted(kept) == sorted(errors)[-3:]
    assert model["columns"] == report.data["models"][0]["columns"]


def test_one_model_of_a_comparison_that_cannot_be_examined(
    tiny_llama: Path, quantized_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import halfbyte

    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    comparison = halfbyte.compare(
        tiny_llama, quantized_llama, data=_text(tmp_path), window=32, n_samples=2, skip_speed=True, progress=False
    )
    report = build_report(comparison=comparison, **QUICK)
    assert [model["label"] for model in report.data["models"]] == ["B"]
    assert report.data["models"][0]["name"] == str(quantized_llama)

    def refuse(*_: object, **__: object) -> None:
        raise HalfbyteError("no manifest")

    monkeypatch.setattr("halfbyte.report.build.examine", refuse)
    report = build_report(comparison=comparison, **QUICK)
    assert report.data["models"] == []
    assert report.data["notes"] == ["B was not examined layer by layer: no manifest"]


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT[:2400], encoding="utf-8")
    return path


def test_a_folder_of_this_machine_is_not_told(tiny_llama: Path, quantized_llama: Path) -> None:
    report = build_report(quantized_llama, activations=False, progress=False)
    assert tiny_llama.is_absolute()
    assert report.data["models"][0]["reference"] == tiny_llama.name
    assert report.title == f"{quantized_llama.name} from {tiny_llama.name}"
