"""Which part of a transformers model is on which device.

A part on the CPU computes there, on the native kernels: its activations travel, its weights never do. accelerate
computes the map and moves the activations; sizes are those of the packed codes, not of the weights they stand for.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.device.torch_device import pick_device
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.formats.layouts import Layout

DeviceMap = str | Mapping[str, int | str | torch.device]
MaxMemory = Mapping[int | str, int | str]
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """A device for every part of a model.

    Attributes:
        devices: dotted name of a module → its device; "" for the whole model.
    """

    devices: dict[str, torch.device]

    @property
    def main(self) -> torch.device:
        """Where the model as a whole is said to be: its only device, or the first that is no CPU."""
        return next((device for device in self.devices.values() if device.type != "cpu"), torch.device("cpu"))

    @property
    def on_cpu(self) -> bool:
        """Whether nothing is anywhere else."""
        return self.main.type == "cpu"

    def device_of(self, path: str) -> torch.device:
        """Where the module at `path` is.

        Raises:
            ConfigError: the map does not say.
        """
        part = path
        while part not in self.devices and part:
            part = part.rpartition(".")[0]
        if part not in self.devices:
            raise ConfigError(f"device_map: says nothing of {path}; add it, or a module around it")
        return self.devices[part]

    def check(self, network: nn.Module) -> None:
        """Refuse a map that leaves a parameter out.

        Raises:
            ConfigError: the first of them.
        """
        for name, _ in network.named_parameters():
            self.device_of(name)

    def place(self, network: Any) -> None:
        """Move every part to its device, and activations to the part that needs them."""
        if len(set(self.devices.values())) == 1:
            network.to(next(iter(self.devices.values())))
            return
        dispatch_model = _accelerate().dispatch_model
        log = logging.getLogger("accelerate.big_modeling")
        level = log.level
        log.setLevel(logging.ERROR)  # it announces parameters on the meta device; with the CPU as main device none are
        try:
            # The main device is where offloaded weights would be brought to. "cpu" says that those on the CPU stay.
            names = {path: "cpu" if d.type == "cpu" else str(d) for path, d in self.devices.items()}
            skip = getattr(network, "_skip_keys_device_placement", None)
            dispatch_model(network, names, main_device="cpu", skip_keys=skip, force_hooks=True)
        finally:
            log.setLevel(level)


def read_placement(device: str, device_map: DeviceMap | None, max_memory: MaxMemory | None) -> Placement | str:
    """The placement that was asked for, or the strategy by which `spread` is to find one.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; "auto" if there is a map.
        device_map: a device; module name → device; one of `AUTOMATIC`; or None.
        max_memory: GPU number or "cpu" → bytes, or "4GiB"; only where the map is to be found.

    Raises:
        ConfigError: contradictory, or not a device.
        UnsupportedError: accelerate is missing, or weights are to stay on the disk.
    """
    if device_map is None and max_memory is None:
        return Placement({"": pick_device(device)})
    if device != "auto":
        raise ConfigError(f'device {device!r}: say where by device_map and max_memory alone, with device="auto"')
    _accelerate()
    wanted = "auto" if device_map is None else device_map
    if isinstance(wanted, str) and wanted in AUTOMATIC:
        return wanted
    if max_memory is not None:
        raise ConfigError(
            f"max_memory: only with device_map {', '.join(AUTOMATIC)}; a map of your own has the last word"
        )
    named = {"": wanted} if isinstance(wanted, str) else dict(wanted)
    if "disk" in named.values():
        raise UnsupportedError('device_map: "disk": weights are not kept on the disk; use "cpu" or a GPU')
    return Placement({path: pick_device(_device_name(value)) for path, value in named.items()})


def spread(network: Any, packed: Mapping[str, int], strategy: str, max_memory: MaxMemory | None) -> Placement:
    """Fill the devices in turn, GPUs first.

    Args:
        network: a skeleton, parameters on the meta device; not changed.
        packed: parameter → bytes of the codes that will stand for it.
        strategy: one of `AUTOMATIC`, as accelerate defines them.
        max_memory: see `read_placement`; None for what is free.

    Raises:
        ConfigError: `max_memory` is not understood.
        UnsupportedError: the model does not fit.
    """
    _accelerate()
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    ledger = copy.deepcopy(network)
    for name, size in packed.items():
        path, _, leaf = name.rpartition(".")
        bytes_ = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        setattr(ledger.get_submodule(path), leaf, bytes_)
    whole = list(getattr(network, "_no_split_modules", None) or ())
    try:
        limits: Any = get_max_memory(None if max_memory is None else dict(max_memory))
    except (ValueError, TypeError) as error:
        raise ConfigError(f'max_memory: expected such as {{0: "4GiB", "cpu": "16GiB"}}: {error}') from error
    if strategy != "sequential" and any(key != "cpu" for key in limits):
        limits = get_balanced_memory(
            ledger, limits, no_split_module_classes=whole, low_zero=strategy == "balanced_low_0"
        )
    found = infer_auto_device_map(ledger, limits, no_split_module_classes=whole)
    homeless = [path for path, device in found.items() if device == "disk"]
    if homeless:
        room = ", ".join(f"{key}: {value / 1e6:,.0f} MB" for key, value in limits.items())
        raise UnsupportedError(
            f"device_map: {len(homeless)} parts, {homeless[0] or 'the whole model'} first, find no room in {room}; "
            "raise max_memory"
        )
    return Placement({path: torch.device(_device_name(value)) for path, value in found.items()})


def packed_bytes(checkpoint: Checkpoint, layout: Layout, name: str, shape: tuple[int, int], *, packed: bool) -> int:
    """Bytes of a quantized linear in memory, at most.

    Args:
        checkpoint: where it is.
        layout: it is stored in.
        name: on disk, without ".weight".
        shape: [out, in].
        packed: the kernel keeps codes of 4 bits packed; torch's holds a byte each.
    """
    groups = math.prod(checkpoint.info(f"{name}.{layout.scales}").shape)
    half = packed and layout.bits == 4  # halfbyte's own layout says its bits only in a tensor
    return shape[0] * shape[1] // (2 if half else 1) + 8 * groups + 4 * shape[0]


def _device_name(value: int | str | torch.device) -> str:
    return f"cuda:{value}" if isinstance(value, int) else str(value)


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise UnsupportedError(
            'device_map, max_memory: need accelerate; install it with: pip install "halfbyte[offload]"'
        ) from error
    return accelerate
