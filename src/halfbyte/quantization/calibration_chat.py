"""Conversations → tokens, and which of them the assistant wrote."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import CalibrationError

if TYPE_CHECKING:
    from halfbyte.quantization.calibration_sources import Conversation

# A template with this block says itself what the assistant writes.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Two answers that differ in their first and in their last letter.
PROBES = ("Yes", "No")


def chat_tokens(
    tokenizer: Any, conversation: Conversation, *, assistant_only: bool, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render a conversation through the tokenizer's chat template.

    Args:
        tokenizer: the model's (Hugging Face).
        conversation: messages with a role and content.
        assistant_only: find out what the assistant wrote; else everything counts.
        where: names the conversation in messages.

    Returns:
        int64 [tokens], and bool [tokens]: whether a token counts. With `assistant_only` these are what the template's
        {% generation %} block encloses, or without one the text of the assistant's turns and the special token right
        after each.

    Raises:
        CalibrationError: no template, or one that refuses the conversation; no way to tell who wrote what.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(f"{where}: this model's tokenizer has no chat template; give texts, not conversations")
    messages = [dict(message) for message in conversation]
    if not assistant_only:
        ids = torch.tensor(_render(tokenizer, messages, where, return_dict=True)["input_ids"], dtype=torch.int64)
        return ids, torch.ones(len(ids), dtype=torch.bool)
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError(
            f"{where}: this tokenizer cannot tell which text a token comes from, so not who wrote it; "
            "count all turns (--all-turns, or read_documents(..., assistant_only=False))"
        )
    if GENERATION.search(tokenizer.get_chat_template()):
        found = _render(tokenizer, messages, where, return_dict=True, return_assistant_tokens_mask=True)
        return torch.tensor(found["input_ids"], dtype=torch.int64), torch.tensor(found["assistant_masks"]) != 0
    text = _render(tokenizer, messages, where, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    starts, ends = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2).T
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.int64))
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in _assistant_spans(tokenizer, messages, text, where):
        inside = (starts < end) & (ends > start)
        mask |= inside
        after = int(inside.nonzero()[-1]) + 1 if inside.any() else len(ids)
        if after < len(ids):
            mask[after] |= special[after]  # <|im_end|> and its like: the assistant ends its turn
    return ids, mask


def _assistant_spans(tokenizer: Any, messages: list[dict[str, Any]], text: str, where: str) -> list[tuple[int, int]]:
    """Where in the rendered text the content of each assistant message stands.

    Rendered with two other answers in its place, all that is not the answer stays the same. This holds where the
    rendering of the first messages alone is not how the whole begins, as in templates that drop earlier reasoning.
    """
    spans = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if message["role"] != "assistant" or not content:
            continue
        others = []
        for probe in PROBES:
            replaced = {**message, "content": probe if isinstance(content, str) else [{"type": "text", "text": probe}]}
            others.append(
                _render(tokenizer, [*messages[:index], replaced, *messages[index + 1 :]], where, tokenize=False)
            )
        start = _common(text, *others)
        spans.append((start, len(text) - _common(text[start:][::-1], *(other[::-1] for other in others))))
    return spans


def _common(*texts: str) -> int:
    """How many characters all of them begin with."""
    shortest = min(map(len, texts))
    return next((at for at in range(shortest) if len({text[at] for text in texts}) > 1), shortest)


def _render(tokenizer: Any, messages: list[dict[str, Any]], where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{where}: the chat template refuses the conversation ({reason})") from error
