"""Codes narrower than a byte, packed without gaps: the core every layout shares.

The AWQ layouts put eight 4-bit codes in a 32-bit word, in an order of their own; halfbyte's own layout is a stream of
bits. `runs` says the same of a single word; here neighbouring bytes move together, in lanes as wide as the machine has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halfbyte.formats.runs import NATURAL

# The lowest nibble of each byte of a 64-bit lane.
NIBBLES = 0x0F0F0F0F0F0F0F0F
# Codes are taken so many at a time: what is between them and the words stays in a cache, and in the same memory. Fresh
# pages for it took half of the time.
CHUNK = 1 << 19


def as_lanes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of the last axis as wider integers: neighbours in one lane, which one shift moves together."""
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize // dtype.itemsize)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack runs of eight neighbours along the last axis: nibble i of a word (bits 4i to 4i+3) holds element i.

    Args:
        codes: uint8 [..., 8·words], each below 16.

    Returns:
        int32 [..., words]. A word whose top nibble is 8 or more is negative.
    """
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] // 2, dtype=torch.uint8, device=codes.device)
    lanes = as_lanes(codes, torch.int16).view(-1)
    for pairs, part in zip(torch.split(lanes, CHUNK // 2), torch.split(packed.view(-1), CHUNK // 2), strict=True):
        part.copy_((pairs >> 4).bitwise_or_(pairs))
    return packed.view(torch.int32)


def unpack_nibbles(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: int32 [..., words] → uint8 [..., 8·words]."""
    codes = torch.empty(*words.shape[:-1], 8 * words.shape[-1], dtype=torch.uint8, device=words.device)
    packed = as_lanes(words, torch.uint8).view(-1)
    lanes = codes.view(-1).view(torch.int16)
    for part, pairs in zip(torch.split(packed, CHUNK // 2), torch.split(lanes, CHUNK // 2), strict=True):
        pairs.copy_(part)
        pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
    return codes


def pack_nibbles_transposed(codes: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """`pack_nibbles(codes.T)`, in any order: uint8 [8·words, columns], each below 16 → int32 [columns, words].

    Nibble i of a word holds element order[i] of its run. Eight rows make a row of words, and only those are turned, a
    quarter of the bytes.
    """
    rows = codes.reshape(-1, 8, codes.shape[1])
    words = torch.empty(rows.shape[2], rows.shape[0], dtype=torch.int32, device=codes.device)
    pairs = list(zip(order[0::2], order[1::2], strict=True))
    at_once = _words_at_once(rows.shape[2])
    for run, part in zip(torch.split(rows, at_once), torch.split(words, at_once, 1), strict=True):
        packed = torch.stack([(run[:, high] << 4) | run[:, low] for low, high in pairs], dim=-1)
        part.copy_(packed.view(torch.int32).squeeze(-1).T)
    return words


def unpack_nibbles_transposed(words: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """`unpack_nibbles(words).T`, contiguous, in any order: int32 [rows, words] → uint8 [8·words, rows].

    Words are turned rather than their eight codes, and each nibble is a row of its own then: a seventh of the time.
    """
    codes = torch.empty(words.shape[1], 8, words.shape[0], dtype=torch.uint8, device=words.device)
    at_once = _words_at_once(words.shape[0])
    for part, run in zip(torch.split(words, at_once, 1), torch.split(codes, at_once), strict=True):
        columns = part.T.contiguous()
        for nibble, element in enumerate(order):
            run[:, element] = (columns >> 4 * nibble) & 15
    return codes.view(-1, words.shape[0])


def _words_at_once(width: int) -> int:
    """Words beside each other whose codes are a chunk, where a row of codes is `width` long: whole cache lines."""
    return max(16, CHUNK // max(1, 8 * width) // 16 * 16)


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
    if bits == 4:
        padded = torch.nn.functional.pad(codes, (0, -count % 8))
        return as_lanes(pack_nibbles(padded), torch.uint8)[:, : stream_bytes(count, bits)].contiguous()
    # Eight codes fill `bits` whole bytes, the lowest of a 64-bit lane: neighbours close up, then pairs, then fours.
    run = as_lanes(torch.nn.functional.pad(codes, (0, -count % 8)), torch.int64)
    for half in (8, 16, 32):
        width = half * bits // 8
        low = _repeated(width, 2 * half)
        run = (run & low) | ((run >> (half - width)) & (low << width))
    packed = run.unsqueeze(-1).view(torch.uint8)[..., :bits]
    return packed.reshape(rows, -1)[:, : stream_bytes(count, bits)].contiguous()


def unpack_stream(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_stream`: uint8 [rows, ceil(count · bits / 8)] → uint8 [rows, count]."""
    rows = packed.shape[0]
    runs = -(-count // 8)
    if bits == 4:
        words = as_lanes(torch.nn.functional.pad(packed, (0, 4 * runs - packed.shape[1])), torch.int32)
        return unpack_nibbles(words)[:, :count].contiguous()
    padded = torch.nn.functional.pad(packed, (0, runs * bits - packed.shape[1])).reshape(rows, runs, bits)
    run = torch.nn.functional.pad(padded, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    for half in (32, 16, 8):
        width = half * bits // 8
        low = _repeated(width, 2 * half)
        run = (run & low) | (((run >> width) & low) << half)
    return run.view(torch.uint8)[:, :count].contiguous()


def _repeated(width: int, every: int) -> int:
    """`width` ones at the bottom of every `every` bits of 64, as torch's int64 has them."""
    mask = sum(((1 << width) - 1) << start for start in range(0, 64, every))
    return mask - (1 << 64) if mask >> 63 else mask
