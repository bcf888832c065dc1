from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import CalibrationError
from halfbyte.quantization.calibration import build_calibration_set, builtin_documents, read_documents


class Characters:
    """A tokenizer with one token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def build(calibration: Any, **overrides: Any) -> Any:
    settings = {"max_calib_samples": 100, "max_calib_seq_len": 32, "seed": 0, **overrides}
    return build_calibration_set(Characters(), calibration, **settings)


def test_a_long_document_is_cut_not_dropped() -> None:
    text = "".join(chr(33 + i % 90) for i in range(32 * 5 + 20))
    found = build([text])
    assert sorted(len(block) for block in found.blocks) == [20, 32, 32, 32, 32, 32]
    assert found.tokens == len(text)
    kept = {"".join(map(chr, block.tolist())) for block in found.blocks}
    assert kept == {text[i : i + 32] for i in range(0, len(text), 32)}


def test_no_block_spans_two_documents() -> None:
    found = build(["a" * 50, "b" * 50])
    assert all(len(set(block.tolist())) == 1 for block in found.blocks)


def test_full_blocks_are_kept_first_and_the_seed_decides_which() -> None:
    text = "".join(chr(33 + i % 90) for i in range(32 * 20 + 20))
    first, again, other = (build([text], max_calib_samples=4, seed=seed) for seed in (0, 0, 1))
    assert all(len(block) == 32 for block in first.blocks)
    assert all(torch.equal(a, b) for a, b in zip(first.blocks, again.blocks, strict=True))
    assert first.sha256 == again.sha256 != other.sha256


def test_builtin_text_is_long_and_its_held_out_part_is_disjoint() -> None:
    calibration, heldout = builtin_documents(), builtin_documents("heldout")
    assert sum(map(len, calibration)) > 200_000
    assert sum(map(len, heldout)) > 40_000

    def paragraphs(documents: list[str]) -> set[str]:
        return {part.strip() for text in documents for part in text.split("\n\n") if len(part.strip()) >= 80}

    assert not paragraphs(calibration) & paragraphs(heldout)


def test_a_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert read_documents(path) == (["one\ntwo\n"], "text.txt")


def test_bad_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases: list[tuple[Any, str]] = [
        (tmp_path / "empty.txt", "empty"),
        (tmp_path / "latin.txt", "not UTF-8 text .byte 3."),
        (tmp_path / "none.txt", "no such file"),
        ([], "empty"),
        (["", "  "], "empty"),
        (["text", 3], r"calibration\[1\]: expected a string, got int"),
    ]
    for calibration, message in cases:
        with pytest.raises(CalibrationError, match=message) as error:
            read_documents(calibration)
        assert "\n" not in str(error.value)


def test_one_word_is_too_little() -> None:
    with pytest.raises(CalibrationError, match="5 tokens, too little to calibrate on"):
        build(["hello"])


@pytest.mark.parametrize("bad", [{"max_calib_samples": 0}, {"max_calib_seq_len": 3}])
def test_sizes_that_leave_nothing_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="at least"):
        build(["a" * 100], **bad)
