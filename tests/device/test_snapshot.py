"""The snapshot, the hierarchy and the monitor, here and with a GPU that is made up."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import halfbyte
from halfbyte.device import hierarchy, snapshot
from halfbyte.device.cpu import Cache
from halfbyte.device.gpu_facts import known_gpu
from halfbyte.device.monitor import monitor
from halfbyte.errors import ConfigError
from tests.device.nvml import fake_nvml


def test_a_snapshot_measures_and_shows_what_it_measured() -> None:
    found = halfbyte.snapshot()
    assert found.peaks is not None
    assert 1e8 < found.peaks.read_bandwidth < 1e13
    document = json.loads(json.dumps(found.to_dict()))
    assert document["cpu"]["model"] == found.cpu.model
    assert document["peaks"]["fp32"] == found.peaks.fp32
    shown = dict(found.table()[1])
    assert shown["CPU"] == found.cpu.model
    assert shown["  fp32"] == f"{snapshot.decimal(found.peaks.fp32)}FLOP/s"
    assert found._repr_html_().count("<tr>") == 1 + len(shown)


def test_a_snapshot_may_leave_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "read_bandwidth", None)
    found = halfbyte.snapshot(measure=False)
    assert found.peaks is None
    assert "  fp32" not in dict(found.table()[1])


def test_a_gpu_is_shown_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = dict(halfbyte.snapshot(measure=False).table()[1])
    assert shown["GPU 0"] == "NVIDIA H100 80GB HBM3, sm_90, driver 580.65.06"
    assert shown["  clocks now"] == "SM 1,755 MHz, of 1,980, memory 2,619 MHz"
    assert shown["  power"] == "346 W, limit 700 W"
    assert shown["  busy"] == "87%, memory 23%"
    assert shown["  multiprocessors"] == "not told by the driver"


def test_what_the_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"nvme": [SimpleNamespace(current=60.0)]})
    assert (snapshot.cpu_frequency(), snapshot.cpu_temperature()) == (None, None)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=2450.0))
    sensors = {"k10temp": [SimpleNamespace(current=50.0), SimpleNamespace(current=61.5)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    assert (snapshot.cpu_frequency(), snapshot.cpu_temperature()) == (2.45e9, 61.5)


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512 B"), (32 << 10, "32 KiB"), (1536 << 10, "1.5 MiB"), (3 << 30, "3 GiB")]
)
def test_binary_sizes(value: int, text: str) -> None:
    assert snapshot.binary(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5 "), (24.13e9, "24.1 G"), (999.6e9, "1 T"), (2.5e12, "2.5 T")])
def test_decimal_prefixes(value: float, text: str) -> None:
    assert snapshot.decimal(value) == text


def test_levels_are_read_through_buffers_that_only_they_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    monkeypatch.setattr(hierarchy, "caches", lambda: [Cache("L1d", 32 << 10, 1), Cache("L3", 32 << 20, 8)])
    monkeypatch.setattr(hierarchy, "thread_count", lambda: 4)
    monkeypatch.setattr(hierarchy, "peak_flops", lambda threads: 1e9 * threads)
    monkeypatch.setattr(
        hierarchy, "private_read_bandwidth", lambda nbytes, threads: reads.append((nbytes, threads)) or 7e9 * threads
    )
    found = hierarchy.cpu_hierarchy()
    names = [level.name for level in found.levels]
    assert names[-3:] == ["L1d", "L3", "memory"]
    l1, l3, memory = found.levels[-3:]
    assert (l1.one, l1.together, l1.buffer) == (7e9, 28e9, 16 << 10)
    assert reads[:2] == [(16 << 10, 1), (16 << 10, 4)]
    assert reads[2:4] == [((32 << 10) + (16 << 20), 1), ((32 << 10) + (4 << 20), 4)]
    assert (memory.nbytes, l3.owner) == (psutil.virtual_memory().total, "8 cores")
    assert reads[4][0] > 32 << 20
    assert 4 * reads[5][0] > 32 << 20
    if names[0] == "registers":
        assert found.levels[0].one == 6e9  # three operands of four bytes for two operations


def test_the_hierarchy_here_is_read() -> None:
    found = hierarchy.cpu_hierarchy()
    assert all(level.one and level.together for level in found.levels)
    assert json.loads(json.dumps(found.to_dict()))["levels"][-1]["name"] == "memory"


def test_a_gpu_s_hierarchy_is_its_facts() -> None:
    found = hierarchy.gpu_hierarchy(known_gpu("sm_90"), measured=False)
    assert "nothing was measured" in found.source
    registers, shared, l2, memory = found.levels
    assert (registers.nbytes, registers.total) == (256 << 10, 132 * (256 << 10))
    assert (shared.nbytes, l2.nbytes, memory.together) == (228 << 10, 50 << 20, 3352e9)
    assert "16,896 together" in shared.note


def test_a_monitor_samples_at_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    samples = list(monitor(0.25, 0.1))
    assert len(samples) == 2
    assert nvml.open == 0
    line = samples[-1].to_dict()
    assert 0 <= (line["cpu_percent"] or 0) <= 100
    assert (line["gpu0_percent"], line["gpu0_watts"], line["gpu0_sm_mhz"]) == (87.0, 345.7, 1755.0)
    assert line["gpu0_memory_gb"] == 5.369


@pytest.mark.parametrize(("seconds", "interval"), [(1, 0.01), (1, 2), (0, 1), (-1, 0.1)])
def test_times_out_of_range_are_refused(seconds: float, interval: float) -> None:
    with pytest.raises(ConfigError, match=r"^(interval|monitor): expected"):
        monitor(seconds, interval)
