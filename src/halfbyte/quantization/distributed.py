"""Blocks searched side by side: on the machines of a Ray cluster, or on several GPUs of this one.

Once the inputs of a block are known, its search needs nothing from any other block. So this process runs the model
forward, block by block, and sends each block with its inputs to a worker; results come back in any order and each is
kept under its index. Where each block sees the error of those before it (`QuantConfig.propagate`), blocks go in order
and workers share the calibration batches of one: each sums over a batch, and the sums are added in order here.

A worker computes what this process would: the same batches, the same order of sums, the same number of threads. So the
result is the same to the bit.
"""

from __future__ import annotations

import copy
import logging
import queue
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from halfbyte.errors import ConfigError, HalfbyteError, UnsupportedError
from halfbyte.quantization.statistics import Inputs, Sums, sums_of_batch
from halfbyte.quantization.task import BlockOutcome, BlockTask, on_device

# A worker that dies (killed, out of memory, its machine gone) costs its block; Ray starts that again this often.
RETRIES = 3
CONNECT_SECONDS = 10

Result = TypeVar("Result")


class Workers(Protocol):
    """Where blocks are sent.

    Attributes:
        slots: how many are worked on at the same time.
    """

    slots: int

    def submit(self, task: BlockTask) -> Future[BlockOutcome]:
        """Start a block; `task` may be changed as soon as this returns."""

    def result(self, future: Future[BlockOutcome]) -> BlockOutcome:
        """What came of it, or what was raised, as if by this process."""


@contextmanager
def workers(ray: str | None, devices: Sequence[torch.device], threads: int) -> Iterator[Workers | None]:
    """The workers a user asked for; None for this process alone.

    Args:
        ray: "local" (a cluster of this machine, for this run), "auto" (the one that runs here) or an address.
        devices: several GPUs share the blocks.
        threads: torch's threads in each search.

    Raises:
        UnsupportedError: Ray is not installed.
        ConfigError: no cluster answers there.
    """
    if ray is not None:
        with _connected(ray) as module:
            yield RayWorkers(module, devices[0], threads)
    elif len(devices) > 1:
        with ThreadPoolExecutor(len(devices)) as pool:
            yield GpuWorkers(pool, devices)
    else:
        yield None


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise UnsupportedError('ray: not installed; install it with: pip install "halfbyte[ray]"') from None
    if ray.is_initialized():  # the caller's own cluster, which is the caller's to end
        yield ray
        return
    if address not in ("local", "auto"):
        _refuse_silence(address)
    try:
        ray.init(address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f'ray {address!r}: no cluster there ({reason}); start one with `ray start --head`, or use "local"'
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Ray itself waits for minutes where nothing answers, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"ray {address!r}: no cluster there ({error}); expected local, auto or HOST:PORT of `ray start --head`"
        ) from error


class RayWorkers:
    """Blocks as Ray tasks.

    A task asks for as many CPUs as the search has threads, or as many as the smallest machine has, and for a GPU where
    the search runs on one.

    Args:
        ray: the module, connected.
        device: where this process computes; workers use the same kind.
        threads: torch's threads in each search.
    """

    def __init__(self, ray: Any, device: torch.device, threads: int):
        self._ray = ray
        self._threads = threads
        self._device = device.type
        gpus = 1 if device.type == "cuda" else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if gpus:
            nodes = [node for node in nodes if node.get("GPU")]
        if not nodes:
            raise ConfigError(f"ray: the cluster has no machine with a {'GPU' if gpus else 'CPU'} for the search")
        cpus = min(threads, *(int(node["CPU"]) for node in nodes)) if not gpus else 1
        self.slots = sum(int(node["GPU"] if gpus else node["CPU"] // cpus) for node in nodes)
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
        self._run, self._sum = remote(_run_remotely), remote(_sum_remotely)

    def submit(self, task: BlockTask) -> Future[BlockOutcome]:
        """Send the block and its inputs; both are copied into the cluster's store before this returns."""
        sent = self._ray.put(task.detached())
        future: Future[BlockOutcome] = self._run.remote(sent, self._threads, self._device).future()
        return future

    def sums_by_batch(
        self, block: nn.Module, shared_inputs: list[tuple[str, ...]], batches: Iterable[Inputs]
    ) -> Iterator[Sums]:
        """`statistics.sums_by_batch`, each batch by a worker; at most one more than there are is under way.

        Raises:
            HalfbyteError: as `result`.
        """
        sent = self._ray.put((block, shared_inputs))
        waiting: deque[Future[Sums]] = deque()
        for inputs in batches:
            inputs = on_device(inputs, torch.device("cpu"))
            waiting.append(self._sum.remote(sent, inputs, self._threads, self._device).future())
            if len(waiting) > self.slots:
                yield self.result(waiting.popleft())
        while waiting:
            yield self.result(waiting.popleft())

    def result(self, future: Future[Result]) -> Result:
        """What came of it, copied out of the cluster's store.

        Raises:
            HalfbyteError: the worker's own, or that it died again and again.
        """
        raised = self._ray.exceptions
        try:
            return future.result()
        except raised.RayTaskError as error:
            if isinstance(error.cause, HalfbyteError):
                raise error.cause from None
            raise
        except raised.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedError(
                f"ray: a block was lost {RETRIES + 1} times ({reason}); have the workers enough memory?"
            ) from error


def _run_remotely(task: BlockTask, threads: int, device: str) -> BlockOutcome:
    torch.set_num_threads(threads)
    return _run_on(task, torch.device(device))


def _sum_remotely(sent: tuple[nn.Module, list[tuple[str, ...]]], inputs: Inputs, threads: int, device: str) -> Sums:
    torch.set_num_threads(threads)
    block, shared_inputs = sent
    sums = sums_of_batch(block.to(device), shared_inputs, on_device(inputs, torch.device(device)))
    for found in sums.values():
        found.gram, found.mean_abs = found.gram.cpu(), found.mean_abs.cpu()
    return sums


def _run_on(task: BlockTask, device: torch.device) -> BlockOutcome:
    task.block.to(device)
    for batch in task.batches:
        batch.hidden = batch.hidden.to(device)
        batch.kwargs[task.index] = on_device(batch.kwargs[task.index], device)
    return task.run()


class GpuWorkers:
    """Blocks in threads of this process, one for each GPU: torch lets go of Python's lock while a GPU computes.

    Args:
        pool: with a thread for each device.
        devices: "cuda:N".
    """

    def __init__(self, pool: ThreadPoolExecutor, devices: Sequence[torch.device]):
        self.slots = len(devices)
        self._pool = pool
        self._free: queue.Queue[torch.device] = queue.Queue()
        for device in devices:
            self._free.put(device)

    def submit(self, task: BlockTask) -> Future[BlockOutcome]:
        """Copy the block; the thread moves the copy to a GPU that is free."""
        detached = task.detached()
        detached.block = copy.deepcopy(task.block).to("cpu")
        return self._pool.submit(self._run, detached)

    def result(self, future: Future[BlockOutcome]) -> BlockOutcome:
        """The outcome."""
        return future.result()

    def _run(self, task: BlockTask) -> BlockOutcome:
        device = self._free.get()
        try:
            return _run_on(task, device)
        finally:
            self._free.put(device)
