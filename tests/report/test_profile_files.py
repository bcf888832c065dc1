"""The files of a profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import OutputError
from halfbyte.evaluation import profile as module
from halfbyte.evaluation.profile import profile
from halfbyte.evaluation.profile_result import Profile
from halfbyte.report import profile as files
from halfbyte.report.sections import profile_section
from halfbyte.report.speed_plots import Series


@pytest.fixture(scope="module")
def tiny() -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "last_level_cache", lambda device: 1 << 14)
        return profile(model_dim=32, batch_sizes=[2], threads=1, rounds=3)


def test_the_table_and_the_pictures_go_into_the_folder(tiny: Profile, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "profile"
    assert files.write_table(tiny, folder) == folder / "performance_results.csv"
    written = files.write_pictures(tiny, folder)
    assert [path.name for path in written] == ["throughput_scaling.png", "latency_comparison.png", "roofline.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([files.CSV, *files.PICTURES])


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken is a file; name a folder"):
        files.check_folder(tmp_path / "taken" / "below")
    files.check_folder(tmp_path / "not" / "there" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(OutputError, match="cannot be written"):
        files.write_table(Profile(None, 1, None, "cpu", "", None, None, 1, 1, []), tmp_path / "taken")


def test_the_baseline_is_the_fastest_in_16_bit(tiny: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines = []

    def drawn(seconds: Series, *, baseline: str, **rest: Any) -> None:
        baselines.append(baseline)

    monkeypatch.setattr(files, "plot_latency_comparison", drawn)
    for torch_seconds in (1.0, 0.1):
        rows = [
            replace(row, seconds=torch_seconds if row.implementation == "torch-bf16" else row.bits / 40)
            for row in tiny.rows
        ]
        files.profile_figures(profile_section(replace(tiny, rows=rows).to_dict()))
    assert baselines == ["bf16", "torch-bf16"]
