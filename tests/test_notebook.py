"""What a notebook shows of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.analysis.layers import layer_errors
from halfbyte.evaluation import profile as profile_module
from halfbyte.notebook import html_table
from halfbyte.quantization.config import QuantConfig
from tests.conftest import TEXT


def test_cells_are_text() -> None:
    page = html_table(["<b>", "n"], [["a & b", 1]], title="<i>")
    assert page == (
        "<table><caption>&lt;i&gt;</caption><thead><tr><th>&lt;b&gt;</th><th>n</th></tr></thead>"
        "<tbody><tr><td>a &amp; b</td><td>1</td></tr></tbody></table>"
    )


def test_a_quantization_is_shown_as_a_table_of_kinds(tiny_llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 2, "max_calib_seq_len": 32}
    report = halfbyte.quantize(tiny_llama, tmp_path / "awq", QuantConfig(group_size=16), **settings)
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + 7
    assert "<td>down_proj</td><td>2</td>" in page
    stored = [linear.relative_error for linear in report.linears if linear.name.endswith("down_proj")]
    assert f"<td>{sum(stored) / 2:.3%}</td>" in page
    plain = halfbyte.quantize(tiny_llama, tmp_path / "rtn", QuantConfig(method="rtn", group_size=16))
    assert "stored" not in plain._repr_html_()


def test_an_analysis_is_shown_as_a_row_a_linear(quantized_llama: Path) -> None:
    found = layer_errors(quantized_llama, activations=False, progress=False)
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + len(found.layers)
    assert f"<td>{found.layers[3].name}</td>" in page
    assert f"<td>{found.layers[3].mse:.4g}</td>" in page


def test_a_profile_is_shown_as_the_table_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "last_level_cache", lambda device: 1 << 14)
    found = profile_module.profile(model_dim=32, batch_sizes=[2], threads=1, rounds=3)
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + len(found.block)
    assert "<td>int4-a8</td>" in page
