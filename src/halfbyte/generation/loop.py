"""The plain decoding loop: one token per step over the key-value cache, for one sequence or for several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from halfbyte.generation.text import Detokenizer, StopStrings
from halfbyte.runtime.engine import Batch, Session
from halfbyte.sampling.filters import SamplingParameters
from halfbyte.sampling.sampler import Sampler

if TYPE_CHECKING:
    from halfbyte.generation.speculation import Speculation

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What became of a prompt.

    Attributes:
        text: up to the stop string, if one was met.
        token_ids: generated, those of a stop string included, an end-of-sequence token not.
        finish_reason: "stop" for an end-of-sequence token or a stop string, "length" where the tokens ran out.
        prompt_tokens: length of the prompt.
        prefill_seconds: to the first token.
        decode_seconds: from there to the last token; in a stream, whatever is done with the pieces included.
        speculation: what drafting did, for all prompts of the call together; None where nothing was asked to draft.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    speculation: Speculation | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first over their time; None where there is none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


class Continuation:
    """One sequence that is being continued: chooses its tokens, keeps its text, and knows when it has ended.

    Attributes:
        prompt: token ids it began with.
        pending: token ids the engine is to be given next.
        token_ids: those generated.
        text: of these, as far as it is certain.
        finish_reason: why it ended; None before it does.
        sampler: chooses its tokens.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        stop_ids: Set[int],
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        cached: int = 0,
    ):
        """Begin behind a prompt.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: how many to generate at most, at least one.
            sampler: of this sequence alone.
            stop_ids: end-of-sequence ids.
            decode: token ids → text.
            stop: strings to end before.
            cached: tokens of the prompt that the engine has had already, fewer than there are.
        """
        self.prompt = list(prompt)
        self.pending = self.prompt[cached:]
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._max_new_tokens = max_new_tokens
        self.sampler, self._stop_ids = sampler, stop_ids
        self._detokenizer, self._stops = Detokenizer(decode), StopStrings(stop)
        self.text = ""
        self._started = self._first = self._last = 0.0

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self._max_new_tokens - len(self.token_ids)

    def start(self) -> None:
        """Time runs from here."""
        self._started = time.perf_counter()

    def take(self, logits: torch.Tensor) -> str:
        """Choose a token from the logits [vocab] after `pending`; the text that is certain now, possibly none."""
        return self.push(self.sampler.choose(logits))

    def push(self, token: int) -> str:
        """Take a token that `sampler` has chosen after `pending`; the text that is certain now."""
        if token in self._stop_ids:
            piece = self._finish("stop")
        else:
            self.token_ids.append(token)
            self.pending = [token]
            piece = self._stops.push(self._detokenizer.push(token))
            if self._stops.met:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self._max_new_tokens:
                piece += self._finish("length")
        self.text += piece
        if token not in self._stop_ids or not self._first:
            self._last = time.perf_counter()
            self._first = self._first or self._last
        return piece

    def _finish(self, reason: FinishReason) -> str:
        """The text held back so far, in which a stop string may still become complete."""
        rest = self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.met else reason
        return rest

    def result(self) -> Generation:
        """All of it, once it has ended."""
        assert self.finish_reason is not None
        return Generation(
            self.text,
            tuple(self.token_ids),
            self.finish_reason,
            len(self.prompt),
            self._first - self._started,
            self._last - self._first,
        )


class TextStream(Iterator[str]):
    """Pieces of text as they become certain: no part of a character, nothing that may yet become a stop string.

    Attributes:
        generation: of the whole, after the last piece; None before.
    """

    def __init__(self, pieces: Generator[str, None, Generation]):
        """Wrap a generator of pieces that returns the whole."""
        self.generation: Generation | None = None
        self._pieces = self._run(pieces)

    def _run(self, pieces: Generator[str, None, Generation]) -> Generator[str, None, None]:
        self.generation = yield from pieces

    def __next__(self) -> str:
        """The next piece, never empty."""
        return next(self._pieces)

    def close(self) -> None:
        """End it here; what was generated so far stays where it is."""
        self._pieces.close()


def stream_text(session: Session, continuation: Continuation) -> Generator[str, None, Generation]:
    """Continue one sequence; its pieces of text one by one, and in the end the whole."""
    continuation.start()
    while continuation.finish_reason is None:
        piece = continuation.take(session.step(continuation.pending))
        if piece:
            yield piece
    return continuation.result()


def continue_together(batch: Batch, continuations: Sequence[Continuation]) -> list[Generation]:
    """Continue several sequences, one step for all of them at a time; each ends by itself."""
    for continuation in continuations:
        continuation.start()
    while live := [one for one in continuations if one.finish_reason is None]:
        rows = batch.step([one.pending if one.finish_reason is None else [] for one in continuations])
        for one, logits in zip(live, rows, strict=True):
            one.take(logits)
    return [one.result() for one in continuations]


def generate_tokens(
    session: Session,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    parameters: SamplingParameters,
    generator: torch.Generator,
    stop_ids: Set[int],
) -> Iterator[int]:
    """Yield new token ids one by one, without their text; a stop id ends the sequence and is not yielded.

    Args:
        session: an empty sequence of a model.
        prompt: token ids, at least one.
        max_new_tokens: how many to yield at most.
        parameters: how each is chosen.
        generator: the source of randomness, on the CPU.
        stop_ids: end-of-sequence ids; empty to always run to `max_new_tokens`.
    """
    sampler = Sampler(parameters, generator, prompt)
    step = prompt
    for _ in range(max_new_tokens):
        token = sampler.choose(session.step(step))
        if token in stop_ids:
            return
        yield token
        step = [token]
