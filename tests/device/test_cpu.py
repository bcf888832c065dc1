"""What the machine says of itself, on this machine and on made-up ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte import _native
from halfbyte.device import cpu
from halfbyte.errors import ConfigError


def test_snapshot() -> None:
    info = cpu.cpu_info()
    assert info.tiers[-1] == "portable"
    assert 1 <= info.usable_cores <= info.logical_cores
    assert info.memory_bytes > 2**28
    assert info.model


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu.cgroup_quota(tmp_path) == quota


def test_cache_sizes(tmp_path: Path) -> None:
    for index, texts in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"), ("3", "", "")]
    ):
        (tmp_path / f"index{index}").mkdir()
        for name, text in zip(("level", "type", "size"), texts, strict=True):
            (tmp_path / f"index{index}" / name).write_text(text + "\n")
    assert cpu.cache_sizes(tmp_path) == {"L1d": 48 << 10, "L2": 2 << 20}
    assert cpu.cache_sizes(tmp_path / "missing") == {}


def test_a_cache_says_how_many_cores_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_siblings", lambda number: f"core {number % 4}")  # two threads a core
    for index, (level, shared) in enumerate([("1", "0,4"), ("2", "0-1,4-5"), ("3", "0-7"), ("4", None)]):
        (tmp_path / f"index{index}").mkdir()
        for name, text in (("level", level), ("type", "Unified"), ("size", "64K"), ("shared_cpu_list", shared)):
            if text is not None:
                (tmp_path / f"index{index}" / name).write_text(text + "\n")
    assert [(cache.name, cache.cores) for cache in cpu.caches(tmp_path)] == [("L1", 1), ("L2", 2), ("L3", 4), ("L4", 1)]


def test_thread_count_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_THREADS", "3")
    assert cpu.thread_count() == 3
    for wrong in ("0", "many", "-1", "99999"):
        monkeypatch.setenv("HALFBYTE_THREADS", wrong)
        with pytest.raises(ConfigError, match="HALFBYTE_THREADS"):
            cpu.thread_count()


def test_a_process_can_be_told_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_chosen", None)
    monkeypatch.setenv("HALFBYTE_THREADS", "3")
    try:
        cpu.use_threads(2)
        assert (cpu.thread_count(), _native.threads(), torch.get_num_threads()) == (2, 2, 2)
        for wrong in (0, -1, 1025):
            with pytest.raises(ConfigError, match=f"^threads: expected 1 to 1024, got {wrong}"):
                cpu.use_threads(wrong)
        assert cpu.thread_count() == 2
    finally:
        torch.set_num_threads(before)
        _native.set_threads(cpu.usable_cores())


def test_measurements_are_positive() -> None:
    assert cpu.read_bandwidth(1 << 20, repeats=1) > 1e8
    assert cpu.private_read_bandwidth(1 << 14, threads=2, seconds=1e-4) > 1e8
    assert cpu.peak_flops() > 1e8


@pytest.mark.parametrize("tier", _native.available_tiers())
def test_a_peak_is_none_where_a_tier_has_no_instruction(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_ISA", tier)
    peaks = {kind: cpu.measured_peak(kind, threads=1) for kind in ("fp32", "int8", "bf16")}
    assert peaks["fp32"] is not None
    assert (peaks["int8"] is None) == (tier == "portable")
    if tier in ("portable", "avx2", "avx_vnni"):
        assert peaks["bf16"] is None
    assert all(np.isfinite(peak) and peak > 1e8 for peak in peaks.values() if peak is not None)
    with pytest.raises(ValueError, match="fp32, int8 or bf16"):
        _native.measure_peak("int4", tier)
