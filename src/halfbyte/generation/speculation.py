"""The speculative loop: a drafter proposes, one pass of the model checks, rejection sampling keeps the distribution.

Leviathan, Kalman, Matias 2023, and Chen et al. 2023. In the fused decoder the rows that are checked have the bits that
they would have one by one, so greedy decoding gives the very tokens of plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch

from halfbyte.generation.draft_length import DraftLength
from halfbyte.generation.drafting import Draft, Drafter
from halfbyte.generation.loop import Continuation, Generation
from halfbyte.runtime.engine import Batch
from halfbyte.sampling.rejection import rejection_sample
from halfbyte.sampling.sampler import Sampler


@dataclass
class Speculation:
    """What speculating did, for all sequences of a call together.

    Attributes:
        draft: the drafter's name.
        drafted: tokens proposed.
        accepted: of these, kept by the sampler; one behind the end of a text counts.
        emitted: tokens generated in passes that checked a draft, an end-of-sequence token included.
        passes: of the target, over all sequences, that checked a draft.
        plain_passes: of the target without one, the prompt's not counted.
        proposed_at: how often a draft had a token at place 1, 2, …
        accepted_at: how often that was accepted.
        draft_seconds: in the drafter.
        verify_seconds: in the target's passes, plain ones included.
        sampler_seconds: between them.
        gave_up: why nothing was drafted any more; None if drafting went on.
    """

    draft: str
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    passes: int = 0
    plain_passes: int = 0
    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    sampler_seconds: float = 0.0
    gave_up: str | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Of the drafts that reached a place, the share whose token there was accepted."""
        return [kept / all_ for kept, all_ in zip(self.accepted_at, self.proposed_at, strict=True)]

    @property
    def tokens_per_pass(self) -> float | None:
        """Emitted for each pass of the target and sequence that checked a draft; None where there was none."""
        return self.emitted / self.passes if self.passes else None

    def count(self, drafted: int, accepted: int) -> None:
        """One draft was checked."""
        self.drafted += drafted
        self.accepted += accepted
        self.passes += 1
        longer = drafted - len(self.proposed_at)
        self.proposed_at += [0] * longer
        self.accepted_at += [0] * longer
        for place in range(drafted):
            self.proposed_at[place] += 1
            self.accepted_at[place] += place < accepted


# A pass of the decoder takes 256 rows, and a sliding window allows to go back by as many; nothing pays near there.
LONGEST_DRAFT = 32


class SpeculativeLoop:
    """Continues sequences, several tokens a pass.

    Attributes:
        counters: what it did so far.
    """

    def __init__(self, batch: Batch, drafter: Drafter, length: DraftLength, *, room: int):
        """Make ready.

        Args:
            batch: of the target.
            drafter: nobody else's while this runs.
            length: plans the drafts.
            room: tokens a sequence may have at most; drafts are planned to stay within.
        """
        self.counters = Speculation(drafter.name)
        self._batch, self._drafter, self._length, self._room = batch, drafter, length, room

    def continue_together(self, continuations: Sequence[Continuation]) -> list[Generation]:
        """Continue several sequences; each ends by itself."""
        for _ in self.run(continuations):
            pass
        return [replace(one.result(), speculation=self.counters) for one in continuations]

    def stream(self, continuation: Continuation) -> Generator[str, None, Generation]:
        """Continue one sequence; its pieces of text one by one, and in the end the whole."""
        for _, piece in self.run([continuation]):
            yield piece
        return replace(continuation.result(), speculation=self.counters)

    def run(self, continuations: Sequence[Continuation]) -> Generator[tuple[int, str], None, None]:
        """Continue all; (sequence, text that is certain now) as it comes, never empty."""
        for one in continuations:
            one.start()
        rows = self._batch.step([one.pending for one in continuations])
        start = time.perf_counter()
        self._drafter.begin([one.prompt for one in continuations], self._room)
        self.counters.draft_seconds += time.perf_counter() - start
        for i, (one, logits) in enumerate(zip(continuations, rows, strict=True)):
            yield from self._emit(i, one, [one.sampler.choose(logits)])
        while live := [i for i, one in enumerate(continuations) if one.finish_reason is None]:
            drafts = self._draft(live, continuations)
            chosen = self._check(live, drafts, continuations)
            for i in live:
                taken = yield from self._emit(i, continuations[i], chosen[i])
                self.counters.emitted += taken if i in drafts else 0

    def _emit(self, sequence: int, one: Continuation, tokens: list[int]) -> Generator[tuple[int, str], None, int]:
        """Push tokens until one ends the sequence; how many that were."""
        one.sampler.see(tokens)
        self._drafter.extend(sequence, tokens)
        for taken, token in enumerate(tokens, 1):
            piece = one.push(token)
            if piece:
                yield sequence, piece
            if one.finish_reason is not None:
                return taken
        return len(tokens)

    def _draft(self, live: list[int], continuations: Sequence[Continuation]) -> dict[int, Draft]:
        start = time.perf_counter()
        # Behind the drafts comes one token more.
        room = [continuations[i].left - 1 for i in live]
        planned = self._length.plan(self._drafter.kinds(live), room)
        lengths = {i: length for i, length in zip(live, planned, strict=True) if length}
        drafts = self._drafter.propose(lengths, [one.sampler for one in continuations]) if lengths else {}
        self._draft_seconds = time.perf_counter() - start
        self._draft_steps = max(lengths.values(), default=0) if self._drafter.costs else 0
        self.counters.draft_seconds += self._draft_seconds
        self.counters.gave_up = self._length.gave_up
        return drafts

    def _check(
        self, live: list[int], drafts: dict[int, Draft], continuations: Sequence[Continuation]
    ) -> dict[int, list[int]]:
        """One pass over all drafts, and for each sequence the tokens that it goes on with."""
        tokens: list[list[int]] = [[] for _ in continuations]
        for i in live:
            tokens[i] = [*continuations[i].pending, *(drafts[i].token_ids if i in drafts else [])]
        total = sum(map(len, tokens))
        start = time.perf_counter()
        logits = self._batch.step_all(tokens) if total > len(live) else self._batch.step(tokens)
        seconds = time.perf_counter() - start
        self.counters.verify_seconds += seconds
        self._length.took(total, seconds, self._draft_steps, self._draft_seconds)
        start = time.perf_counter()
        chosen, row = {}, 0
        for i in live:
            rows = logits[row : row + len(tokens[i])]
            row += len(tokens[i])
            if len(tokens[i]) == 1:
                chosen[i] = [continuations[i].sampler.choose(rows[0])]
                self.counters.plain_passes += 1
                continue
            draft = drafts[i]
            chosen[i] = _verify(draft, rows, continuations[i].sampler)
            accepted = len(chosen[i]) - 1
            self._length.learn(draft.kind, len(draft.token_ids), accepted)
            self.counters.count(len(draft.token_ids), accepted)
            self._batch.rollback(i, len(draft.token_ids) - accepted)
        self.counters.sampler_seconds += time.perf_counter() - start
        return chosen


def _verify(draft: Draft, logits: torch.Tensor, sampler: Sampler) -> list[int]:
    """The drafted tokens that stand, and the one that follows them.

    Args:
        draft: with K tokens, at least one.
        logits: of the target, float32 [K + 1, vocab].
        sampler: of the sequence, as it was before the draft.
    """
    parameters, token_ids = sampler.parameters, draft.token_ids
    if parameters.repetition_penalty != 1:
        ahead, rows = sampler.ahead(), []
        for token, row in zip([*token_ids, -1], logits, strict=True):
            rows.append(ahead.penalised(row))
            ahead.see([token])
        logits = torch.stack(rows)
    greedy = parameters.temperature == 0
    count = len(token_ids) + 1
    ids, counts = rejection_sample(
        torch.tensor([token_ids]),
        None if draft.probabilities is None else draft.probabilities.unsqueeze(0),
        logits.unsqueeze(0),
        uniforms=torch.zeros(1, count) if greedy else torch.rand((1, count), generator=sampler.generator),
        logits=True,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
    )
    accepted: list[int] = ids[0, : int(counts[0])].tolist()
    return accepted
