"""Where calibration text comes from: prose that ships with Python, files, lists, chats, data sets.

"builtin"                         the language reference in pydoc
notes.txt                         a UTF-8 text file, one document
chats.jsonl  rows.jsonl:FIELD     one document a line: a string, an object, or a list of chat messages
wikitext2  NAME:CONFIG:SPLIT      a data set, see calibration_datasets.py
["text", ...]  [[{"role": ...}]]  documents or conversations
"self"                            text the model writes; `halfbyte.quantize` has it written and hands it down
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from halfbyte.errors import CalibrationError
from halfbyte.quantization.calibration_datasets import SHORT_NAMES, names_data_set, read_data_set

Conversation = Sequence[Mapping[str, Any]]
Document = str | Conversation
Calibration = str | Path | Sequence[str | Conversation]

HELD_OUT_EVERY = 5
# Shorter runs of text (a heading, "Changed in version 3.8") recur without meaning that the prose does.
PARAGRAPH_CHARACTERS = 80
# Of a file: some 15 million tokens, a hundred times what a long calibration uses.
READ_BYTES = 64 << 20
LINE_SUFFIXES = (".jsonl", ".json")
TEXT_FIELDS = ("text", "messages")
ROLES = ("system", "developer", "user", "assistant", "tool")


class Documents(Sequence[Document]):
    """Documents and what they are called; made when they are first needed, and once.

    Args:
        source: for the manifest and for messages.
        make: returns the documents.
        assistant_only: of conversations, only the tokens the assistant wrote count in the statistics.
    """

    def __init__(self, source: str, make: Callable[[], Iterable[Document]], *, assistant_only: bool = True):
        self.source = source
        self.assistant_only = assistant_only
        self._make = make

    @cached_property
    def items(self) -> tuple[Document, ...]:
        """All of them, checked.

        Raises:
            CalibrationError: something that is neither text nor a conversation, or nothing but white space.
        """
        documents = tuple(self._make())
        if not any(document.strip() if isinstance(document, str) else document for document in documents):
            raise CalibrationError(f"calibration {self.source}: empty; give text to calibrate on")
        return documents

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...

    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def read_documents(calibration: Calibration, *, assistant_only: bool = True) -> Documents:
    """The documents that `calibration` names or is.

    Args:
        calibration: one of the spellings at the top of this file; `Documents` come back as they are.
        assistant_only: of conversations, only the tokens the assistant wrote count in the statistics.

    Raises:
        CalibrationError: no such file or data set, not text, a broken line, or nothing but white space.
    """
    if isinstance(calibration, Documents):
        documents = calibration
    elif isinstance(calibration, str | Path):
        documents = Documents(*_named(str(calibration)), assistant_only=assistant_only)
    else:
        given = list(calibration)
        chats = any(not isinstance(document, str) for document in given)
        documents = Documents(
            f"list of {len(given)} {'conversations' if chats else 'strings'}",
            lambda: (checked(document, f"calibration[{index}]") for index, document in enumerate(given)),
            assistant_only=assistant_only,
        )
    _ = documents.items  # bad text is refused here, not later
    return documents


def _named(name: str) -> tuple[str, Callable[[], Iterable[Document]]]:
    """What a string stands for: its name in the manifest, and how to read it."""
    if name == "builtin":
        return name, builtin_documents
    if name == "self":
        raise CalibrationError('calibration "self": the model writes it for halfbyte.quantize; call that')
    path, field = Path(name), None
    if not path.exists() and (stem := name.rpartition(":")[0]).endswith(LINE_SUFFIXES):
        path, field = Path(stem), name.rpartition(":")[2]
    if path.is_file():
        if path.suffix in LINE_SUFFIXES:
            return path.name, lambda: _read_lines(path, field)
        return path.name, lambda: [_read_text(path)[0]]
    if names_data_set(name):
        return name, lambda: (document_of(row, field, where) for row, field, where in read_data_set(name))
    raise CalibrationError(
        f"calibration {name!r}: no such file; give builtin, self, a text or JSONL file, or a data set "
        f"({', '.join(SHORT_NAMES)}, or NAME:CONFIG:SPLIT)"
    )


def _read_text(path: Path) -> tuple[str, bool]:
    """The text of a file, of a giant one its beginning; and whether that is all of it.

    Raises:
        CalibrationError: unreadable, binary, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(READ_BYTES)
            whole = not file.read(1)
        # The last character of a beginning may be cut in two: an incremental decoder leaves it out.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration {path}: not UTF-8 text (byte {error.start}); convert it, or give a text or JSONL file"
        ) from None
    except OSError as error:
        raise CalibrationError(f"calibration {path}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise CalibrationError(f"calibration {path}: holds zero bytes, so it is a binary file; give text")
    return text.replace("\r\n", "\n").replace("\r", "\n"), whole


def _read_lines(path: Path, field: str | None) -> Iterator[Document]:
    """The documents of a JSONL file, or of one JSON array."""
    text, whole = _read_text(path)
    if whole and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            rows = None  # lines that each hold a list
        if rows is not None:
            if any(isinstance(row, Mapping) and "role" in row for row in rows):
                rows = [rows]  # one conversation, not an array of rows
            for index, row in enumerate(rows):
                yield document_of(row, field, f"calibration {path}, row {index + 1}")
            return
    lines = text.split("\n")
    for number, line in enumerate(lines if whole else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"calibration {path}, line {number}: not JSON ({error.msg}, column {error.colno}); "
                "every line must hold a string, an object or a list of chat messages"
            ) from None
        except RecursionError:
            raise CalibrationError(f"calibration {path}, line {number}: nested too deeply") from None
        yield document_of(row, field, f"calibration {path}, line {number}")


def document_of(row: Any, field: str | None, where: str) -> Document:
    """The document in a row of a file or data set.

    Args:
        row: a string, chat messages, or an object with either in one of its fields.
        field: which; None for "text", else "messages".
        where: names the row in messages.

    Raises:
        CalibrationError: no such field, or no document in it.
    """
    if not isinstance(row, Mapping):
        return checked(row, where)
    chosen = field if field is not None else next((name for name in TEXT_FIELDS if name in row), None)
    if chosen is None or chosen not in row:
        wanted = " or ".join(f'"{name}"' for name in (TEXT_FIELDS if field is None else (field,)))
        has = ", ".join(str(name) for name in row) or "none"
        raise CalibrationError(
            f"{where}: no field {wanted}, only {has}; name the one to read after a colon (see --help)"
        )
    return checked(row[chosen], f'{where}, field "{chosen}"')


def checked(document: Any, where: str) -> Document:
    """The same document, if it is one.

    Raises:
        CalibrationError: neither a string nor messages with a role the chat templates know.
    """
    if isinstance(document, str):
        return document
    if not isinstance(document, Sequence) or isinstance(document, bytes):
        raise CalibrationError(f"{where}: expected a string or a list of chat messages, got {type(document).__name__}")
    for index, message in enumerate(document):
        if not isinstance(message, Mapping) or "role" not in message:
            raise CalibrationError(f'{where}, message {index + 1}: expected {{"role": …, "content": …}}')
        if message["role"] not in ROLES:
            raise CalibrationError(
                f"{where}, message {index + 1}: unknown role {message['role']!r}; expected one of {', '.join(ROLES)}"
            )
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise CalibrationError(
                f"{where}, message {index + 1}: expected content of text, got {type(content).__name__}"
            )
    return document


def builtin_documents(split: str = "calibration") -> list[str]:
    """Prose that ships with Python itself: the language reference, one topic a document.

    Args:
        split: "calibration", or "heldout" for about a fifth that shares no paragraph with it.
    """
    from pydoc_data.topics import topics

    families = _families([topics[name] for name in sorted(topics)])
    held_out = split == "heldout"
    return [
        document
        for index, family in enumerate(sorted(families, key=len))
        for document in family
        if (index % HELD_OUT_EVERY == 0) == held_out
    ]


def _families(documents: Sequence[str]) -> list[list[str]]:
    """Documents that share a paragraph stand together: pydoc prints the same section under several topics."""
    families: list[tuple[list[str], set[str]]] = []
    for document in dict.fromkeys(documents):
        paragraphs = {text for part in document.split("\n\n") if len(text := part.strip()) >= PARAGRAPH_CHARACTERS}
        related = [family for family in families if family[1] & paragraphs]
        families = [family for family in families if not family[1] & paragraphs]
        members = [member for family in related for member in family[0]] + [document]
        families.append((members, paragraphs.union(*(family[1] for family in related))))
    return [members for members, _ in families]
