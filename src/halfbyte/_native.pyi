"""Types of the native core; see native/bindings.cpp."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def available_tiers() -> list[str]: ...
def known_tiers() -> list[str]: ...
def set_threads(threads: int) -> None: ...
def threads() -> int: ...
def measure_read(nbytes: int, tier: str, seconds: float) -> float: ...
def measure_peak(kind: str, tier: str) -> float | None: ...
def half_multiply(
    weight: int, dtype: int, rows: int, cols: int, bias: int, x: int, y: int, m: int, tier: str
) -> None: ...
def rms_norm(x: int, weight: int, y: int, count: int, channels: int, epsilon: float, tier: str) -> None: ...
def round_block(
    work: int,
    couplings: int,
    pivots: int,
    scales: int,
    zeros: int,
    codes: int,
    moved: int,
    rows: int,
    stride: int,
    columns: int,
    max_code: int,
    revisit: bool,
    tier: str,
) -> None: ...
def try_range(
    weights: int,
    grams: int,
    projections: int,
    scales: int,
    zeros: int,
    quadratic: int,
    linear: int,
    groups: int,
    rows: int,
    size: int,
    max_code: int,
    tier: str,
) -> None: ...
def draw_logits(logits: int, vocabulary: int, settings: int, uniform: float, probabilities: int, tier: str) -> int: ...
def rejection_sample(
    draft_ids: int,
    draft: int,
    target: int,
    lengths: int,
    uniforms: int,
    settings: int,
    settings_stride: int,
    logits: bool,
    batch: int,
    drafts: int,
    vocabulary: int,
    ids: int,
    counts: int,
    tier: str,
) -> int: ...

class W4Matrix:
    def __init__(
        self,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float32],
        offsets: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None,
        group_size: int,
        tier: str,
        bits: int = 4,
        group_index: npt.NDArray[np.int32] | None = None,
        input_scale: npt.NDArray[np.float32] | None = None,
        kept_columns: npt.NDArray[np.int32] | None = None,
        kept_weight: npt.NDArray[np.uint16] | None = None,
        kept_dtype: int = 1,
    ) -> None: ...
    def multiply(self, x: int, x_stride: int, y: int, m: int, dtype: int) -> None: ...
    def dequantize(self, out: npt.NDArray[np.float32]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tier(self) -> str: ...

class Linear:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def form(self) -> str: ...

def a8_linear(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.uint8],
    bias: npt.NDArray[np.float32] | None,
    tier: str,
    bits: int,
) -> Linear: ...
def a16_linear(matrix: W4Matrix) -> Linear: ...
def half_linear(
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    bias: npt.NDArray[np.float32] | None,
    tier: str,
    in_place: bool,
) -> Linear: ...
def multiply_each(linears: list[Linear], x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> None: ...

class DecoderConfig:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    rotary_pairs: int
    rotations: int
    epsilon: float
    attention_scale: float
    attention_softcap: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    logits_softcap: float
    activation: int
    qk_norm: int

class DecoderLayer:
    def __init__(
        self,
        qkv: list[Linear],
        output: Linear,
        gate_up: list[Linear],
        down: Linear,
        norms: list[list[float]],
        window: int,
        rotation: int,
    ) -> None: ...

class KvCache:
    def __init__(
        self, windows: Sequence[int], sequences: int, kv_heads: int, head_dim: int, capacity: int, int8: bool
    ) -> None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def rollback(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class ReadProbe:
    def __init__(self, nbytes: int, tier: str) -> None: ...
    def seconds(self) -> float: ...
    @property
    def nbytes(self) -> int: ...

class StepProfile:
    def __init__(self) -> None: ...
    @property
    def seconds(self) -> dict[str, float]: ...

class Decoder:
    def __init__(
        self,
        config: DecoderConfig,
        layers: list[DecoderLayer],
        final_norm: list[float],
        head: Linear,
        embedding: int,
        embedding_dtype: int,
        tier: str,
    ) -> None: ...
    def with_layers(self, numbers: list[int]) -> Decoder: ...
    def set_rotation(self, rotation: int, cosines: npt.NDArray[np.float32], sines: npt.NDArray[np.float32]) -> None: ...
    def step(
        self,
        cache: KvCache,
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        logits: int,
        out: int,
        out_rows: int,
        profile: StepProfile | None = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
