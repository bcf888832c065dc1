"""Launches, worked out by hand."""

import pytest

from halfbyte.device.gpu_facts import known_gpu
from halfbyte.device.kernel_config import KernelConfig, LaunchPlan, parse_kernel_config, plan_launch
from halfbyte.errors import ConfigError


def plan(text: str, architecture: str = "sm_90") -> LaunchPlan:
    return plan_launch(known_gpu(architecture), parse_kernel_config(text))


def test_what_is_written_is_read() -> None:
    assert parse_kernel_config("128,4,1;256,1,1") == KernelConfig((128, 4, 1), (256, 1, 1))
    assert parse_kernel_config(" 7 ; 8,2 ; registers = 96; shared=49152;") == KernelConfig(
        (7, 1, 1), (8, 2, 1), 96, 49152
    )


def test_an_h100_takes_512_blocks_of_96_registers_in_two_waves() -> None:
    found = plan("128,4,1;256,1,1;registers=96")
    # 65,536 registers: 16,384 a scheduler, 5 warps of 3,072 on each; 20 warps are two blocks of eight.
    assert (found.occupancy.blocks, found.occupancy.limits) == (2, ("registers",))
    assert (found.blocks, found.warps, found.wave_blocks) == (512, 8, 264)
    assert (found.waves, found.last_wave_blocks) == (2, 248)
    assert found.last_wave_share == pytest.approx(248 / 264)
    assert found.efficiency == pytest.approx(512 / 528)
    assert found.to_dict()["occupancy"]["blocks"] == 2


def test_a_last_warp_may_have_idle_lanes() -> None:
    found = plan("1;10,10,1")
    assert (found.threads, found.warps, found.idle_lanes) == (100, 4, 28)
    assert (found.waves, found.last_wave_blocks) == (1, 1)


def test_a_full_last_wave_is_no_further_one() -> None:
    assert (plan("264;256;registers=96").waves, plan("265;256;registers=96").waves) == (1, 2)
    assert plan("264;256;registers=96").last_wave_share == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1;1025", r"block x is 1,025; CUDA allows at most 1,024"),
        ("1;32,33", r"a block of 32 × 33 × 1 has 1,056 threads; CUDA allows at most 1,024"),
        ("1;1,1,65", r"block z is 65; CUDA allows at most 64"),
        ("1,65536;32", r"grid y is 65,536; CUDA allows at most 65,535"),
        ("1;32;registers=256", r"registers=256: a thread has 1 to 255"),
        ("1;32;shared=232449", r"shared=232449: a block of sm_90 has at most 232,448 bytes of shared memory"),
        ("1;1024;registers=128", r"1024 threads of 128 registers are more than the 65,536 registers of an SM"),
        ("128,4,1", r"the block '' is not 1 to 3 whole numbers; expected \"GRID;BLOCK\""),
        ("a;32", r"the grid 'a' is not 1 to 3 whole numbers"),
        ("1,1,1,1;32", r"the grid '1,1,1,1' is not"),
        ("0;32", r"the grid '0' is not"),
        ("1;32;colour=3", r"'colour=3': expected registers=NUMBER or shared=BYTES"),
        ("1;32;registers=many", r"'registers=many': expected"),
    ],
)
def test_what_cuda_would_refuse_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(text)
