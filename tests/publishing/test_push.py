"""Uploading, against a stand-in of the hub; in a process of its own: the hub library reads its address at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.publishing.hub_stand_in import TOKEN, hub

PUSH = """
import sys, halfbyte
model = halfbyte.load(sys.argv[1])
print(model.push_to_hub("me/tiny", private=True, max_shard_size=int(sys.argv[2]), commit_message="Four bits"))
"""


def push(folder: Path, home: Path, shard: int = 10**9, **variables: str) -> subprocess.CompletedProcess[str]:
    # Without hf-xet's own protocol, whose storage no small server can stand in for.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    command = [sys.executable, "-c", PUSH, str(folder), str(shard)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_repository_holds_the_same_bytes_and_no_shards_of_before(quantized_llama: Path, tmp_path: Path) -> None:
    with hub() as state:
        state.files = {"model-00001-of-00009.safetensors": b"old", "notes.txt": b"mine"}
        done = push(quantized_llama, tmp_path, HF_ENDPOINT=state.address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{state.address}/me/tiny\n"
    assert state.made is not None
    assert (state.made["name"], state.made["organization"], state.made["visibility"]) == ("tiny", "me", "private")
    assert state.messages == ["Four bits"]
    assert "model-00001-of-00009.safetensors" not in state.files
    assert state.files["notes.txt"] == b"mine"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert state.files[name] == (quantized_llama / name).read_bytes()
    assert json.loads(state.files["config.json"]) == json.loads((quantized_llama / "config.json").read_text())
    (tmp_path / "again.safetensors").write_bytes(state.files["model.safetensors"])
    from safetensors.torch import load_file

    before, after = load_file(quantized_llama / "model.safetensors"), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert b'halfbyte.load("me/tiny")' in state.files["README.md"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "ConfigError: me/tiny: no token of the hub; `hf auth login`, set HF_TOKEN, or pass token="),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "ConfigError: me/tiny: HF_HUB_OFFLINE is set, so nothing is upl"),
        ({"HF_TOKEN": "hf_wrong"}, "OutputError: me/tiny: the hub did not take it ("),
    ],
)
def test_what_cannot_be_uploaded_says_so_in_a_line(
    quantized_llama: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    with hub() as state:
        done = push(quantized_llama, tmp_path, HF_ENDPOINT=state.address, **variables)
    assert message in done.stderr.splitlines()[-1]
    assert not state.files
