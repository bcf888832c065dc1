"""From what a caller gives to token ids: a string as it is, or a conversation through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import ConfigError

Prompt = str | Sequence[dict[str, str]]
Prompts = list[str] | Sequence[Sequence[dict[str, str]]]


def encode_prompt(tokenizer: Any, prompt: Prompt, folder: Path) -> torch.Tensor:
    """Token ids int64 [tokens].

    Args:
        tokenizer: of transformers.
        prompt: a string, or messages [{"role": …, "content": …}].
        folder: where the tokenizer was read from, for errors.

    Raises:
        ConfigError: nothing to encode, messages for a tokenizer without a template, or some the template refuses.
    """
    if not prompt:
        raise ConfigError("prompt: empty; give at least one character")
    _check_text([prompt] if isinstance(prompt, str) else [value for message in prompt for value in message.values()])
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ConfigError(f"{folder}: its tokenizer has no chat template; give the prompt as a string")
    else:
        ids = _apply_template(tokenizer, prompt, folder)
    if not ids:
        raise ConfigError("prompt: empty; give at least one character")
    return torch.tensor(ids, dtype=torch.int64)


def as_prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """A prompt, a string or a list of messages, alone in a list; or those of a list of them, and whether it was one.

    Raises:
        ConfigError: a list with something else in it.
    """
    if isinstance(prompt, str) or not prompt or _is_conversation(prompt):
        return [prompt], False
    for one in prompt:
        if not isinstance(one, str) and not _is_conversation(one):
            raise ConfigError(
                "prompt: expected a string, a list of messages with role and content, or a list of either; "
                f"got a list with {one!r:.80}"
            )
    return list(prompt), True


def _apply_template(tokenizer: Any, messages: Sequence[dict[str, str]], folder: Path) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids: list[int] = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"]
    except TemplateError as error:
        raise ConfigError(f"{folder}: its chat template refuses the messages: {error}") from None
    return ids


def _check_text(texts: Iterable[Any]) -> None:
    """Refuse what bytes that are no UTF-8 become on a command line, before the tokenizer does so in its own words."""
    for text in texts:
        try:
            str(text).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt: not UTF-8 text (character {error.start}); convert it first") from None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(message, Mapping) for message in value)
