"""A decoder of the Llama family on torch tensors: on a GPU, a step is one CUDA graph.

Products with weights are the kernels of `halfbyte.kernels.w4a16` or torch's, attention is torch's, what lies between is
`DecoderOps`. Tokens and positions are read on the device, so the same launches serve step after step.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from halfbyte.architectures.records import DecoderRecord
from halfbyte.errors import ConfigError
from halfbyte.kernels.decoder_ops import DecoderOps, Heads, Norm
from halfbyte.runtime.decoder import CACHE_LIMIT, LOGITS, DecoderBatch, DecoderSession, check_tokens
from halfbyte.runtime.engine import Batch, Session, check_room
from halfbyte.runtime.rotation import Rotations
from halfbyte.runtime.step_graph import StepGraphs
from halfbyte.runtime.torch_attention import attend, attend_from_start, attention_mask
from halfbyte.runtime.torch_cache import POSITIONS, TorchCache, reach_of

# Tokens of a prompt that go through the layers together.
CHUNK = 1024
# Steps of up to so many tokens of a sequence are captured, but not those that begin one; each power of two has graphs
# of its own.
CAPTURED_TOKENS = 64

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TorchLayer:
    """The weights of one layer.

    Attributes:
        qkv: x [rows, hidden] → q, k, v, one after the other.
        output: of attention.
        gate_up: x [rows, hidden] → gate, up.
        down: of the MLP.
        attention_norm: before `qkv`.
        mlp_norm: before `gate_up`.
        q_norm: over each head of q; None where there is none.
        k_norm: likewise.
    """

    qkv: Product
    output: Product
    gate_up: Product
    down: Product
    attention_norm: Norm
    mlp_norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None


class TorchDecoder:
    """An `Engine`.

    Attributes:
        record: its architecture.
        device: where it computes.
        ops: what computes between products.
        ops_reason: why these are torch's; None where they are CUDA kernels.
        kernels: name of a kernel → quantized linears it runs.
        parts: bytes of the weights: "packed" and "half" of linears with their biases, "norms", "embedding", "head" (0
            where it is the embedding).
        max_tokens: most tokens a session may have; None for any number.
    """

    name = "decoder"

    def __init__(
        self,
        record: DecoderRecord,
        layers: Sequence[TorchLayer],
        rotations: Rotations,
        ops: DecoderOps,
        *,
        embedding: torch.Tensor,
        final_norm: Norm,
        head: Product,
        ops_reason: str | None,
        kernels: dict[str, int],
        parts: dict[str, int],
    ):
        self.record, self.ops, self.ops_reason = record, ops, ops_reason
        self.kernels, self.parts = kernels, parts
        self._layers, self._rotations = list(layers), rotations
        self._embedding, self._final_norm, self._head = embedding, final_norm, head
        self.device, self.dtype = embedding.device, embedding.dtype
        self.max_tokens: int | None = None
        self._idle: TorchCache | None = None
        scale = record.embedding_scale
        # transformers keeps √hidden in the model's dtype; a multiplier from the config it does not round.
        self._embedding_scale = float(torch.tensor(scale).to(self.dtype)) if record.family.scaled_embedding else scale

    @property
    def vocabulary(self) -> int:
        """Token ids it has logits for."""
        return self.record.vocabulary

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, tied ones once."""
        return sum(self.parts.values())

    @property
    def step_bytes(self) -> int:
        """Bytes of weights one step reads, the cache not counted."""
        parts = self.parts
        return parts["packed"] + parts["half"] + parts["norms"] + (parts["head"] or parts["embedding"])

    def cache_bytes(self, positions: int) -> int:
        """Bytes of the keys and values of so many positions of a sequence."""
        record = self.record
        return 2 * record.layers * record.kv_heads * record.head_dim * self.dtype.itemsize * positions

    def with_layers(self, numbers: Sequence[int]) -> TorchDecoder:
        """The same model with some of its layers only, over the same weights; a draft of itself.

        Args:
            numbers: of the layers, ascending.
        """
        skipping = copy.copy(self)
        skipping.record = self.record.with_layers(numbers)
        skipping._layers = [self._layers[number] for number in numbers]
        skipping._idle = None
        kept = {part: self.parts[part] * len(numbers) // self.record.layers for part in ("packed", "half", "norms")}
        skipping.parts = self.parts | kept
        return skipping

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        cache = self.new_cache(1, len(ids))
        try:
            return self.step(cache, [ids.tolist()], logits="all")
        finally:
            self._give_back(cache)

    def session(self, tokens: int) -> Session:
        """See `Engine`."""
        check_room(tokens, self.max_tokens)
        cache = self.new_cache(1, tokens)
        session = DecoderSession(self, cache)
        weakref.finalize(session, self._give_back, cache).atexit = False
        return session

    def batch(self, sequences: int, tokens: int) -> Batch:
        """See `Engine`; a step for all of them at once."""
        check_room(tokens, self.max_tokens)
        cache = self.new_cache(sequences, tokens)
        batch = DecoderBatch(self, cache)
        weakref.finalize(batch, self._give_back, cache).atexit = False
        return batch

    def new_cache(self, sequences: int = 1, capacity: int = 2048) -> TorchCache:
        """An empty cache, or the last one given back if it is right: its graphs are captured already.

        Raises:
            ConfigError: no sequence, no room, or more of either than `CACHE_LIMIT`.
        """
        if not (1 <= sequences <= CACHE_LIMIT and 1 <= capacity <= CACHE_LIMIT):
            raise ConfigError(
                f"cache: expected 1 to {CACHE_LIMIT} sequences and positions, got {sequences} and {capacity}"
            )
        idle, self._idle = self._idle, None
        if idle is not None and len(idle.lengths) == sequences and idle.capacity >= capacity:
            idle.clear()
            return idle
        del idle  # its memory serves the new one
        record = self.record
        positions = -(-(capacity + 1) // POSITIONS) * POSITIONS
        shape = (record.layers, sequences, record.kv_heads, positions, record.head_dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        cosines, sines = (table.to(self.device) for table in self._rotations.tables("", positions))
        heads = [
            Heads(record.heads, record.kv_heads, record.head_dim, cosines, sines, layer.q_norm, layer.k_norm)
            for layer in self._layers
        ]
        return TorchCache(keys, values, heads)

    def _give_back(self, cache: TorchCache) -> None:
        self._idle = cache

    @torch.inference_mode()
    def step(self, cache: TorchCache, tokens: Sequence[Sequence[int]], *, logits: str = "last") -> torch.Tensor:
        """Append tokens to the sequences of a cache.

        Args:
            cache: of this decoder; its lengths move on.
            tokens: for each sequence its next token ids, possibly none.
            logits: "last" (of each sequence that got tokens), "all" (of every token) or "none".

        Returns:
            float32 [rows, vocabulary] on the CPU, in the order of `tokens`.

        Raises:
            ConfigError: nothing to do, an id outside the vocabulary, or a sequence longer than the cache.
        """
        if logits not in LOGITS:
            raise ConfigError(f"logits: expected last, all or none, got {logits!r}")
        check_tokens(tokens, cache, self.vocabulary)
        longest = max(map(len, tokens))
        begun = all(length for length, new in zip(cache.lengths, tokens, strict=True) if new)
        if begun and longest <= CAPTURED_TOKENS:
            found = self._captured_step(cache, tokens, longest, logits)
        else:
            found = self._prompts(cache, tokens, logits)
        cache.advance([len(new) for new in tokens])
        return found

    def _captured_step(
        self, cache: TorchCache, tokens: Sequence[Sequence[int]], longest: int, logits: str
    ) -> torch.Tensor:
        """All sequences at once, each padded to the same number of tokens."""
        width = 1 << (longest - 1).bit_length()
        reached = max(length + len(new) for length, new in zip(cache.lengths, tokens, strict=True))
        reach = reach_of(reached, cache.positions)
        buffers = cache.step_buffers(width)
        buffers.fill(tokens, cache.lengths)
        run = cache.steps.get((width, reach))
        if run is None:
            sequences = slice(None)

            def eager() -> torch.Tensor:
                return self._forward(cache, sequences, buffers.ids, buffers.positions, reach)

            run = cache.steps[width, reach] = self._capture(cache, eager)
        rows: list[int] = []
        for sequence, new in enumerate(tokens):
            end = sequence * width + len(new)
            first = end - len(new) if logits == "all" else max(end - 1, sequence * width)
            rows += range(first, end) if logits != "none" else ()
        found = run()
        if len(rows) < found.shape[0]:
            found = found[torch.tensor(rows, dtype=torch.int64, device=self.device)]
        return found.cpu()

    def _capture(self, cache: TorchCache, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if self.device.type != "cuda":
            return run
        if cache.graphs is None:
            cache.graphs = StepGraphs(self.device)
        return cache.graphs.capture(run)

    def _prompts(self, cache: TorchCache, tokens: Sequence[Sequence[int]], logits: str) -> torch.Tensor:
        """One sequence after the other, a chunk at a time."""
        found = []
        for sequence, new in enumerate(tokens):
            length = cache.lengths[sequence]
            for start in range(0, len(new), CHUNK):
                ids = torch.tensor(new[start : start + CHUNK], device=self.device)
                end = length + start + len(ids)
                positions = torch.arange(length + start, end, dtype=torch.int32, device=self.device)
                keep = {"all": len(ids), "last": int(start + len(ids) == len(new)), "none": 0}[logits]
                sequences = slice(sequence, sequence + 1)
                reach = reach_of(end, cache.positions) if length + start else end
                rows = self._forward(cache, sequences, ids, positions, reach, keep=keep)
                found.append(rows.cpu())
        return torch.cat(found)

    def _forward(
        self,
        cache: TorchCache,
        sequences: slice,
        ids: torch.Tensor,
        positions: torch.Tensor,
        reach: int,
        *,
        keep: int | None = None,
    ) -> torch.Tensor:
        """Logits float32 [rows, vocabulary] of all rows, or of the last `keep`; nothing is asked of the device.

        Args:
            cache: its keys and values are written.
            sequences: of the cache, whose rows follow one another.
            ids: int64 [rows].
            positions: int32 [rows], -1 for a row that stands for nothing.
            reach: positions looked at; the rows' number where they begin at 0 and there is one sequence.
            keep: rows of whose logits there is need; None for all.
        """
        record, ops = self.record, self.ops
        keys, values = cache.keys[:, sequences], cache.values[:, sequences]
        count, rows = keys.shape[1], ids.shape[0]
        from_start = keep is not None and reach == rows
        masks = {
            window: attention_mask(positions, count, window, reach, record.heads // record.kv_heads, self.dtype)
            for window in dict.fromkeys(record.windows)
            if not from_start or 0 < window < rows
        }
        x = functional.embedding(ids, self._embedding)
        if self._embedding_scale != 1:
            x *= self._embedding_scale
        branch: torch.Tensor | None = None
        for number, layer in enumerate(self._layers):
            y = self._add_norm(x, branch, layer.attention_norm)
            qkv = layer.qkv(y)
            ops.rotate_append(qkv, keys[number], values[number], positions, cache.heads[number])
            q = qkv.view(count, rows // count, -1, record.head_dim)[:, :, : record.heads]
            k, v = keys[number][:, :, :reach], values[number][:, :, :reach]
            mask = masks.get(record.windows[number])
            scale = record.attention_scale
            attended = attend_from_start(q, k, v, scale) if mask is None else attend(q, k, v, mask, scale)
            y = self._add_norm(x, layer.output(attended), layer.mlp_norm)
            branch = layer.down(ops.gated(layer.gate_up(y), record.activation))
        if keep == 0:
            return x.new_empty(0, record.vocabulary, dtype=torch.float32)
        if keep is not None:
            x = x[rows - keep :]
            branch = None if branch is None else branch[rows - keep :]
        logits = self._head(self._add_norm(x, branch, self._final_norm)).float()
        if record.logits_scale != 1:
            logits *= record.logits_scale
        cap = record.logits_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def _add_norm(self, x: torch.Tensor, branch: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        if branch is None:
            return self.ops.rms_norm(x, norm)
        return self.ops.add_rms_norm(x, branch, self.record.residual_scale, norm)
