"""Limits and occupancy, by hand."""

import pytest

from halfbyte.device.gpu_facts import GPUS, known_gpu, occupancy
from halfbyte.errors import ConfigError


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "limit"),
    [
        ("sm_80", 256, 32, 0, 8, "warps"),
        ("sm_80", 32, 16, 0, 32, "blocks"),
        ("sm_86", 32, 16, 0, 16, "blocks"),
        ("sm_89", 32, 16, 0, 24, "blocks"),
        ("sm_80", 128, 255, 0, 2, "registers"),
        ("sm_80", 96, 168, 0, 4, "registers"),  # 12 warps of 5376 registers, three to each quarter
        ("sm_86", 128, 32, 48 << 10, 2, "shared memory"),
        ("sm_90", 128, 32, 227 << 10, 1, "shared memory"),
        ("sm_90", 128, 32, (227 << 10) + 1, 0, "shared memory"),
        ("sm_89", 1024, 64, 0, 1, "warps"),
        ("sm_75", 256, 32, 0, 4, "warps"),
        ("sm_75", 128, 32, 32 << 10, 2, "shared memory"),  # nothing is taken of a block's there
        ("sm_80", 128, 32, 82 << 10, 1, "shared memory"),  # where 1 KiB is: twice 83 is more than 164
        ("sm_87", 32, 16, 0, 16, "blocks"),
        ("sm_100", 32, 16, 0, 32, "blocks"),
        ("sm_120", 32, 16, 0, 24, "blocks"),
    ],
)
def test_occupancy_by_hand(
    architecture: str, threads: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    gpu = known_gpu(architecture)
    found = occupancy(gpu, threads, registers, shared)
    assert found.blocks == blocks
    assert limit in found.limits
    assert found.share == pytest.approx(blocks * -(-threads // 32) / gpu.warps)


@pytest.mark.parametrize(
    ("written", "architecture"), [("sm_90", "sm_90"), ("SM_90a", "sm_90"), ("8.6", "sm_86"), ("120", "sm_120")]
)
def test_an_architecture_may_be_written_in_several_ways(written: str, architecture: str) -> None:
    assert known_gpu(written).architecture == architecture


def test_an_architecture_without_facts_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^architecture sm_70: its limits are not known here; known are sm_75, sm_80"
    ):
        known_gpu("sm_70")


def test_a_block_never_has_more_than_its_multiprocessor() -> None:
    for gpu in GPUS:
        assert gpu.block_shared <= gpu.shared - gpu.shared_reserved
        assert gpu.warps % 4 == 0
