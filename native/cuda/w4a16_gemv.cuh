// Up to eight rows of x: a block of eight warps takes 64 rows of W, a warp 16 of them and every second tile along K.
//
// Weights are read once, by the one lane that needs them, so nothing is shared and no warp waits for another before the
// sums of a tile are whole: a lane copies its own 16 bytes DEPTH tiles ahead to its own place in shared memory, which
// costs no registers. x comes from L1 and L2 in 16-byte loads, one tile ahead.
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
    static constexpr int GROUPS = PAIR ? 2 : 1, LINES = GROUPS * (HAS_ZEROS ? 2 : 1);
    static constexpr int DEPTH = 6, SLICES = WARPS / SUBTILES, SUMMING = THREADS / SLICES, SUMS = 4;
    // In shared memory: [DEPTH][THREADS] words, [DEPTH][LINES][THREADS] scales and zeros, the sums of slice 1.
    static constexpr int LINES_AT = DEPTH * THREADS * LANE_BYTES;
    static constexpr int SUMS_AT = LINES_AT + DEPTH * LINES * THREADS * 4;
    static constexpr int SHARED_BYTES = SUMS_AT + SUMMING * SUMS * 4;

    const Product p;
    char* const shared;
    const int lane, subtile, slice;
    uint4 x[2];
    float sums[SUMS] = {0, 0, 0, 0};

    DEVICE Gemv(const Product& product)
        : p(product),
          shared(shared_memory()),
          lane(thread_index() % LANES),
          subtile(thread_index() / LANES % SUBTILES),
          slice(thread_index() / LANES / SUBTILES) {}

    DEVICE int steps() const { return (p.tiles() + SLICES - 1) / SLICES; }
    DEVICE char* words_at(int depth) const { return shared + (depth * THREADS + thread_index()) * LANE_BYTES; }
    DEVICE char* line_at(int depth, int line) const {
        return shared + LINES_AT + ((depth * LINES + line) * THREADS + thread_index()) * 4;
    }

    DEVICE void issue_next(Walk& load, int depth) const {
        if (load.left > 0) {
            const int tile = load.step * SLICES + slice;
            const bool valid = tile < p.tiles();
            const char* from = reinterpret_cast<const char*>(p.weights) + tile_offset(load.tile, tile, p.tiles());
            copy_async16(words_at(depth), from + lane_offset(subtile, lane), valid);
#pragma unroll
            for (int h = 0; h < GROUPS; ++h) {
                const int group = p.group<PAIR>(tile, h), groups = p.groups<PAIR>();
                const u32* scale = p.scales + group_offset(load.tile, group, groups, SCALE_WORDS) + subtile * 8 + lane / 4;
                copy_async4(line_at(depth, h), scale, valid);
                if (HAS_ZEROS) {
                    const u32* zero = p.zeros + group_offset(load.tile, group, groups, ZERO_WORDS) + lane / 4;
                    copy_async4(line_at(depth, GROUPS + h), zero, valid);
                }
            }
            load.advance();
        }
        commit_copies();
    }

    DEVICE void load_x(const Walk& at) {
        const int row = lane / 4, tile = at.step * SLICES + slice;
        x[0] = x[1] = {0, 0, 0, 0};
        if (row >= p.m || tile >= p.tiles() || at.left == 0) return;
        const char* from = static_cast<const char*>(p.x) + 2 * (static_cast<long long>(row) * p.k + tile * TILE);
        x[0] = load_constant<uint4>(from + 16 * x_chunk(0, lane));
        x[1] = load_constant<uint4>(from + 16 * x_chunk(1, lane));
    }

    DEVICE void multiply(int depth, const u32 (&b)[2 * STEPS]) {
        const uint4 words = load_shared<uint4>(words_at(depth));
        const u32 of_lane[STEPS] = {words.x, words.y, words.z, words.w};
        constexpr int GROUP_STEPS = STEPS / GROUPS;
#pragma unroll
        for (int h = 0; h < GROUPS; ++h) {
            const u32 scale = load_shared<u32>(line_at(depth, h));
            Zeros zero = Type::symmetric();
            if (HAS_ZEROS) zero = Type::zeros(load_shared<u32>(line_at(depth, GROUPS + h)), subtile);
            float part[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = h * GROUP_STEPS; s < (h + 1) * GROUP_STEPS; ++s) {
                u32 a[4];
                Type::dequantize(of_lane[s], zero, a);
                Type::mma(part, a, b[2 * s], b[2 * s + 1]);
            }
            const float upper = low_f16(scale), lower = high_f16(scale);
            sums[0] += upper * part[0];
            sums[1] += upper * part[1];
            sums[2] += lower * part[2];
            sums[3] += lower * part[3];
        }
    }

    DEVICE void run() {
        Walk load(p.strips(), steps()), at = load;
        for (int depth = 0; depth < DEPTH - 1; ++depth) issue_next(load, depth);
        load_x(at);
        for (int depth = 0; at.left > 0; depth = depth + 1 == DEPTH ? 0 : depth + 1) {
            const u32 b[2 * STEPS] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
            const Walk here = at;
            at.advance();
            load_x(at);
            await_copies<DEPTH - 2>();
            multiply(depth, b);
            // The place of the tile before this one: this lane read it, and only this lane.
            issue_next(load, depth == 0 ? DEPTH - 1 : depth - 1);
            if (here.at_last_step()) {
                finish(here);
                sums[0] = sums[1] = sums[2] = sums[3] = 0;
            }
        }
    }

    DEVICE void finish(const Walk& at) {
        char* place = shared + SUMS_AT + 16 * (thread_index() % SUMMING);
        if (slice == 1) store_shared<float4>(place, {sums[0], sums[1], sums[2], sums[3]});
        barrier();
        if (slice == 0) {
            const float4 more = load_shared<float4>(place);
            sums[0] += more.x;
            sums[1] += more.y;
            sums[2] += more.z;
            sums[3] += more.w;
        }
        const Exchange<SUMS> exchange{p.partials, p.flags, SUMMING};
        if (!at.ends_tile()) {
            exchange.publish(sums);
        } else {
            if (!at.begins_tile()) exchange.collect(at, p.strips() * steps(), sums);
            if (slice == 0) store_sums<Type>(p, 0, at.tile * TILE + subtile * SUBTILE_ROWS, lane, sums);
        }
        barrier();  // before slice 1 of the next tile takes the place
    }
};

}  // namespace halfbyte
