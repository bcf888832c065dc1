"""Which torch device a user meant."""

from __future__ import annotations

import torch

from halfbyte.errors import ConfigError


def pick_device(device: str) -> torch.device:
    """The torch device behind "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: not one of these, or no such GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ConfigError(f'device {device!r}: expected "auto", "cpu", "cuda" or "cuda:N"') from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return picked
