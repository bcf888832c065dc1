"""Drafters: what proposes tokens that the model then checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.generation.suffix_automaton import SuffixAutomaton
from halfbyte.runtime.engine import Engine
from halfbyte.sampling.rejection import draw_with_probabilities
from halfbyte.sampling.sampler import Sampler


@dataclass
class Draft:
    """Tokens proposed for one sequence.

    Attributes:
        token_ids: proposed, possibly none.
        probabilities: float32 [tokens, vocab], the very distributions they were drawn from; None if each was certain.
        kind: drafts of one kind are accepted about equally often; the draft length is found for each by itself.
    """

    token_ids: list[int]
    probabilities: torch.Tensor | None = None
    kind: int = 0


class Drafter(Protocol):
    """Proposes tokens for several sequences, of which it is told what became of them.

    Attributes:
        name: for people.
        costs: whether a drafted token takes time worth counting.
    """

    name: str
    costs: bool

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Sequences that begin with these token ids, drafts included none gets longer than `room`."""

    def kinds(self, sequences: Sequence[int]) -> list[int]:
        """Of the draft that each would get now: -1 if none."""

    def propose(self, lengths: dict[int, int], samplers: Sequence[Sampler]) -> dict[int, Draft]:
        """Drafts for some sequences.

        Args:
            lengths: sequence → tokens wanted at most, at least one.
            samplers: of all sequences: how they choose their tokens, and what they have seen.
        """

    def extend(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Tokens that a sequence went on with."""


class ModelDrafter:
    """Another model with the same tokenizer, or a part of the same one."""

    costs = True

    def __init__(self, engine: Engine, name: str, *, vocabulary: int):
        """Draft with an engine.

        Args:
            engine: of the model.
            name: for people.
            vocabulary: of the target; models with one tokenizer may fill theirs up to different sizes.
        """
        self.name, self.engine = name, engine
        self._vocabulary = vocabulary
        self._ids: list[list[int]] = []
        self._room = 0
        self._sound = False  # whether the engine has what `_cached` says: not if a step was interrupted

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """See `Drafter`; what one sequence has in common with the one before it is not computed again."""
        if not self._goes_back_to(prompts, room):
            self._cached = [0] * len(prompts)  # tokens the engine has of each sequence; all are right
            self._batch = self.engine.batch(len(prompts), room)
        self._ids, self._room = [list(prompt) for prompt in prompts], room
        # Now rather than in the first draft, whose time tells what a draft costs. The last token can wait.
        missing = [ids[cached:-1] for ids, cached in zip(self._ids, self._cached, strict=True)]
        if any(missing):
            self._sound = False
            self._batch.step(missing)
            self._cached = [len(ids) - 1 for ids in self._ids]
        self._sound = True

    def _goes_back_to(self, prompts: Sequence[Sequence[int]], room: int) -> bool:
        """Whether the one sequence of before could be rolled back to what it shares with a prompt."""
        if not self._sound or len(prompts) != 1 or len(self._ids) != 1 or room != self._room:
            return False
        known = self._ids[0][: self._cached[0]]
        pairs = zip(known, prompts[0][:-1], strict=False)
        common = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(known), len(prompts[0]) - 1))
        try:
            self._batch.rollback(0, self._cached[0] - common)
        except UnsupportedError:
            return False
        self._cached = [common]
        return True

    def kinds(self, sequences: Sequence[int]) -> list[int]:
        """See `Drafter`; all are of one kind."""
        return [0] * len(sequences)

    def propose(self, lengths: dict[int, int], samplers: Sequence[Sampler]) -> dict[int, Draft]:
        """See `Drafter`."""
        drafts = {i: Draft([]) for i in lengths}
        for i, length in lengths.items():
            if samplers[i].parameters.temperature != 0:
                drafts[i].probabilities = torch.empty(length, self._vocabulary)
        ahead = {i: samplers[i].ahead() for i in lengths}
        pending = {i: self._ids[i][self._cached[i] :] for i in lengths}
        self._sound = False
        while pending:
            rows = self._batch.step([pending.get(i, []) for i in range(len(self._ids))])
            following = {}
            for (i, new), logits in zip(sorted(pending.items()), rows, strict=True):
                self._cached[i] += len(new)
                token = self._draw(drafts[i], logits[: self._vocabulary], ahead[i])
                if len(drafts[i].token_ids) < lengths[i]:
                    following[i] = [token]
            pending = following
        self._drafted = {i: drafts[i].token_ids for i in lengths}
        self._sound = True
        return drafts

    def _draw(self, draft: Draft, logits: torch.Tensor, sampler: Sampler) -> int:
        """The next token of a draft."""
        if draft.probabilities is None:
            token = sampler.choose(logits)
        else:
            row = draft.probabilities[len(draft.token_ids)]
            token = draw_with_probabilities(sampler.penalised(logits), sampler.parameters, sampler.generator, row)
            sampler.see([token])
        draft.token_ids.append(token)
        return token

    def extend(self, sequence: int, token_ids: Sequence[int]) -> None:
        """See `Drafter`; drafted tokens that were refused are forgotten."""
        fed = self._cached[sequence] - len(self._ids[sequence])  # drafted tokens that the engine has
        if fed > 0:
            drafted = self._drafted[sequence][:fed]
            # The last token is new, even where a draw behind a refusal gives the refused one.
            kept = token_ids[:-1]
            pairs = zip(drafted, kept, strict=False)
            right = next((n for n, (old, new) in enumerate(pairs) if old != new), min(fed, len(kept)))
            self._batch.rollback(sequence, fed - right)
            self._cached[sequence] -= fed - right
        self._ids[sequence] += token_ids


class NgramDrafter:
    """What followed the longest end of the sequence where it occurred before: prompt look-up (Saxena 2023)."""

    name, costs = "ngram", False
    # A single token that occurred before says next to nothing.
    SHORTEST = 2
    # Lengths of a repeat from which drafts are of another kind.
    KINDS = (2, 3, 4, 6, 10, 18)

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """See `Drafter`."""
        self._texts = [SuffixAutomaton(prompt) for prompt in prompts]
        self._found: list[tuple[int, int] | None] = [None] * len(prompts)

    def kinds(self, sequences: Sequence[int]) -> list[int]:
        """See `Drafter`; the longer the repeat, the surer."""
        return [self._kind(self._repeat(i)[0]) for i in sequences]

    def propose(self, lengths: dict[int, int], samplers: Sequence[Sampler]) -> dict[int, Draft]:
        """See `Drafter`."""
        drafts = {}
        for i, length in lengths.items():
            repeat, end = self._repeat(i)
            kind = self._kind(repeat)
            drafts[i] = Draft(_copied(self._texts[i].tokens, end, length) if kind >= 0 else [], kind=kind)
        return drafts

    def extend(self, sequence: int, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        for token in token_ids:
            self._texts[sequence].append(token)
        self._found[sequence] = None

    def _repeat(self, sequence: int) -> tuple[int, int]:
        found = self._found[sequence]
        if found is None:
            found = self._found[sequence] = self._texts[sequence].longest_repeat()
        return found

    def _kind(self, repeat: int) -> int:
        return sum(repeat >= least for least in self.KINDS) - 1


def _copied(tokens: Sequence[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on, which may run into themselves: a text that repeats goes on repeating."""
    period = len(tokens) - start
    return [tokens[start + n % period] for n in range(length)]
