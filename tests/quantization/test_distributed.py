"""Blocks searched by others: the same checkpoint, to the bit, in whatever order they come back."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.checkpoints.journal import Journal
from halfbyte.errors import CheckpointError, ConfigError, UnsupportedError
from halfbyte.quantization import budget, distributed, pipeline
from halfbyte.quantization.statistics import StatisticsCollector
from halfbyte.quantization.task import BlockOutcome, BlockTask
from tests.conftest import TEXT, make_llama

SETTINGS: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 6, "max_calib_seq_len": 48}
QUICK = QuantConfig(n_grid=2)
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out"
    halfbyte.quantize(model, output, QUICK, **SETTINGS)
    return (output / "model.safetensors").read_bytes()


class LateFirst:
    """Two threads; of two blocks under way, the one that was sent later comes back first."""

    slots = 1

    def __init__(self, pool: ThreadPoolExecutor, fail_at: int = -1):
        self.pool = pool
        self.fail_at = fail_at
        self.held: list[tuple[Future[BlockOutcome], BlockTask]] = []

    def submit(self, task: BlockTask) -> Future[BlockOutcome]:
        import copy

        detached = task.detached()
        detached.block = copy.deepcopy(task.block)
        future: Future[BlockOutcome] = Future()
        self.held.append((future, detached))
        if len(self.held) == 2:
            for held, waiting in reversed(self.held):
                self.pool.submit(self.work, held, waiting).result()
            self.held.clear()
        return future

    def work(self, future: Future[BlockOutcome], task: BlockTask) -> None:
        if task.index == self.fail_at:
            future.set_exception(CheckpointError("the worker's own"))
        else:
            future.set_result(task.run())

    def result(self, future: Future[BlockOutcome]) -> BlockOutcome:
        return future.result()


def given(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    @contextmanager
    def workers(*_: Any) -> Iterator[LateFirst]:
        with ThreadPoolExecutor(1) as pool:
            yield LateFirst(pool, **settings)

    monkeypatch.setattr(pipeline, "workers", workers)


def test_the_order_of_return_does_not_matter(
    model: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch)
    recorded: list[int] = []
    record = Journal.record
    monkeypatch.setattr(Journal, "record", lambda self, index, *a: (recorded.append(index), record(self, index, *a)))
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert sorted(recorded) == list(range(BLOCKS))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_blocks_that_came_back_before_a_failure_are_kept_and_taken_up_by_one_process(
    model: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        given(patch, fail_at=2)
        with pytest.raises(CheckpointError, match=r"the worker's own; \d of 4 blocks are finished and kept"):
            halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_without_ray_the_command_that_installs_it_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r'pip install "halfbyte\[ray\]"'):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS, ray="local")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "host.invalid:6379", "a:b", "127.0.0.1:99999"])
def test_an_address_without_a_cluster(address: str) -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(ConfigError, match=r"ray .*: no cluster there .* expected local, auto or HOST:PORT"),
        distributed.workers(address, [torch.device("cpu")], 1),
    ):
        pass


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A real Ray cluster on this machine: two workers of one CPU."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_ray_workers_give_the_same_bits(cluster: Any, model: Path, whole: bytes, tmp_path: Path) -> None:
    report = halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS, ray="auto")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert report.threads == 1
    assert cluster.is_initialized()  # not ours to end


@pytest.mark.slow
def test_a_killed_worker_is_retried(
    cluster: Any, model: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt at block 1 ends its own process by SIGKILL; Ray starts the block again."""
    marker = tmp_path / "killed"

    def run_and_die_once(task: BlockTask, threads: int, device: str) -> BlockOutcome:
        if task.index == 1 and not marker.exists():
            marker.write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        torch.set_num_threads(threads)
        return task.run()

    monkeypatch.setattr(distributed, "_run_remotely", run_and_die_once)
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS, ray="auto")
    assert marker.exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_line_here(cluster: Any, model: Path, tmp_path: Path) -> None:
    def refuse(task: BlockTask, threads: int, device: str) -> BlockOutcome:
        raise CheckpointError("the worker's own")

    workers = distributed.RayWorkers(cluster, torch.device("cpu"), 1)
    assert workers.slots == 2
    future = cluster.remote(refuse).remote(None, 1, "cpu").future()
    with pytest.raises(CheckpointError, match="^the worker's own$"):
        workers.result(future)


@pytest.mark.slow
def test_two_ray_workers_share_the_batches_of_a_block_whose_error_is_passed_on(
    cluster: Any, model: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as one process, from several batches that the workers sum over, not this process."""
    config = QuantConfig(n_grid=2, propagate=True)
    monkeypatch.setattr(budget, "BATCH_TOKENS", 48)
    halfbyte.quantize(model, tmp_path / "one", config, **SETTINGS)
    sums: list[int] = []
    merge = StatisticsCollector.merge
    monkeypatch.setattr(StatisticsCollector, "merge", lambda self, part: (sums.append(1), merge(self, part)))
    monkeypatch.setattr(pipeline, "sums_by_batch", None)
    halfbyte.quantize(model, tmp_path / "two", config, **SETTINGS, ray="auto")
    assert len(sums) == BLOCKS * SETTINGS["max_calib_samples"]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != whole
