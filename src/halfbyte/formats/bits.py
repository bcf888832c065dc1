"""Codes narrower than a byte, packed without gaps: the core every layout shares.

The AWQ layouts put eight 4-bit codes in a 32-bit word, in an order of their own; halfbyte's own layout is a stream of
bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halfbyte.formats.runs import NATURAL, split_bytes, word_bytes


def pack_nibbles(codes: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """Pack runs of eight neighbours along the last axis.

    Args:
        codes: uint8 [..., 8·words], each below 16.
        order: nibble i (bits 4i to 4i+3) of a word holds element order[i] of its run.

    Returns:
        int32 [..., words]. A word whose top nibble is 8 or more is negative.
    """
    # Two nibbles make a byte and four bytes a word: no arithmetic wider than the data, and none on Python integers.
    packed: torch.Tensor = word_bytes(codes.reshape(*codes.shape[:-1], -1, 8), order)
    return packed.contiguous().view(torch.int32).squeeze(-1)


def unpack_nibbles(words: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """The inverse of `pack_nibbles`: int32 [..., words] → uint8 [..., 8·words]."""
    packed = words.contiguous().unsqueeze(-1).view(torch.uint8)
    runs = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    split_bytes(packed, runs, order)
    return runs.reshape(*words.shape[:-1], -1)


def pack_nibbles_transposed(codes: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """`pack_nibbles(codes.T, order)`: uint8 [8·words, columns], each below 16 → int32 [columns, words].

    Eight rows make a row of words, and only those are turned, a quarter of the bytes.
    """
    rows = codes.reshape(-1, 8, codes.shape[1])
    pairs = zip(order[0::2], order[1::2], strict=True)
    packed = torch.stack([(rows[:, high] << 4) | rows[:, low] for low, high in pairs], dim=-1)
    return packed.view(torch.int32).squeeze(-1).T.contiguous()


def unpack_nibbles_transposed(words: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """`unpack_nibbles(words, order).T`, contiguous: int32 [rows, words] → uint8 [8·words, rows].

    Words are turned rather than their eight codes, and each nibble is a row of its own then: a seventh of the time.
    """
    columns = words.T.contiguous()
    codes = torch.empty(columns.shape[0], 8, columns.shape[1], dtype=torch.uint8, device=words.device)
    for nibble, element in enumerate(order):
        codes[:, element] = (columns >> 4 * nibble) & 15
    return codes.view(-1, columns.shape[1])


def stream_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row to a stream of bits: code k takes bits k·bits and up, and bit b is bit b % 8 of byte b // 8.

    Args:
        codes: uint8 [rows, count], each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 [rows, ceil(count · bits / 8)]; unused bits of the last byte are 0.
    """
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).reshape(rows, -1, 8)
    # Eight codes fill `bits` whole bytes: the lowest ones of a 64-bit number.
    run = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        run |= padded[..., i].long() << bits * i
    packed = run.unsqueeze(-1).view(torch.uint8)[..., :bits]
    return packed.reshape(rows, -1)[:, : stream_bytes(count, bits)].contiguous()


def unpack_stream(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_stream`: uint8 [rows, ceil(count · bits / 8)] → uint8 [rows, count]."""
    rows = packed.shape[0]
    runs = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, runs * bits - packed.shape[1])).reshape(rows, runs, bits)
    wide = torch.zeros(rows, runs, 8, dtype=torch.uint8, device=packed.device)
    wide[..., :bits] = padded
    run = wide.view(torch.int64)
    codes = torch.empty(rows, runs, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[..., i] = (run.squeeze(-1) >> bits * i) & ((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :count].contiguous()
