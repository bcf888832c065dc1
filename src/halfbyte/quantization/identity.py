"""Everything the result of a quantization depends on, down to the last bit, by the name a user knows it by."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.device.cpu import cpu_info
from halfbyte.quantization.config import QuantConfig

# Raised when the files of an unfinished run change their meaning.
JOURNAL_FORMAT = 2
PACKAGES = ("halfbyte", "torch", "transformers")
SAMPLED_BYTES = 4096


def versions() -> dict[str, str]:
    """Of the packages whose code decides about bits."""
    return {name: version(name) for name in PACKAGES}


def describe_run(
    checkpoint: Checkpoint,
    config: QuantConfig,
    *,
    calibration: str | None,
    seed: int,
    batch_tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    """JSON values: if they are equal for two runs with the same number of threads, so are the results.

    Args:
        checkpoint: the model.
        config: group size resolved.
        calibration: sha256 of the tokens, None without calibration.
        seed: which calibration blocks were kept.
        batch_tokens: tokens in one forward pass at most; the memory budget decides.
        device: where the search runs.
    """
    cpu = cpu_info()
    run: dict[str, Any] = {
        "journal format": JOURNAL_FORMAT,
        "the model's weights or config": model_hash(checkpoint),
        **{f"option {name}": value for name, value in config.to_dict().items()},
        **{f"version of {name}": number for name, number in versions().items()},
        "the CPU": f"{cpu.model} ({torch.backends.cpu.get_cpu_capability()})",
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    if calibration is not None:
        run["the calibration text"] = calibration
        run["option seed"] = seed
        run["tokens in a batch (option memory_budget)"] = batch_tokens
    return run


def model_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of config.json, of every tensor's header, and of its first bytes.

    Headers alone would not tell a model from its fine-tuned sister; all bytes would take as long as reading the model.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in checkpoint.names():
        info = checkpoint.info(name)
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        with info.file.open("rb") as file:
            file.seek(info.offset)
            digest.update(file.read(min(SAMPLED_BYTES, info.nbytes)))
    return digest.hexdigest()
