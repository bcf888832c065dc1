"""The rejection sampler in one launch on an NVIDIA GPU: native/cuda/rejection_sample.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from halfbyte.kernels.cuda_build import unavailable
from halfbyte.kernels.cuda_module import CudaModule, EntryPoint, device_index
from halfbyte.sampling.rejection_inputs import RejectionInputs

SOURCE, ENTRY = "rejection_sample.cu", "rejection_sample"
# As the source has them; a test holds them together.
THREADS, WARPS, SEGMENT = 256, 8, 512
RECORD_WORDS, BINS = 64, 2048
SHARED_BYTES = {False: 256, True: 256 + 8 * BINS}
TYPES = {torch.float32: "Fp32", torch.float16: "Fp16", torch.bfloat16: "Bf16"}


@dataclass(frozen=True)
class Workspace:
    """What blocks tell each other by; zeros before a launch, and zeros again when it is done.

    Attributes:
        records: int32 [sequences, RECORD_WORDS].
        bins: int64 [sequences or 0, BINS].
    """

    records: torch.Tensor
    bins: torch.Tensor

    @classmethod
    def make(cls, sequences: int, device: torch.device, *, filtered: bool) -> Workspace:
        """Zeros for so many sequences."""
        return cls(
            torch.zeros(sequences, RECORD_WORDS, dtype=torch.int32, device=device),
            torch.zeros(sequences if filtered else 0, BINS, dtype=torch.int64, device=device),
        )


def reject_on_cuda(inputs: RejectionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, K + 1] and counts [B] on torch's current stream, without waiting; as for `rejection_sample`.

    A row that cannot be sampled has count 0 and no token. The first call for a dtype, with filters and without,
    compiles its kernel, and the first with a setting copies that to the GPU: call it once before a graph is captured.

    Args:
        inputs: on a GPU; logits may be float16 or bfloat16.

    Raises:
        UnsupportedError: the kernel cannot be compiled.
    """
    batch, drafts = inputs.draft_ids.shape
    vocabulary, device = inputs.target.shape[2], inputs.target.device
    filtered = inputs.logits or inputs.settings is not None
    entry = _entry(device_index(device), inputs.target.dtype, filtered)
    blocks, segments = blocks_per_sequence(batch, vocabulary, entry.resident), -(-vocabulary // SEGMENT)
    workspace = _workspace(batch, device, filtered=filtered)
    settings = None if inputs.settings is None else inputs.settings.values
    ids = inputs.draft_ids.new_empty((batch, drafts + 1))
    counts = inputs.draft_ids.new_empty(batch)
    entry.launch(
        batch * blocks,
        inputs.draft_ids, inputs.draft_probs, inputs.target, inputs.lengths, inputs.uniforms, settings,
        ids, counts, workspace.records, workspace.bins,
        inputs.draft_ids.new_empty((batch, segments)),
        *map(ctypes.c_int, (drafts, vocabulary, blocks, settings_stride(inputs), inputs.logits)),
    )  # fmt: skip
    return ids, counts


def blocks_per_sequence(batch: int, vocabulary: int, resident: int) -> int:
    """As many as the GPU holds at once, but none without a segment for each of its warps."""
    return max(1, min(resident // batch, -(-vocabulary // (SEGMENT * WARPS))))


def settings_stride(inputs: RejectionInputs) -> int:
    """Numbers from the settings of one row to those of the next: none where all share them."""
    return 0 if inputs.settings is None or len(inputs.settings.values) == 1 else inputs.settings.values.shape[1]


@cache
def cuda_missing(device: torch.device) -> str | None:
    """Why the sampler cannot run on a device, or None if it can."""
    return unavailable(device) if device.type == "cuda" else f"expected tensors on a CUDA device, got {device}"


def macros(dtype: torch.dtype, filtered: bool) -> dict[str, str]:
    """What makes the kernel for a dtype of the target, with temperature and filters or without."""
    return {"REJECTION_TYPE": TYPES[dtype], "REJECTION_FILTERED": str(int(filtered))}


@cache
def _entry(index: int, dtype: torch.dtype, filtered: bool) -> EntryPoint:
    """Compiled and loaded once a process."""
    module = CudaModule(torch.device("cuda", index), SOURCE, macros(dtype, filtered))
    return module.entry(ENTRY, threads=THREADS, shared_bytes=SHARED_BYTES[filtered])


# By GPU and stream: launches on one stream come one after the other.
_workspaces: dict[tuple[int, int], Workspace] = {}


def _workspace(sequences: int, device: torch.device, *, filtered: bool) -> Workspace:
    """At least so many sequences' records; bins where they are needed."""
    if torch.cuda.is_current_stream_capturing():
        # The graph's own: it may be replayed on any stream. Setting it to zero becomes part of the graph.
        return Workspace.make(sequences, device, filtered=filtered)
    key = device_index(device), torch.cuda.current_stream(device).cuda_stream
    known = _workspaces.get(key)
    if known is None or len(known.records) < sequences or (filtered and len(known.bins) < sequences):
        room = max(sequences, 0 if known is None else len(known.records))
        known = Workspace.make(room, device, filtered=filtered or (known is not None and len(known.bins) > 0))
        _workspaces[key] = known
    return known
