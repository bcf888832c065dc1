// Who computes what. The product is cut into output tiles, and each tile into steps along K; all steps of all tiles,
// tile by tile, are one line, and block b takes the b-th of equal pieces of it, its stripe. Three tiles of four steps
// over five blocks:
//
//     tile 0          tile 1          tile 2
//     0   0   1   1 | 1   2   2   3 | 3   3   4   4        the block that takes each step
//
// A block walks its tiles from the last to the first, and the steps of each upwards. So what it begins for others it
// does first: block 1 computes the first step of tile 1 and publishes the sums, then finishes tile 0 and adds what
// block 0 published long before. The block with a tile's last step collects, always from lower blocks, in their order:
// the result does not depend on who is first, nobody waits in a circle, and a block waits only for blocks that started
// no later than it
//
// A block publishes at most once, in the slot of its own number; the one block that collects a slot lowers its flag
// again. So flags are zero after every launch, and a launch can be repeated from a captured graph. Two launches at a
// time need two sets.
#pragma once

#include "machine.cuh"

namespace halfbyte {

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// The first step on the line that block b takes.
DEVICE int stripe_begin(int block, int blocks, int total) {
    return static_cast<int>(static_cast<long long>(total) * block / blocks);
}

// Walks a block's stripe.
struct Walk {
    int begin, steps;       // of the stripe, on the line; in a tile
    int left;               // steps of the stripe that are still to do
    int tile;               // where it is
    int first, step, last;  // in that tile: the part [first, last) is this block's

    DEVICE Walk(int tiles, int steps) : steps(steps) {
        const int total = tiles * steps, end = stripe_begin(block_index() + 1, block_count(), total);
        begin = stripe_begin(block_index(), block_count(), total);
        left = end - begin;
        enter((end - 1) / steps);
        last = end - tile * steps;
    }
    DEVICE void enter(int number) {
        tile = number;
        first = step = larger(begin - tile * steps, 0);
        last = steps;
    }
    DEVICE void advance() {
        --left;
        if (++step == last) enter(tile - 1);
    }
    DEVICE bool at_last_step() const { return step + 1 == last; }
    DEVICE bool begins_tile() const { return first == 0; }
    DEVICE bool ends_tile() const { return last == steps; }
};

// Sums [FLOATS] of each of the threads below `threads`, kept in memory by block, for the block that collects them.
template <int FLOATS>
struct Exchange {
    float4* partials;  // [blocks][FLOATS / 4][threads]
    u32* flags;        // [blocks]
    int threads;

    DEVICE float4* slot(int block) const {
        return partials + static_cast<long long>(block) * (FLOATS / 4) * threads + thread_index_anew();
    }
    // Every thread of the block calls these.
    DEVICE void publish(const float (&sums)[FLOATS]) const {
        if (thread_index() < threads) {
            float4* to = slot(block_index());
#pragma unroll
            for (int i = 0; i < FLOATS / 4; ++i) {
                store_partial(to + i * threads, {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]});
            }
        }
        barrier();
        if (thread_index() == 0) store_release(flags + block_index(), 1);
    }
    DEVICE void collect(const Walk& walk, int total, float (&sums)[FLOATS]) const {
        int from = block_index() - 1;
        while (stripe_begin(from, block_count(), total) > walk.tile * walk.steps) --from;
        for (; from < block_index(); ++from) {
            if (thread_index() == 0) {
                while (load_acquire(flags + from) == 0) {
                }
                store_release(flags + from, 0);
            }
            barrier();
            if (thread_index() >= threads) continue;
            const float4* part = slot(from);
#pragma unroll
            for (int i = 0; i < FLOATS / 4; ++i) {
                const float4 more = load_partial(part + i * threads);
                sums[4 * i] += more.x;
                sums[4 * i + 1] += more.y;
                sums[4 * i + 2] += more.z;
                sums[4 * i + 3] += more.w;
            }
        }
    }
};

}  // namespace halfbyte
