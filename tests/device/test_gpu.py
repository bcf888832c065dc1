"""What is read of GPUs, from a module in NVML's place: no GPU has been asked yet."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfbyte.device import gpu
from halfbyte.device.gpu import GpuReader, found_gpu, found_gpus, gpu_states
from halfbyte.device.gpu_facts import known_gpu
from halfbyte.errors import UnsupportedError
from tests.device.nvml import fake_nvml


def test_a_state_is_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with GpuReader() as reader:
        first, second = reader.read()
        assert nvml.open == 1
    assert nvml.open == 0
    assert reader.missing is None
    assert (first.index, second.index, first.uuid) == (0, 1, "GPU-handle-0")
    assert (first.name, first.architecture, first.driver) == ("NVIDIA H100 80GB HBM3", "sm_90", "580.65.06")
    assert (first.memory, first.memory_used) == (80 << 30, 5 << 30)
    assert (first.sm_clock, first.sm_clock_most, first.memory_clock) == (1755e6, 1980e6, 2619e6)
    assert (first.power, first.power_limit, first.temperature) == (pytest.approx(345.678), 700, 41)
    assert (first.utilization, first.memory_utilization) == (0.87, 0.23)


def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = (
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetName",
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(1, without=silent))
    with GpuReader() as reader:
        (state,) = reader.read()
    assert (state.power, state.utilization, state.memory, state.memory_used) == (None, None, None, None)
    assert (state.name, state.power_limit) == ("unknown GPU", 700)


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(broken="Driver Not Loaded"))
    assert gpu_states() == ([], "no NVIDIA driver is loaded (Driver Not Loaded)")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(0))
    assert gpu_states() == ([], "the NVIDIA driver shows no GPU")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path / "missing")
    assert gpu_states() == ([], "no NVIDIA driver is loaded")
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path)
    assert gpu_states()[1] == (
        "an NVIDIA driver is loaded, but nvidia-ml-py is not installed: pip install 'halfbyte[gpu]'"
    )


def test_torch_adds_what_nvml_does_not_know_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(2))
    seen = SimpleNamespace(uuid="handle-1", multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    states, missing = gpu_states()
    assert missing is None
    assert [(state.sms, state.l2) for state in states] == [(None, None), (132, 50 << 20)]


def test_a_gpu_that_is_found_has_its_own_size_and_its_architecture_s_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=9, minor=0, name="H200", multi_processor_count=131, L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 4e12)
    found = found_gpu()
    assert (found.name, found.sms, found.l2, found.bandwidth) == ("H200", 131, 60 << 20, 4e12)
    assert (found.warps, found.block_shared) == (known_gpu("sm_90").warps, known_gpu("sm_90").block_shared)


def test_without_a_gpu_an_architecture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="no CUDA GPU that torch sees; name an architecture: --arch sm_90"):
        found_gpu()
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    gpus, why = found_gpus()
    assert gpus == []
    assert "torch sees" in str(why)


def test_a_gpu_whose_limits_are_not_known_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(major=7, minor=0, name="V100", multi_processor_count=80, L2_cache_size=6 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpus, why = found_gpus()
    assert gpus == []
    assert "sm_70: its limits are not known here" in str(why)
