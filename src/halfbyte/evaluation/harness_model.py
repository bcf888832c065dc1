"""`HalfbyteLM`: lm-evaluation-harness's view of a model that halfbyte runs (https://github.com/EleutherAI/lm-evaluation-harness).

Importing this file registers it there as "halfbyte". It needs the extra `eval`; `halfbyte.evaluation.harness` does not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from halfbyte.errors import ConfigError
from halfbyte.evaluation.likelihood import context_length, score_continuations
from halfbyte.generation.loop import Continuation, continue_together
from halfbyte.generation.model import Model, load
from halfbyte.progress import progress_bar
from halfbyte.sampling.filters import SamplingParameters
from halfbyte.sampling.sampler import Sampler, sequence_generator

logger = logging.getLogger(__name__)

AUTO_BATCH = 8
# What lm-eval's command line says where nobody did; without a GPU it means nothing.
DEFAULT_DEVICE = "cuda:0"
MAX_GEN_TOKS = 256
# Most specific first, as the harness itself looks for them.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class _Request:
    """What `generate_until` is asked for once: a context, and what the task says about the text."""

    number: int
    ids: tuple[int, ...]
    cut: bool
    until: tuple[str, ...]
    max_gen_toks: int
    parameters: SamplingParameters


@register_model("halfbyte")
class HalfbyteLM(TemplateLM):  # type: ignore[misc]
    """A causal language model, quantized or not, on halfbyte's runtime.

    Contexts and continuations are cut into tokens as the harness's own `hf` model does it.

    Args:
        pretrained: anything `halfbyte.load` opens, or a loaded model.
        batch_size: sequences that go through the model together; "auto" for 8.
        max_batch_size: of "auto", at most.
        max_length: tokens of a sequence at most; that of the configuration if None.
        max_gen_toks: tokens to generate where a task does not say.
        add_bos_token: whether texts begin with the special tokens of the tokenizer; None for as it is configured.
        prefix_token_id: stands before a text without a context; None for begin of sequence, else end of sequence.
        seed: of tasks that sample.
        progress: show a bar on a terminal.
        loading: device, backend, compute, head_bits, cache, threads: see `halfbyte.load`.

    Raises:
        ConfigError: a number out of range, or an argument of another model class.
        HalfbyteError: what `halfbyte.load` raises.
    """

    def __init__(
        self,
        pretrained: str | Path | Model,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        progress: bool = True,
        **loading: Any,
    ):
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.model = pretrained if isinstance(pretrained, Model) else _load(pretrained, loading)
        self.tokenizer = self.model.tokenizer
        self.max_length = context_length(self.model) if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        if self.max_length < 2 or self.max_gen_toks < 1:
            raise ConfigError(
                f"max_length and max_gen_toks: expected at least 2 and 1, got {self.max_length} and {self.max_gen_toks}"
            )
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._seed, self._progress = seed, progress
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        token = self.tokenizer.eos_token_id
        if token is None:
            raise ConfigError(f"{self.model.folder}: its tokenizer has no end-of-sequence token, which the tasks need")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without a context is predicted from."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the begin-of-sequence token, as chat templates make it, gets no second."""
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        ids: list[int] = self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of a continuation behind its context, and whether greedy decoding writes it."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # halfbyte's bar instead
        return scored

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        self._warn_of_cuts(sum(len(c) + len(d) > self.max_length + 1 for c, d in pairs))
        scored = score_continuations(self.model, pairs, batch_size=self.batch_size, max_length=self.max_length)
        with progress_bar("Scoring", len(pairs), enabled=self._progress, unit="requests") as ticker:
            for number, likelihood in scored:
                answers[number] = (likelihood.logprob, likelihood.greedy)
                if (key := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[number])
                ticker.advance()
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, window by window, each token predicted once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to one of the task's strings, greedily unless the task samples."""
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        asked.sort(key=lambda one: -len(one.ids))
        self._warn_of_cuts(sum(one.cut for one in asked))
        texts = [""] * len(asked)
        with progress_bar("Generating", len(asked), enabled=self._progress, unit="requests") as ticker:
            for start in range(0, len(asked), self.batch_size):
                together = asked[start : start + self.batch_size]
                begun = [self._begin(one) for one in together]
                room = max(len(one.ids) + one.max_gen_toks for one in together)
                batch = self.model.engine.batch(len(begun), room)
                for one, result in zip(together, continue_together(batch, begun), strict=True):
                    texts[one.number] = result.text
                    self.cache_hook.add_partial("generate_until", requests[one.number].args, result.text)
                    ticker.advance()
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as one text; where the template knows no system role, without that message.

        Raises:
            ConfigError: the tokenizer has no template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"{self.model.folder}: its tokenizer has no chat template; run without one")
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            try:
                return str(render(chat_history))
            except jinja2.TemplateError:
                return str(render([message for message in chat_history if message["role"] != "system"]))
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self.model.folder}: its chat template refuses the messages: {error}") from None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_quantized": self.model.quantized,
            "model_engine": self.model.engine.name,
            "model_kernels": dict(self.model.kernels),
            "model_memory_bytes": self.model.nbytes,
        }

    def _request(self, number: int, context: str, asked: Mapping[str, Any]) -> _Request:
        until, max_gen_toks, parameters = _generation_settings(asked, self.max_gen_toks)
        room = self.max_length - max_gen_toks
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: {max_gen_toks} tokens leave no room for a prompt; expected fewer than max_length, "
                f"{self.max_length}"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return _Request(number, tuple(ids[-room:]), len(ids) > room, until, max_gen_toks, parameters)

    def _begin(self, one: _Request) -> Continuation:
        return Continuation(
            one.ids,
            max_new_tokens=one.max_gen_toks,
            sampler=Sampler(one.parameters, sequence_generator(self._seed, one.number), one.ids),
            stop_ids=self.model.stop_ids | {self.eot_token_id},
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
            stop=one.until,
        )

    def _warn_of_cuts(self, count: int) -> None:
        if count:
            logger.warning("%d requests do not fit into %d tokens: cut at the beginning", count, self.max_length)


def _batch_size(asked: int | str, most: int | None) -> int:
    """`batch_size` as the harness spells it: a number, "auto", or "auto:N"."""
    if isinstance(asked, str) and asked.partition(":")[0] == "auto":
        return AUTO_BATCH if most is None else max(1, min(AUTO_BATCH, int(most)))
    try:
        size = int(asked)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size: expected auto or at least 1, got {asked}")
    return size


def _load(pretrained: str | Path, loading: Mapping[str, Any]) -> Model:
    known = ("device", "backend", "compute", "head_bits", "cache", "threads")
    if unknown := [name for name in loading if name not in known]:
        raise ConfigError(f"model_args {', '.join(unknown)}: not known; expected some of {', '.join(known)}")
    settings = dict(loading)
    if settings.get("device") == DEFAULT_DEVICE and not torch.cuda.is_available():
        settings["device"] = "auto"
    return load(pretrained, **settings)


def _generation_settings(asked: Mapping[str, Any], default: int) -> tuple[tuple[str, ...], int, SamplingParameters]:
    """What a task's `generation_kwargs` say: strings to end before, tokens at most, how tokens are chosen.

    Raises:
        ConfigError: something that halfbyte cannot do.
    """
    left = dict(asked)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    lengths = [value for name in LENGTH_NAMES if (value := left.pop(name, None)) is not None]
    sampling = {name: value for name in SAMPLING_NAMES if (value := left.pop(name, None)) is not None}
    # Greedy unless the task says otherwise, whatever temperature stands beside do_sample: false.
    if not left.pop("do_sample", float(sampling.get("temperature", 0)) > 0):
        sampling["temperature"] = 0.0
    if sampling.get("top_k") == 0:  # transformers' "no limit"
        del sampling["top_k"]
    if left.pop("num_beams", 1) != 1 or left:
        raise ConfigError(
            f"generation_kwargs {json.dumps(left, default=str) if left else 'num_beams'}: not known; expected until, "
            f"do_sample and some of {', '.join((LENGTH_NAMES[0], *SAMPLING_NAMES))}"
        )
    return tuple(filter(None, until)), int(lengths[0]) if lengths else default, SamplingParameters(**sampling)
