"""The sample model's 4-bit copy in a full circle of layouts: at the end every byte is what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.checkpoints.reader import Checkpoint

pytestmark = pytest.mark.sample


def test_from_gemm_round_to_gemm(sample_folder: Path, tmp_path: Path) -> None:
    start = halfbyte.quantize(sample_folder, tmp_path / "start", QuantConfig(method="rtn")).output_dir
    at = start
    for format in ("gptq", "compressed-tensors", "gemv", "gemm"):
        found = halfbyte.convert(at, tmp_path / format, format, max_shard_size="50MB")
        assert (len(found.linears), found.copied, found.exact) == (210, 62, True)
        at = tmp_path / format
        assert halfbyte.verify(at).problems == []
    before, after = Checkpoint.open(start), Checkpoint.open(at)
    assert before.names() == after.names()
    for name in before.names():
        assert torch.equal(before.read(name).view(-1).view(torch.uint8), after.read(name).view(-1).view(torch.uint8))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (start, at)]
    assert configs[0] == configs[1]
    # The circle was no copy: what lay between has other tensors.
    assert set(Checkpoint.open(tmp_path / "gptq").names()) != set(before.names())
