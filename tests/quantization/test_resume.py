"""Interrupt a quantization anywhere, run it again: the same checkpoint, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.checkpoints import journal as journal_module
from halfbyte.checkpoints.journal import Journal
from halfbyte.errors import HalfbyteError, OutputError
from halfbyte.quantization import identity, pipeline, states
from halfbyte.quantization.budget import MemoryPlan
from tests.conftest import TEXT, make_llama

SETTINGS: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 6, "max_calib_seq_len": 48}
QUICK = QuantConfig(n_grid=2)
BLOCKS = 3


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and nothing is written after it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run gives."""
    output = tmp_path_factory.mktemp("whole") / "out"
    halfbyte.quantize(model, output, QUICK, **SETTINGS)
    return output


@pytest.fixture(scope="module")
def wholes(model: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same without and with propagation of errors."""
    output = tmp_path_factory.mktemp("whole") / "propagated"
    halfbyte.quantize(model, output, replace(QUICK, propagate=True), **SETTINGS)
    return {False: whole, True: output}


def contents(folder: Path) -> dict[str, Any]:
    """Every file; the manifest without what was measured."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["halfbyte_manifest.json"])
    assert set(manifest.pop("run")) == {"seconds", "peak_memory_bytes", "blocks"}
    return {**found, "halfbyte_manifest.json": manifest}


@contextmanager
def killed_after(records: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next run ends when it has finished so many blocks."""
    record = Journal.record

    def counting(self: Journal, *arguments: Any) -> None:
        record(self, *arguments)
        if len(self.records) == records:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", counting)
        with pytest.raises(Killed):
            yield


def spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pipeline.plan_memory
    monkeypatch.setattr(
        pipeline, "plan_memory", lambda *a, **k: MemoryPlan(plan(*a, **k).batch_tokens, spill=True, expected_bytes=0)
    )


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize(("done", "every", "spill"), [(1, 1, False), (2, 2, True), (2, 4, False), (3, 2, False)])
def test_a_resumed_run_ends_in_the_same_bits(
    done: int,
    every: int,
    spill: bool,
    propagate: bool,
    model: Path,
    wholes: dict[bool, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(QUICK, propagate=propagate)
    monkeypatch.setattr(states, "SAVE_EVERY", every)
    if spill:
        spilled(monkeypatch)
    with killed_after(done, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    capsys.readouterr()
    report = halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("halfbyte:")]
    assert len(lines) == 1
    assert f"{done} of {BLOCKS} blocks are done" in lines[0]
    assert contents(tmp_path / "out") == contents(wholes[propagate])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(report.blocks) == BLOCKS
    assert all(block.seconds > 0 and block.peak_memory_bytes > 1e8 for block in report.blocks)


def test_one_calibration_block_less_is_another_result(model: Path, whole: Path, tmp_path: Path) -> None:
    """The comparison above can fail."""
    halfbyte.quantize(model, tmp_path / "out", QUICK, **{**SETTINGS, "max_calib_samples": 5})
    assert contents(tmp_path / "out")["model.safetensors"] != contents(whole)["model.safetensors"]


def test_propagation_is_another_result(wholes: dict[bool, Path]) -> None:
    plain, propagated = (contents(wholes[on])["model.safetensors"] for on in (False, True))
    assert plain != propagated


def test_rounding_to_nearest_resumes_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halfbyte.quantize(model, tmp_path / "whole", QuantConfig(method="rtn"))
    with killed_after(1, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", QuantConfig(method="rtn"))
    halfbyte.quantize(model, tmp_path / "out", QuantConfig(method="rtn"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("propagate", [False, True])
def test_a_state_lost_costs_time_and_nothing_else(
    propagate: bool, model: Path, wholes: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states are computed again through the blocks that are done; a damaged block is quantized again."""
    config = replace(QUICK, propagate=propagate)
    monkeypatch.setattr(states, "SAVE_EVERY", 1)
    with killed_after(2, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    work = tmp_path / ".out.partial"
    assert list((work / "states").iterdir())
    for state in (work / "states").iterdir():
        state.write_bytes(b"\0" * state.stat().st_size)
    block = work / "blocks" / "0.safetensors"
    block.write_bytes(block.read_bytes()[:-8] + b"damaged!")
    recorded: list[int] = []
    record = Journal.record
    monkeypatch.setattr(Journal, "record", lambda self, index, *a: (recorded.append(index), record(self, index, *a)))
    halfbyte.quantize(model, tmp_path / "out", config, **SETTINGS)
    assert recorded == [0, 2]
    assert contents(tmp_path / "out") == contents(wholes[propagate])


def test_threads_are_those_the_run_began_with(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(1, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        report = halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert report.threads == before
    assert contents(tmp_path / "out") == contents(whole)


def other_weights(model: Path, tmp: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp / "tuned")
    tensors = load_file(tmp / "tuned" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return tmp / "tuned"


Change = Callable[[Path, Path, pytest.MonkeyPatch], dict[str, Any]]
CHANGES: dict[str, tuple[Change, str]] = {
    "option": (lambda *_: {"config": QuantConfig(n_grid=3)}, "option n_grid was 2 and is now 3"),
    "seed": (lambda *_: {"seed": 7}, "option seed was 0 and is now 7"),
    "text": (lambda *_: {"calibration": [TEXT.upper()]}, "the calibration text has changed"),
    "weights": (
        lambda model, tmp, _: {"model": other_weights(model, tmp)},
        "the model's weights or config has changed",
    ),
    "torch": (
        lambda _m, _t, patch: patch.setattr(identity, "versions", lambda: {"torch": "1.0"}) or {},
        "version of torch was .* and is now 1.0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_does_not_resume_and_says_why(
    change: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(1, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    make, message = CHANGES[change]
    with monkeypatch.context() as patch:
        changed = {"model": model, "output_dir": tmp_path / "out", "config": QUICK, **SETTINGS}
        changed |= make(model, tmp_path, patch)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputError, match=message) as error:
            halfbyte.quantize(**changed)
        assert "\n" not in str(error.value)
        assert "--overwrite" in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before


def test_overwriting_drops_an_unfinished_run_of_another_kind(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(2, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", QuantConfig(method="rtn"))
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS, overwrite=True)
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_resumes_the_same_run(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halfbyte.quantize(model, tmp_path / "out", QuantConfig(method="rtn"))
    old = contents(tmp_path / "out")
    with killed_after(2, monkeypatch):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS, overwrite=True)
    assert contents(tmp_path / "out") == old
    with pytest.raises(OutputError, match="--overwrite"):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    recorded: list[int] = []
    record = Journal.record
    monkeypatch.setattr(Journal, "record", lambda self, index, *a: (recorded.append(index), record(self, index, *a)))
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS, overwrite=True)
    assert recorded == [2]
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("moment", ["before the rename", "after the rename", "while cleaning up"])
def test_a_kill_around_the_last_rename(
    moment: str, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.checkpoints.writer import CheckpointWriter

    swap = CheckpointWriter._swap_in

    def swap_in(self: CheckpointWriter) -> None:
        if moment != "before the rename":
            swap(self)
        raise Killed

    def clear_half(self: Journal) -> None:
        shutil.rmtree(self.folder / "blocks")
        raise Killed

    with monkeypatch.context() as patch:
        # A killed process runs no `finally`: what `with` would tidy up stays.
        patch.setattr(Journal, "__exit__", lambda self, *_: clear_half(self) if moment.startswith("while") else None)
        patch.setattr(CheckpointWriter, "__exit__", lambda *_: None)
        patch.setattr(journal_module.fcntl, "flock", lambda *_: None)
        if not moment.startswith("while"):
            patch.setattr(CheckpointWriter, "_swap_in", swap_in)
        with pytest.raises(Killed):
            halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    report = halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(report.linears) == 7 * BLOCKS
    with pytest.raises(OutputError, match="exists and is not empty"):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)


def test_errors_after_the_first_block_say_what_is_kept(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.checkpoints import writer

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", no_space)
        with pytest.raises(OutputError, match="the disk is full.*3 of 3 blocks are finished and kept; run the same"):
            halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert contents(tmp_path / "out") == contents(whole)


def test_ctrl_c_says_what_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Journal.record

    def interrupted(self: Journal, *arguments: Any) -> None:
        record(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C; 1 of 3 blocks are finished and kept"):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)


def test_two_runs_do_not_share_a_folder(model: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "out"), pytest.raises(HalfbyteError, match="another run is writing it"):
        halfbyte.quantize(model, tmp_path / "out", QUICK, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
