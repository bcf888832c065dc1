"""How likely a model finds given continuations of given contexts: what multiple choice and last-word tests ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.generation.model import Model
from halfbyte.runtime.engine import Batch, Engine

# Rows of logits that are in memory at once: 256 of a vocabulary of 150,000 are 150 MB.
MOST_ROWS = 256
# What lm-evaluation-harness takes where neither the configuration nor the tokenizer says.
DEFAULT_CONTEXT = 2048
# A tokenizer without a limit has 10^30 for one.
NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation behind a context.

    Attributes:
        logprob: log p(continuation | context) in nats, summed over its tokens.
        greedy: whether each of its tokens is the most likely one at its place, so that greedy decoding writes it.
    """

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class _Group:
    """Continuations of one context, each with the number of the pair it came from."""

    context: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]]

    @property
    def length(self) -> int:
        """Tokens that go through the model at most at once; the last of a continuation predicts nothing."""
        return len(self.context) + max(len(ids) for _, ids in self.continuations) - 1


def context_length(model: Model) -> int:
    """Tokens a sequence of the model may have: of the configuration, else of the tokenizer, else 2048."""
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (limit := getattr(config, name, None)) is not None:
            return int(limit)
    limit = getattr(model.tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < NO_LIMIT else DEFAULT_CONTEXT


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context, and those that continue it when both are encoded as one text.

    A token may cover the boundary, so the continuation is what the whole has more than the context. Spaces at the end
    of the context belong to the word after them. This is how lm-evaluation-harness does it (`TemplateLM._encode_pair`).

    Args:
        tokenizer: of the model.
        context: at least one character that is no white space.
        continuation: at least one character.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    ids: list[int] = tokenizer.encode(stripped)
    return ids, whole[len(ids) :]


def score_continuations(
    model: Model,
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Iterator[tuple[int, Likelihood]]:
    """The likelihood of each continuation, as soon as it is known.

    A context that several continuations share goes through the model once: its keys and values stay, each continuation
    is appended and taken back. What is too long loses tokens at the beginning of its context.

    Args:
        model: quantized or not, on whatever engine.
        pairs: token ids of a context and of its continuation, at least one each.
        batch_size: contexts that go through the model together.
        max_length: tokens of a sequence at most, the last one not counted; that of the model if None.

    Yields:
        Number of the pair, from 0, and its likelihood; long pairs first, since they say soonest whether memory lasts.

    Raises:
        ConfigError: an empty context or continuation, a continuation longer than `max_length`, a batch of none.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    groups = _grouped(pairs, context_length(model) if max_length is None else max_length)
    groups.sort(key=lambda group: (-group.length, group.context))
    for start in range(0, len(groups), batch_size):
        yield from _score_together(model.engine, groups[start : start + batch_size])


def _grouped(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[_Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            what = "continuation" if context else "context"
            raise ConfigError(f"{what} {number + 1}: no token; expected a text that has at least one")
        if len(continuation) > max_length:
            raise ConfigError(
                f"continuation {number + 1}: {len(continuation)} tokens; expected at most {max_length}, "
                "the length of the model's context"
            )
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        groups.setdefault(kept, _Group(kept, [])).continuations.append((number, continuation))
    return list(groups.values())


def _score_together(engine: Engine, groups: Sequence[_Group]) -> Iterator[tuple[int, Likelihood]]:
    """The first continuation of each group, then the second of those that have one, and so on."""
    batch: Batch | None = None
    members: Sequence[_Group] = ()
    heads = torch.empty(0)
    for turn in range(max(len(group.continuations) for group in groups)):
        if batch is None:
            members = [group for group in groups if turn < len(group.continuations)]
            batch = engine.batch(len(members), max(group.length for group in members))
            heads = batch.step([group.context for group in members])
        taken = [group.continuations[turn] if turn < len(group.continuations) else None for group in members]
        scores = [[_score(heads[i : i + 1], one[1][:1])] if one else [] for i, one in enumerate(taken)]
        fed = [list(one[1][:-1]) if one else [] for one in taken]
        _score_rest(batch, [one[1] if one else () for one in taken], fed, scores)
        for one, parts in zip(taken, scores, strict=True):
            if one:
                yield one[0], Likelihood(sum(part.logprob for part in parts), all(part.greedy for part in parts))
        try:
            for index, ids in enumerate(fed):
                batch.rollback(index, len(ids))
        except UnsupportedError:  # a sliding window, a recurrent state: start again behind the contexts
            batch = None


def _score_rest(
    batch: Batch,
    continuations: Sequence[Sequence[int]],
    fed: Sequence[Sequence[int]],
    scores: Sequence[list[Likelihood]],
) -> None:
    """Append to `scores` what the tokens after each continuation's first are worth, some rows of logits at a time."""
    share = max(1, MOST_ROWS // len(fed))
    for start in range(0, max(map(len, fed)), share):
        pieces = [ids[start : start + share] for ids in fed]
        rows = batch.step_all(pieces)
        first = 0
        for piece, continuation, parts in zip(pieces, continuations, scores, strict=True):
            if piece:
                targets = continuation[start + 1 : start + 1 + len(piece)]
                parts.append(_score(rows[first : first + len(piece)], targets))
                first += len(piece)


def _score(logits: torch.Tensor, targets: Sequence[int]) -> Likelihood:
    """Of targets [tokens], each predicted by its row of logits float32 [tokens, vocabulary]."""
    ids = torch.tensor(list(targets))
    chosen = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
    logprobs = chosen - logits.logsumexp(dim=1)
    return Likelihood(float(logprobs.sum(dtype=torch.float64)), bool((logits.argmax(dim=1) == ids).all()))
