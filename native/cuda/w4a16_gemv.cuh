// Up to eight rows of x: a block of eight warps takes 64 rows of W; a warp takes 32 of them, and every fourth tile
// along K.
//
// Weights are read once, by the one lane that needs them, so no warp waits for another before the sums of an output
// tile are whole: a warp copies its own part DEPTH - 1 tiles ahead to its own place in shared memory, which costs no
// registers. A lane's weights are its own, too; scales and zero points are copied by the lanes of a quad for each
// other. x comes from L1 and L2 in 16-byte loads, one tile ahead.
//
// The product itself is left to the tensor cores, though seven of eight columns are zero when M = 1. A word of eight
// codes takes 9 instructions to become pairs of fp16, and then one mma multiplies and adds them in fp32. Without: 8
// conversions to fp32 and 8 FMAs for each row of x. Products in fp16 would be fewer, but would round each of them and
// overflow on |x| > 4369.
#pragma once

#include "w4a16_product.cuh"

namespace halfbyte {

template <class Type, bool PAIR, bool HAS_ZEROS>
struct Gemv {
    using Zeros = typename Type::Zeros;
    static constexpr int GROUPS = PAIR ? 2 : 1, DEPTH = 4;
    static constexpr int SLICES = WARPS * WARP_SUBTILES / SUBTILES, SUMMING = THREADS / SLICES;
    static constexpr int SUMS = 4 * WARP_SUBTILES;
    // In shared memory: words of each thread, then scales and zeros of each warp, both DEPTH deep; the sums of slices.
    static constexpr int WORDS_BYTES = WARP_SUBTILES * THREADS * LANE_BYTES, LINES_BYTES = GROUPS * THREADS * 4;
    static constexpr int LINES_AT = DEPTH * WORDS_BYTES, SUMS_AT = LINES_AT + DEPTH * LINES_BYTES;
    static constexpr int SHARED_BYTES = SUMS_AT + (SLICES - 1) * SUMMING * SUMS * 4;

    const Product p;
    char* const words;  // this lane's, of the first of DEPTH
    char* const lines;  // this lane's
    const int lane, first_subtile, slice;
    Walk load;
    // Of the tile that is copied next, and of the one whose x is loaded next.
    const char *weights_from, *lines_from, *x_from;
    uint4 x[2];
    float sums[SUMS];

    DEVICE Gemv(const Product& product)
        : p(product),
          words(shared_memory() + thread_index() * LANE_BYTES),
          lines(shared_memory() + LINES_AT + thread_index() * 4),
          lane(thread_index() % LANES),
          first_subtile(thread_index() / LANES * WARP_SUBTILES % SUBTILES),
          slice(thread_index() / LANES * WARP_SUBTILES / SUBTILES),
          load(product.strips(), (product.tiles() + SLICES - 1) / SLICES) {}

    DEVICE void issue(int depth) {
        if (load.left > 0) {
            const int tile = load.step * SLICES + slice;
            if (load.step == load.first) enter(tile);
            const bool valid = tile < p.tiles();
#pragma unroll
            for (int j = 0; j < WARP_SUBTILES; ++j) {
                char* to = words + depth * WORDS_BYTES + j * THREADS * LANE_BYTES;
                copy_async16(to, weights_from + j * SUBTILE_BYTES, valid);
            }
            weights_from += SLICES * TILE_BYTES;
#pragma unroll
            for (int h = 0; h < GROUPS; ++h) {
                const int group = p.group<PAIR>(tile, h);
                const char* from = lines_from + group * (lane % 4 < WARP_SUBTILES ? 4 * SCALE_WORDS : 4 * ZERO_WORDS);
                copy_async4(lines + depth * LINES_BYTES + h * THREADS * 4, from, valid && line_used());
            }
            load.advance();
        }
        commit_copies();
    }

    // The first two lanes of a quad copy the scales of the subtiles, the third the zero points of the strip.
    DEVICE bool line_used() const { return lane % 4 < WARP_SUBTILES + HAS_ZEROS; }

    DEVICE void enter(int tile) {
        const int strip = load.tile, item = lane % 4, g = lane / 4, groups = p.groups<PAIR>();
        weights_from = reinterpret_cast<const char*>(p.weights) + tile_offset(strip, tile, p.tiles()) +
                       lane_offset(first_subtile, lane);
        const u32* scale = p.scales + group_offset(strip, 0, groups, SCALE_WORDS) + (first_subtile + item) * 8 + g;
        const u32* zero = p.zeros + group_offset(strip, 0, groups, ZERO_WORDS) + g;
        lines_from = reinterpret_cast<const char*>(item < WARP_SUBTILES ? scale : zero);
    }

    DEVICE void load_x(const Walk& at) {
        x[0] = x[1] = {0, 0, 0, 0};
        const int row = lane / 4, tile = at.step * SLICES + slice;
        if (at.step == at.first) {
            x_from = static_cast<const char*>(p.x) + 2 * (static_cast<long long>(row) * p.k + tile * TILE);
        }
        if (row < p.m && tile < p.tiles() && at.left > 0) {
            x[0] = load_constant<uint4>(x_from + 16 * x_chunk(0, lane));
            x[1] = load_constant<uint4>(x_from + 16 * x_chunk(1, lane));
        }
        x_from += SLICES * X_ROW_BYTES;
    }

    DEVICE void multiply(int depth, const u32 (&b)[2 * STEPS]) {
        constexpr int GROUP_STEPS = STEPS / GROUPS;
        uint4 line[GROUPS];  // scales of the subtiles, zero points
#pragma unroll
        for (int h = 0; h < GROUPS; ++h) {
            line[h] = load_shared<uint4>(lines - lane % 4 * 4 + depth * LINES_BYTES + h * THREADS * 4);
        }
#pragma unroll
        for (int j = 0; j < WARP_SUBTILES; ++j) {
            const uint4 word = load_shared<uint4>(words + depth * WORDS_BYTES + j * THREADS * LANE_BYTES);
            const u32 of_lane[STEPS] = {word.x, word.y, word.z, word.w};
#pragma unroll
            for (int h = 0; h < GROUPS; ++h) {
                const u32 scale = j == 0 ? line[h].x : line[h].y;
                const Zeros zero = HAS_ZEROS ? Type::zeros(line[h].z, first_subtile + j) : Type::symmetric();
                float part[4] = {0, 0, 0, 0};
#pragma unroll
                for (int s = h * GROUP_STEPS; s < (h + 1) * GROUP_STEPS; ++s) {
                    u32 a[4];
                    Type::dequantize(of_lane[s], zero, a);
                    Type::mma(part, a, b[2 * s], b[2 * s + 1]);
                }
                const float upper = low_f16(scale), lower = high_f16(scale);
                sums[4 * j] += upper * part[0];
                sums[4 * j + 1] += upper * part[1];
                sums[4 * j + 2] += lower * part[2];
                sums[4 * j + 3] += lower * part[3];
            }
        }
    }

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0;
    }

    DEVICE void run() {
        Walk at = load;
        for (int depth = 0; depth < DEPTH - 1; ++depth) issue(depth);
        load_x(at);
        clear();
        for (int depth = 0, before = DEPTH - 1; at.left > 0;) {
            const u32 b[2 * STEPS] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
            const Walk here = at;
            at.advance();
            load_x(at);
            // The warp's copies of this tile are there, and all its lanes are done with the tile before.
            await_copies<DEPTH - 2>();
            warp_barrier();
            issue(before);
            multiply(depth, b);
            if (here.at_last_step()) {
                finish(here);
                clear();
            }
            before = depth;
            depth = depth + 1 == DEPTH ? 0 : depth + 1;
        }
    }

    DEVICE void finish(const Walk& at) {
        char* place = shared_memory() + SUMS_AT + 16 * (thread_index() % SUMMING);
        if (slice > 0) {
#pragma unroll
            for (int j = 0; j < WARP_SUBTILES; ++j) {
                store_shared<float4>(place + 16 * ((slice - 1) * WARP_SUBTILES + j) * SUMMING,
                                     {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]});
            }
        }
        barrier();
        if (slice == 0) {
#pragma unroll
            for (int i = 0; i < (SLICES - 1) * WARP_SUBTILES; ++i) {
                const float4 more = load_shared<float4>(place + 16 * i * SUMMING);
                float* sum = sums + 4 * (i % WARP_SUBTILES);
                sum[0] += more.x;
                sum[1] += more.y;
                sum[2] += more.z;
                sum[3] += more.w;
            }
        }
        const Exchange<SUMS> exchange{p.partials, p.flags, SUMMING};
        if (!at.ends_tile()) {
            exchange.publish(sums);
        } else {
            if (!at.begins_tile()) exchange.collect(at, p.strips() * at.steps, sums);
            if (slice == 0) {
#pragma unroll
                for (int j = 0; j < WARP_SUBTILES; ++j) {
                    const int column = at.tile * TILE + (first_subtile + j) * SUBTILE_ROWS;
                    store_sums<Type>(p, 0, column, thread_index_anew() % LANES, sums + 4 * j);
                }
            }
        }
        barrier();  // before the other slices' next sums take the place
    }
};

}  // namespace halfbyte
