from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.errors import CalibrationError
from halfbyte.quantization import calibration as room
from halfbyte.quantization import calibration_sources
from halfbyte.quantization.calibration import build_calibration_set, builtin_documents, read_documents, split_text


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
    documents = read_documents(path)
    assert list(documents) == ["one\ntwo\n"]
    assert documents.source == "text.txt"
    assert read_documents(documents) is documents


def test_bad_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "binary.txt").write_bytes(b"\x01\x00\x02")
    (tmp_path / "nothing.jsonl").write_bytes(b"")
    cases: list[tuple[Any, str]] = [
        (tmp_path / "empty.txt", "empty"),
        (tmp_path / "latin.txt", "not UTF-8 text .byte 3."),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path / "binary.txt", "zero bytes, so it is a binary file"),
        (tmp_path / "nothing.jsonl", "empty"),
        ("wikitex", "no such file; give builtin, self, a text or JSONL file, or a data set .wikitext2"),
        ("none.jsonl:text", "no such file"),
        ("self", "halfbyte.quantize"),
        ([], "empty"),
        (["", "  "], "empty"),
        (["text", 3], r"calibration\[1\]: expected a string or a list of chat messages, got int"),
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


# Lines, arrays, conversations in files


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs has a crow?"},
    {"role": "assistant", "content": "Two legs, and two wings beside them."},
    {"role": "user", "content": "And a spider?"},
    {"role": "assistant", "content": " Eight legs.  "},
]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_a_line_is_a_string_an_object_or_a_conversation(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", "one", {"text": "two", "id": 2}, {"messages": CHAT}, CHAT)
    assert list(read_documents(path)) == ["one", "two", CHAT, CHAT]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(["one", {"text": "two"}, CHAT], indent=1))
    assert list(read_documents(array)) == ["one", "two", CHAT]
    array.write_text(json.dumps(CHAT, indent=1))
    assert list(read_documents(array)) == [CHAT]


def test_the_field_stands_after_a_colon(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": "a", "body": "b"}, {"body": "c"})
    assert list(read_documents(f"{path}:body")) == ["b", "c"]
    with pytest.raises(CalibrationError, match=r'rows.jsonl, line 2: no field "text" or "messages", only body'):
        read_documents(path)


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(read_documents(path)) == ["one\ntwo\n"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not JSON"),
        ("plain text", "line 2: not JSON"),
        ("7", "line 2: expected a string or a list of chat messages, got int"),
        ('{"text": 7}', 'line 2, field "text": expected a string or a list of chat messages, got int'),
        ('[{"role": "human", "content": "a"}]', "line 2, message 1: unknown role 'human'; expected one of system"),
        ('[{"from": "human", "value": "a"}]', 'line 2, message 1: expected {"role"'),
        ('[{"role": "user", "content": 7}]', "line 2, message 1: expected content of text, got int"),
        ("[" * 100_000, "line 2: nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(CalibrationError, match=message) as error:
        read_documents(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_of_a_giant_file_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_sources, "READ_BYTES", 21)
    path = tmp_path / "big.txt"
    path.write_text("é" * 100, encoding="utf-8")
    assert list(read_documents(path)) == ["é" * 10]
    rows = lines(tmp_path / "big.jsonl", *["word"] * 100)
    assert list(read_documents(rows)) == ["word"] * 3


# Much text


def test_pieces_make_up_the_text_and_end_between_words() -> None:
    text = "Count (one) two, three.\nFour  five\n\nsix " * 200
    pieces = list(split_text(text, 1000))
    assert "".join(pieces) == text
    assert all(900 < len(piece) <= 1000 for piece in pieces[:-1])
    assert all(piece[0].isalpha() or (piece[0] == " " and piece[1].isalpha()) for piece in pieces)
    assert list(split_text("a" * 2500, 1000)) == ["a" * 1000, "a" * 1000, "a" * 500]
    assert list(split_text("")) == [""]


def test_tokens_of_pieces_are_those_of_the_whole(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.architectures.tokenizer import load_tokenizer
    from tests.conftest import TEXT

    tokenizer = load_tokenizer(tiny_llama)
    whole = tokenizer(TEXT)["input_ids"]
    monkeypatch.setattr(room, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(room.split_text, "__defaults__", (1000,))
    found = build_calibration_set(tokenizer, [TEXT], max_calib_samples=1, max_calib_seq_len=len(whole), seed=0)
    assert found.blocks[0].tolist() == whole


@pytest.mark.parametrize("unit", ["word ", "x"])
def test_one_line_of_five_million_characters(unit: str, tiny_llama: Path, tmp_path: Path) -> None:
    from halfbyte.architectures.tokenizer import load_tokenizer

    path = tmp_path / "line.txt"
    path.write_text(unit * (5_000_000 // len(unit)))
    found = build_calibration_set(load_tokenizer(tiny_llama), path, max_calib_samples=8, max_calib_seq_len=512, seed=0)
    assert [len(block) for block in found.blocks] == [512] * 8


def test_of_too_much_text_the_seed_chooses_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TOKENIZED_CHARACTERS", 4 * 32)
    monkeypatch.setattr(room, "CHARACTERS_PER_TOKEN", 1)
    documents = [chr(65 + i) * 32 for i in range(26)]
    found = build(documents, max_calib_samples=4)
    assert len(found.blocks) == 4
    again, other = (build(documents, max_calib_samples=4, seed=seed) for seed in (0, 1))
    assert found.sha256 == again.sha256 != other.sha256


# Conversations

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only the last answer keeps its opening, as in templates that drop earlier reasoning.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}<think></think>{% endif %}{{ m['content'] }}<eos>\n{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<{% generation %}{{ m['content'] }}<eos>{% endgeneration %}>"
    "{% else %}({{ m['role'] }}: {{ m['content'] }}){% endif %}{% endfor %}"
)


def chat_tokenizer(folder: Path, template: str | None) -> Any:
    from halfbyte.architectures.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def counted_text(tokenizer: Any, found: Any) -> list[str]:
    """The runs of tokens that count."""
    (ids,), (mask,) = found.blocks, found.masks
    runs, current = [], []
    for token, counts in [*zip(ids.tolist(), mask.tolist(), strict=True), (0, False)]:
        if counts:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


ANSWERS = ["Two legs, and two wings beside them.<eos>", "Eight legs.<eos>"]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ANSWERS),
        (FORGETFUL, [ANSWERS[0], " Eight legs.  <eos>"]),
        (MARKED, [ANSWERS[0], " Eight legs.  <eos>"]),
    ],
)
def test_what_the_assistant_wrote_counts(tiny_llama: Path, template: str, answers: list[str]) -> None:
    tokenizer = chat_tokenizer(tiny_llama, template)
    sizes: dict[str, Any] = {"max_calib_samples": 4, "max_calib_seq_len": 1024, "seed": 0}
    found = build_calibration_set(tokenizer, [CHAT], **sizes)
    assert found.blocks[0].tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert counted_text(tokenizer, found) == answers
    assert found.source == "list of 1 conversations"
    assert found.describe()["counted_tokens"] == found.counted == int(found.masks[0].sum()) < found.tokens

    every = build_calibration_set(tokenizer, read_documents([CHAT], assistant_only=False), **sizes)
    assert every.masks is None
    assert torch.equal(every.blocks[0], found.blocks[0])
    assert every.counted == every.tokens
    assert every.sha256 != found.sha256


def test_answers_that_repeat_what_stands_around_them_are_found(tiny_llama: Path) -> None:
    tokenizer = chat_tokenizer(tiny_llama, CHATML)
    chat = [{"role": role, "content": "No No"} for role in ("user", "assistant", "user", "assistant")]
    found = build_calibration_set(tokenizer, [chat], max_calib_samples=1, max_calib_seq_len=1024, seed=0)
    assert counted_text(tokenizer, found) == ["No No<eos>"] * 2


def test_blocks_without_a_word_of_the_assistant_are_not_run(tiny_llama: Path) -> None:
    tokenizer = chat_tokenizer(tiny_llama, CHATML)
    chat = [{"role": "user", "content": "Why? " * 200}, {"role": "assistant", "content": "Because."}]
    found = build_calibration_set(
        tokenizer, [chat, "plain text of some length, all of which counts"],
        max_calib_samples=100, max_calib_seq_len=32, seed=0,
    )  # fmt: skip
    assert 2 <= len(found.blocks) <= 5
    assert found.masks is not None
    assert all(mask.any() for mask in found.masks)
    assert any(mask.all() for mask in found.masks)


def test_conversations_that_cannot_serve_are_refused(tiny_llama: Path) -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    slow = SimpleNamespace(is_fast=False, chat_template=CHATML)
    cases: list[tuple[Any, Any, str]] = [
        (chat_tokenizer(tiny_llama, None), [CHAT], "document 1: this model's tokenizer has no chat template"),
        (chat_tokenizer(tiny_llama, refusing), [CHAT], r"refuses the conversation \(roles must alternate\)"),
        (chat_tokenizer(tiny_llama, CHATML), [CHAT[:2]], "none of them the assistant's, too little"),
        (chat_tokenizer(tiny_llama, CHATML), CHAT, r"calibration\[0\]: expected a string or a list of chat messages"),
        (slow, [CHAT], "cannot tell which text a token comes from"),
    ]
    for tokenizer, calibration, message in cases:
        with pytest.raises(CalibrationError, match=message) as error:
            build_calibration_set(tokenizer, calibration, max_calib_samples=4, max_calib_seq_len=512, seed=0)
        assert "\n" not in str(error.value)


# Data sets


class FakeDatasets:
    """Stands in for the library: remembers what was asked for."""

    def __init__(self, rows: Sequence[Any]):
        self.rows, self.asked = rows, []  # type: ignore[var-annotated]

    def load_dataset(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((*args, kwargs["split"]))
        if kwargs["split"] == "none":
            raise ValueError('Unknown split "none".\nShould be one of train.')
        return iter(self.rows)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    library = FakeDatasets([{"id": 1, "text": "one", "body": "1"}, {"id": 2, "text": "two", "body": "2"}])
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    return library


@pytest.mark.parametrize(
    ("spelling", "asked"),
    [
        ("c4", ("allenai/c4", "en", "train")),
        ("c4::validation", ("allenai/c4", "en", "validation")),
        ("pileval", ("mit-han-lab/pile-val-backup", None, "validation")),
        ("allenai/c4:de", ("allenai/c4", "de", "train")),
        ("squad:plain_text:validation", ("squad", "plain_text", "validation")),
    ],
)
def test_a_data_set_is_spelled_name_config_split(fake: FakeDatasets, spelling: str, asked: tuple[Any, ...]) -> None:
    documents = read_documents(spelling)
    assert list(documents) == ["one", "two"]
    assert documents.source == spelling
    assert fake.asked == [asked]


def test_its_field_comes_last(fake: FakeDatasets) -> None:
    assert list(read_documents("squad:::body")) == ["1", "2"]
    with pytest.raises(CalibrationError, match='squad:::title, row 1: no field "title", only id, text, body'):
        read_documents("squad:::title")


def test_rows_of_wikitext_become_articles(fake: FakeDatasets) -> None:
    fake.rows = [{"text": text} for text in ("", " = A = \n", " = = Part = = \n", " of A\n", " = B = \n", " of B\n")]
    assert list(read_documents("wikitext2")) == [" = A = \n = = Part = = \n of A\n", " = B = \n of B\n"]


def test_what_the_library_says_is_said_in_one_line(fake: FakeDatasets) -> None:
    with pytest.raises(CalibrationError, match='squad::none: datasets cannot load it .Unknown split "none"') as error:
        read_documents("squad::none")
    assert "\n" not in str(error.value)
    with pytest.raises(CalibrationError, match="at most NAME:CONFIG:SPLIT:FIELD"):
        read_documents("a:b:c:d:e")


def test_an_endless_data_set_is_read_as_far_as_needed(fake: FakeDatasets) -> None:
    fake.rows = iter(lambda: {"text": "word " * 100_000}, None)  # type: ignore[assignment]
    assert 30 < len(read_documents("c4")) < 40


def test_without_the_library_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_documents("c4")


def test_a_local_folder_is_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    assert list(read_documents(str(tmp_path))) == ["one", "two"]
    with pytest.raises(CalibrationError, match="datasets cannot load it .*test"):
        read_documents(f"{tmp_path}::test")


def test_a_folder_that_datasets_saved_is_opened_as_such(fake: FakeDatasets, tmp_path: Path) -> None:
    fake.load_from_disk = lambda name: {"train": fake.rows} if name.endswith("splits") else fake.rows  # type: ignore[attr-defined]
    for folder, file in (("one", "state.json"), ("splits", "dataset_dict.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
        assert list(read_documents(tmp_path / folder)) == ["one", "two"]
    assert fake.asked == []
