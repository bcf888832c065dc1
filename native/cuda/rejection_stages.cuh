// What blocks that share a sequence tell each other, and how a block adds up.
//
// The passes over a row are stages, each cut into as many pieces as the sequence has blocks. A block draws a ticket,
// which names a stage and a piece of it; it waits until that stage is open, works, and signs off. Who signs off last
// ends the stage alone: it looks at what all have added up, decides, and opens the next.
//
//     tickets   0   1   2   3 | 4   5   6   7 | 8 ...      four blocks: ticket t is piece t % 4 of stage t / 4
//     block     2   0   1   3 | 0   2   2   1 | 3 ...      a block that starts late, or never, holds up nobody
//
// A block waits only for pieces whose tickets were drawn before its own, so their holders run: nothing is assumed about
// how many blocks the GPU holds at once, or what else runs there. The last stage is DRAW; a block leaves after one piece
// of it, so every block has one, and who signs off last there is the last of all to touch the record and leaves zeros.
// So a launch can be repeated from a captured graph. Two launches at a time need two sets of records.
#pragma once

#include "rejection_row.cuh"

namespace halfbyte {

constexpr int THREADS = 256, WARPS = THREADS / LANES;
constexpr int DIGIT = 11, BINS = 1 << DIGIT;

enum Stage : u32 {
    PEAK,   // the most likely token; whether all numbers are possible
    TOP_K,  // a digit of the rank of the k-th token
    TOP_P,  // a digit of the rank of the last token that is needed to reach p
    SUM,    // the mass of what is left, and with it whether the draft stands
    DRAW    // the masses of all segments of what the last token is drawn from
};

// Where a sequence stands: what the next stage needs to know.
struct State {
    u32 stage, position, faulty, digit;
    u64 prefix;    // the digits found so far
    u64 before;    // tokens, or mass, of higher ranks
    double limit;  // mass to be reached
    u64 least_score, least_weight;
    float highest, least, factor;
    u32 rejected;  // whether position is that of a rejected draft
};
constexpr int STATE_WORDS = sizeof(State) / sizeof(u32);
static_assert(sizeof(State) % sizeof(u32) == 0 && STATE_WORDS <= LANES, "a warp copies it");

// One for each sequence in global memory; zeros between launches.
struct Record {
    u32 tickets, arrivals, open, damaged;  // open: the stage that may be worked on
    u64 best, sum;
    u32 state[LANES];
    u32 padding[LANES - 8];
};
static_assert(sizeof(Record) == 256, "kernels allocate it by the number");

// Of a row of the batch, from the settings; the same at every position.
struct Settings {
    double top_p;
    float divisor, min_p;
    u32 top_k, length;
    u32 as_it_is, scored, greedy, valid;
};

// What the threads of a block tell each other.
struct Notes {
    u64 totals[WARPS];
    State state;
    Settings settings;
    u64 rest;
    u32 ticket, last, segment, id;
};
// Behind the notes: the two halves of 64-bit numbers, by digit.
struct Bins {
    u32 low[BINS], high[BINS];
};
constexpr int NOTES_BYTES = (sizeof(Notes) + 127) / 128 * 128;

DEVICE Notes& notes() { return *reinterpret_cast<Notes*>(shared_memory()); }
DEVICE Bins& bins() { return *reinterpret_cast<Bins*>(shared_memory() + NOTES_BYTES); }

DEVICE int lane_index() { return thread_index() % LANES; }
DEVICE int warp_index() { return thread_index() / LANES; }

// Sums of what the threads before this one bring, and of all; every thread of the block calls it.
DEVICE u64 block_prefix(u64 value, u64& total) {
    u64 sum = value;
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) {
        const u64 other = shuffle_up(sum, distance);
        if (lane_index() >= distance) sum += other;
    }
    barrier();  // others may still read the totals of the time before
    if (lane_index() == LANES - 1) store_shared(&notes().totals[warp_index()], sum);
    barrier();
    u64 before = 0;
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_index()) before = total;
        total += load_shared<u64>(&notes().totals[warp]);
    }
    return before + sum - value;
}

DEVICE u64 block_sum(u64 value) {
    u64 total;
    block_prefix(value, total);
    return total;
}

DEVICE u64 warp_max64(u64 value) {
    const u32 high = warp_max(static_cast<u32>(value >> 32));
    const u32 low = warp_max(static_cast<u32>(value >> 32) == high ? static_cast<u32>(value) : 0);
    return static_cast<u64>(high) << 32 | low;
}
DEVICE u64 block_max(u64 value) {
    const u64 best = warp_max64(value);
    barrier();
    if (lane_index() == 0) store_shared(&notes().totals[warp_index()], best);
    barrier();
    return warp_max64(load_shared<u64>(&notes().totals[lane_index() % WARPS]));
}

// Adds to the 64-bit number of a bin, by 32-bit operations: shared memory has no other that is fast.
DEVICE void add_to_bin(int bin, u64 amount) {
    const u32 low = static_cast<u32>(amount), before = add_shared(&bins().low[bin], low);
    const u32 high = static_cast<u32>(amount >> 32) + (before + low < before ? 1 : 0);
    if (high) add_shared(&bins().high[bin], high);
}

// The ranks are looked through digit by digit from the top; the id's digits only where equal numbers straddle the edge.
constexpr int DIGITS = 5, NUMBER_DIGITS = 3;
DEVICE int digit_shift(int digit) {
    constexpr int NUMBER_BITS = RANK_BITS - ID_BITS;
    if (digit >= NUMBER_DIGITS) return (DIGITS - 1 - digit) * DIGIT;
    return ID_BITS + (digit == NUMBER_DIGITS - 1 ? 0 : NUMBER_BITS - (digit + 1) * DIGIT);
}
DEVICE int digit_bits(int digit) { return digit == NUMBER_DIGITS - 1 ? 10 : DIGIT; }

}  // namespace halfbyte
