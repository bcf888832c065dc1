"""`Chat`: a conversation whose key-value cache is kept from turn to turn."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal, overload

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.generation.draft_length import DraftLength
from halfbyte.generation.drafting import Drafter
from halfbyte.generation.loop import Generation, TextStream, stream_text
from halfbyte.generation.model import Model
from halfbyte.generation.speculation import SpeculativeLoop
from halfbyte.generation.text import parse_stop
from halfbyte.runtime.engine import SequentialBatch, Session
from halfbyte.sampling.filters import SamplingParameters
from halfbyte.sampling.sampler import sequence_generator

# Tokens of a conversation with a model whose config does not say how many it can take.
DEFAULT_CONTEXT = 2048


class Chat:
    """A conversation with a model.

    Every turn puts the whole conversation through the tokenizer's template. As far as the token ids are those already
    in the cache, which they are where the template only appends, the model does not compute them again. What it answers
    is what it would answer to the whole conversation at once.

    Attributes:
        messages: so far, [{"role": …, "content": …}].
        context: tokens of prompt and answer there is room for.
        reused: tokens of the last prompt that did not have to be computed again.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        context: int | None = None,
        draft: str | Path | None = None,
        draft_length: int | Literal["auto"] = "auto",
    ):
        """Begin a conversation.

        Args:
            model: with a chat template.
            system: how the model is to behave; None leaves it to the template.
            max_new_tokens: of an answer, at most; see `Model.generate` for this and the following.
            temperature: 0 is greedy.
            top_k: keep the k most likely tokens.
            top_p: keep the fewest most likely tokens that reach this probability.
            min_p: keep the tokens at least this many times as likely as the most likely one.
            repetition_penalty: over the whole conversation, what the template adds included.
            stop: strings before which an answer ends.
            seed: makes the conversation repeatable; None draws a fresh one.
            context: tokens of the conversation at most; None for what the model's config says.
            draft: what proposes tokens; see `Model.generate`. It keeps its cache from turn to turn, too.
            draft_length: tokens to propose at a time; "auto" for as many as pay.

        Raises:
            ConfigError: a tokenizer without a template, or a parameter out of range.
            HalfbyteError: a draft the model cannot have.
        """
        if model.tokenizer.chat_template is None:
            raise ConfigError(
                f"{model.folder}: its tokenizer has no chat template, so it cannot chat; continue a text with generate"
            )
        if max_new_tokens < 1 or (context is not None and context < 1):
            name, value = ("context", context) if max_new_tokens >= 1 else ("max_new_tokens", max_new_tokens)
            raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.model = model
        self.context = context or _window(model)
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._max_new_tokens = max_new_tokens
        self._parameters = SamplingParameters(temperature, top_k, top_p, min_p, repetition_penalty)
        self._stop = parse_stop(stop)
        self._seed = seed
        self._draft, self._draft_length = draft, draft_length
        self._session: Session | None = None
        self._ids: list[int] = []  # given to the session, in order, possibly with some it did not get to
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message, and begin with the seed anew."""
        self.messages = list(self._opening)
        self.reused = 0
        self._generator = sequence_generator(self._seed)
        self._drafting: tuple[Drafter, DraftLength] | None = None
        if self._draft is not None:
            # What was learned about drafts goes, too: with a seed it decides what is drawn.
            clocked = self._parameters.temperature == 0 or self._seed is None
            self._drafting = self.model.drafting(self._draft, self._draft_length, clocked=clocked)

    @overload
    def send(self, text: str, *, stream: Literal[False] = ...) -> str: ...

    @overload
    def send(self, text: str, *, stream: Literal[True]) -> TextStream: ...

    def send(self, text: str, *, stream: bool = False) -> str | TextStream:
        """Say something and get an answer, both of which join `messages`.

        They join when the answer ends. One that is closed or interrupted early joins with what was said until then, or,
        if that is nothing, not at all.

        Args:
            text: of the user.
            stream: return an iterator of pieces of text, whose `generation` tells the rest when it has ended.

        Raises:
            ConfigError: nothing to say, a conversation the template refuses, or no room for an answer; `messages`
                stays as it was.
        """
        if not text:
            raise ConfigError("message: empty; say at least one character")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.encode(messages).tolist()
        if len(ids) >= self.context:
            raise ConfigError(
                f"the context is full: with this message the conversation takes {len(ids):,} tokens, which leaves no "
                f"room for an answer within {self.context:,}; begin anew (reset)"
            )
        answer = TextStream(self._answer(messages, ids))
        return answer if stream else "".join(answer)

    def _answer(self, messages: list[dict[str, str]], ids: list[int]) -> Generator[str, None, Generation]:
        session, self.reused = self._session_behind(ids)
        continuation = self.model.continuation(
            ids,
            max_new_tokens=min(self._max_new_tokens, self.context - len(ids)),
            parameters=self._parameters,
            generator=self._generator,
            stop=self._stop,
            cached=self.reused,
        )
        try:
            if self._drafting is None:
                return (yield from stream_text(session, continuation))
            loop = SpeculativeLoop(SequentialBatch([session]), *self._drafting, room=self.context)
            return (yield from loop.stream(continuation))
        finally:
            self._ids = [*ids, *continuation.token_ids]
            if continuation.text or continuation.finish_reason is not None:
                self.messages = [*messages, {"role": "assistant", "content": continuation.text}]

    def _session_behind(self, ids: list[int]) -> tuple[Session, int]:
        """A session that holds what it has in common with these token ids, and how many that are: not all."""
        if self._session is not None:
            held = self._ids[: self._session.length]
            pairs = zip(held, ids[:-1], strict=False)
            common = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(held), len(ids) - 1))
            try:
                self._session.rollback(self._session.length - common)
                return self._session, common
            except UnsupportedError:
                pass  # a full sliding window, a recurrent state, a step interrupted half-way: from the beginning then
        self._session = self.model.engine.session(self.context)
        return self._session, 0


def _window(model: Model) -> int:
    """Tokens the model was made for."""
    tokens: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return tokens or DEFAULT_CONTEXT
