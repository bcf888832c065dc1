// More than eight rows of x: tiles of 16, 32 or 64 rows × 128 or 256 columns of y in a block of eight warps.
//
//                       x tile [rows][64 k] ──┐
//     memory ── cp.async ──> a ring of STAGES stages in shared memory ──> registers ──> mma.m16n8k16 ──> sums in registers
//                       W tiles, scales, zeros ┘
//
// A warp takes two subtiles, 32 rows of W, and all rows of x. With SLICES = 2 one half of the warps takes the even
// tiles along K and the other the odd ones: a stage is then 128 deep, a block's tile stays narrow, and each x that is
// read from shared memory meets 32 rows of W. Stage s + 1 goes from shared memory to registers while the tensor cores
// work on stage s.
#pragma once

#include "w4a16_product.cuh"

namespace halfbyte {

template <int X_TILES_, int STRIPS_, int SLICES_, int STAGES_, bool PAIR_, bool ZEROS_>
struct Shape {
    static constexpr int X_TILES = X_TILES_;  // of eight rows of x
    static constexpr int STRIPS = STRIPS_, SLICES = SLICES_, STAGES = STAGES_;
    static constexpr bool PAIR = PAIR_;
    static constexpr int GROUPS = PAIR ? 2 : 1;  // in a tile
    static constexpr bool ZEROS = ZEROS_;
    static constexpr int ROWS = 8 * X_TILES, SLICE_WARPS = WARPS / SLICES;
    static constexpr int SUMS = WARP_SUBTILES * X_TILES * 4;  // of a lane
    // A stage in shared memory, in bytes.
    static constexpr int TILES = STRIPS * SLICES, LINES = TILES * GROUPS;
    static constexpr int X_AT = TILES * TILE_BYTES;
    static constexpr int SCALES_AT = X_AT + SLICES * ROWS * X_ROW_BYTES;
    static constexpr int ZEROS_AT = SCALES_AT + LINES * SCALE_WORDS * 4;
    static constexpr int STAGE_BYTES = ZEROS_AT + (ZEROS ? LINES * ZERO_WORDS * 4 : 0);
    // Behind the stages: the sums of one slice, for the other.
    static constexpr int SUMS_AT = STAGES * STAGE_BYTES;
    static constexpr int SHARED_BYTES = SUMS_AT + (SLICES - 1) * SLICE_WARPS * LANES * SUMS * 4;

    // Of an output tile. Neighbours on the line share weights, which are then in L2.
    static DEVICE int x_blocks(const Product& p) { return (p.m + ROWS - 1) / ROWS; }
    static DEVICE int output_tiles(const Product& p) { return (p.strips() + STRIPS - 1) / STRIPS * x_blocks(p); }
    static DEVICE int steps(const Product& p) { return (p.tiles() + SLICES - 1) / SLICES; }
    static DEVICE int first_strip(const Product& p, const Walk& at) { return at.tile / x_blocks(p) * STRIPS; }
    static DEVICE int first_row(const Product& p, const Walk& at) { return at.tile % x_blocks(p) * ROWS; }

    static_assert(SLICE_WARPS * WARP_SUBTILES == STRIPS * SUBTILES, "every subtile has its warp");
    static_assert(SLICES <= 2 && STAGES >= 4, "the reduction and the pipeline are written for these");
};

// Copies a stripe's stages to shared memory, each thread its chunks of 16 bytes. Addresses are worked out once an
// output tile and move on by a constant.
template <class S>
struct Loader {
    static constexpr int TILE_CHUNKS = TILE_BYTES / 16, ROW_CHUNKS = S::SLICES * X_CHUNKS;
    static constexpr int WEIGHTS = S::TILES * TILE_CHUNKS / THREADS, X = S::ROWS * ROW_CHUNKS / THREADS;  // of a thread
    // Scales and zero points of a group, a line: fewer chunks than threads.
    static constexpr int SCALE_CHUNKS = SCALE_WORDS / 4, LINE_CHUNKS = SCALE_CHUNKS + (S::ZEROS ? ZERO_WORDS / 4 : 0);
    static_assert(S::LINES * LINE_CHUNKS <= THREADS, "a thread a chunk");

    const Product& p;
    char* const shared;
    Walk at;
    const char* weights[WEIGHTS];
    const char* x[X];
    const char* line;
    bool weights_valid[WEIGHTS], x_valid[X], line_valid;

    DEVICE Loader(const Product& p, char* shared, const Walk& at) : p(p), shared(shared), at(at) {}

    // A group of copies; empty behind the end of the stripe.
    DEVICE void issue(int stage) {
        if (at.left > 0) {
            if (at.step == at.first) enter();
            char* to = shared + stage * S::STAGE_BYTES;
            issue_tiles(to);
            issue_line(to);
            at.advance();
        }
        commit_copies();
    }

    // What lies outside of W and x becomes zero.
    DEVICE void enter() {
        const int thread = thread_index_anew(), tiles = p.tiles(), tile = at.step * S::SLICES;
        const int strip = S::first_strip(p, at), row = S::first_row(p, at);
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) {
            const int chunk = thread + i * THREADS, of_stage = chunk / TILE_CHUNKS;
            const int of_strip = strip + of_stage / S::SLICES;
            weights_valid[i] = of_strip < p.strips();
            weights[i] = reinterpret_cast<const char*>(p.weights) + 16 * (chunk % TILE_CHUNKS) +
                         tile_offset(of_strip, tile + of_stage % S::SLICES, tiles);
        }
#pragma unroll
        for (int i = 0; i < X; ++i) {
            const int chunk = thread + i * THREADS, of_row = row + chunk / ROW_CHUNKS;
            x_valid[i] = of_row < p.m;
            x[i] = static_cast<const char*>(p.x) + 2 * (static_cast<long long>(of_row) * p.k + tile * TILE) +
                   16 * (chunk % ROW_CHUNKS);
        }
        const int number = thread / LINE_CHUNKS, of_stage = number / S::GROUPS / S::SLICES, chunk = thread % LINE_CHUNKS;
        line_valid = number < S::LINES && strip + of_stage < p.strips();
        const bool scale = chunk < SCALE_CHUNKS;
        const long long words = scale ? SCALE_WORDS : ZERO_WORDS;
        line = reinterpret_cast<const char*>(scale ? p.scales : p.zeros) +
               4 * words * (strip + of_stage) * p.groups<S::PAIR>() + 16 * (scale ? chunk : chunk - SCALE_CHUNKS);
    }

    // With two slices, the second's last tile may lie outside.
    DEVICE bool inside(int slice) const { return S::SLICES == 1 || at.step * S::SLICES + slice < p.tiles(); }

    DEVICE void issue_tiles(char* to) {
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) {
            const int chunk = thread_index() + i * THREADS;
            copy_async16(to + 16 * chunk, weights[i], weights_valid[i] && inside(chunk / TILE_CHUNKS % S::SLICES));
            weights[i] += S::SLICES * TILE_BYTES;
        }
#pragma unroll
        for (int i = 0; i < X; ++i) {
            const int chunk = thread_index() + i * THREADS, row = chunk / ROW_CHUNKS, of_row = chunk % ROW_CHUNKS;
            const int slice = of_row / X_CHUNKS;
            char* place = to + S::X_AT + slice * S::ROWS * X_ROW_BYTES + x_offset(row, of_row % X_CHUNKS);
            copy_async16(place, x[i], x_valid[i] && inside(slice));
            x[i] += S::SLICES * X_ROW_BYTES;
        }
    }

    DEVICE static int line_number() { return thread_index() / LINE_CHUNKS; }
    DEVICE static int line_chunk() { return thread_index() % LINE_CHUNKS; }

    DEVICE void issue_line(char* to) const {
        const int number = line_number(), chunk = line_chunk(), slice = number / S::GROUPS % S::SLICES;
        if (number >= S::LINES) return;
        const int group = p.group<S::PAIR>(at.step * S::SLICES + slice, number % S::GROUPS);
        const bool scale = chunk < SCALE_CHUNKS;
        const int place = scale ? S::SCALES_AT + number * SCALE_WORDS * 4 + 16 * chunk
                                : S::ZEROS_AT + number * ZERO_WORDS * 4 + 16 * (chunk - SCALE_CHUNKS);
        copy_async16(to + place, line + group * (scale ? SCALE_WORDS : ZERO_WORDS) * 4, line_valid && inside(slice));
    }
};

template <class Type, class S>
struct Gemm {
    using Zeros = typename Type::Zeros;
    static constexpr int SHARED_BYTES = S::SHARED_BYTES;

    const Product p;
    char* const shared;
    const int lane, slice, warp_in_slice;
    // Of the stage at hand, in registers.
    uint4 words[WARP_SUBTILES];
    u32 scales[S::GROUPS][WARP_SUBTILES], zeros[S::GROUPS];
    float sums[S::SUMS];  // [WARP_SUBTILES][X_TILES][4]

    DEVICE Gemm(const Product& product)
        : p(product),
          shared(shared_memory()),
          lane(thread_index() % LANES),
          slice(thread_index() / LANES / S::SLICE_WARPS),
          warp_in_slice(thread_index() / LANES % S::SLICE_WARPS) {}

    DEVICE int warp_strip() const { return warp_in_slice * WARP_SUBTILES / SUBTILES; }
    DEVICE int warp_subtile() const { return warp_in_slice * WARP_SUBTILES % SUBTILES; }

    // From a stage to registers.
    DEVICE void fetch(const char* stage) {
        const int of_stage = warp_strip() * S::SLICES + slice;
#pragma unroll
        for (int j = 0; j < WARP_SUBTILES; ++j) {
            words[j] = load_shared<uint4>(stage + of_stage * TILE_BYTES + lane_offset(warp_subtile() + j, lane));
        }
#pragma unroll
        for (int h = 0; h < S::GROUPS; ++h) {
            const int line = of_stage * S::GROUPS + h;
            const char* scale = stage + S::SCALES_AT + 4 * (line * SCALE_WORDS + warp_subtile() * 8 + lane / 4);
#pragma unroll
            for (int j = 0; j < WARP_SUBTILES; ++j) scales[h][j] = load_shared<u32>(scale + 32 * j);
            if (S::ZEROS) zeros[h] = load_shared<u32>(stage + S::ZEROS_AT + 4 * (line * ZERO_WORDS + lane / 4));
        }
    }

    DEVICE void dequantize(u32 (&a)[WARP_SUBTILES][STEPS][4]) const {
#pragma unroll
        for (int j = 0; j < WARP_SUBTILES; ++j) {
            const u32 of_lane[STEPS] = {words[j].x, words[j].y, words[j].z, words[j].w};
            Zeros zero = Type::symmetric();
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                if (S::ZEROS && s % (STEPS / S::GROUPS) == 0) {
                    zero = Type::zeros(zeros[s * S::GROUPS / STEPS], warp_subtile() + j);
                }
                Type::dequantize(of_lane[s], zero, a[j][s]);
            }
        }
    }

    // sums += scale · (a · x) of a stage, group by group.
    DEVICE void multiply(const char* stage, const u32 (&a)[WARP_SUBTILES][STEPS][4],
                         const u32 (&scale)[S::GROUPS][WARP_SUBTILES]) {
        const char* x = stage + S::X_AT + slice * S::ROWS * X_ROW_BYTES;
        const char* x_low = x + x_offset(lane / 4, x_chunk(0, lane));
        const char* x_high = x + x_offset(lane / 4, x_chunk(1, lane));
        constexpr int GROUP_STEPS = STEPS / S::GROUPS;
#pragma unroll
        for (int i = 0; i < S::X_TILES; ++i) {
            const uint4 low = load_shared<uint4>(x_low + 8 * i * X_ROW_BYTES);
            const uint4 high = load_shared<uint4>(x_high + 8 * i * X_ROW_BYTES);
            const u32 b[2 * STEPS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < WARP_SUBTILES; ++j) {
#pragma unroll
                for (int h = 0; h < S::GROUPS; ++h) {
                    float part[4] = {0, 0, 0, 0};
#pragma unroll
                    for (int s = h * GROUP_STEPS; s < (h + 1) * GROUP_STEPS; ++s) {
                        Type::mma(part, a[j][s], b[2 * s], b[2 * s + 1]);
                    }
                    const float upper = low_f16(scale[h][j]), lower = high_f16(scale[h][j]);
                    float* sum = sums + 4 * (j * S::X_TILES + i);
                    sum[0] += upper * part[0];
                    sum[1] += upper * part[1];
                    sum[2] += lower * part[2];
                    sum[3] += lower * part[3];
                }
            }
        }
    }

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < S::SUMS; ++i) sums[i] = 0;
    }

    DEVICE void run() {
        Walk at(S::output_tiles(p), S::steps(p));
        Loader<S> loader(p, shared, at);
        for (int stage = 0; stage < S::STAGES - 1; ++stage) loader.issue(stage);
        await_copies<S::STAGES - 2>();
        barrier();
        fetch(shared);
        clear();
        for (int stage = 0, fill = S::STAGES - 1; at.left > 0;) {
            // The next stage is there; and all warps are done with the one before this, which is filled again.
            await_copies<S::STAGES - 3>();
            barrier();
            loader.issue(fill);
            u32 a[WARP_SUBTILES][STEPS][4], scale[S::GROUPS][WARP_SUBTILES];
            dequantize(a);
#pragma unroll
            for (int h = 0; h < S::GROUPS; ++h) {
#pragma unroll
                for (int j = 0; j < WARP_SUBTILES; ++j) scale[h][j] = scales[h][j];
            }
            const int next = stage + 1 == S::STAGES ? 0 : stage + 1;
            fetch(shared + next * S::STAGE_BYTES);
            multiply(shared + stage * S::STAGE_BYTES, a, scale);
            if (at.at_last_step()) {
                finish(at);
                clear();
            }
            at.advance();
            fill = stage;
            stage = next;
        }
    }

    // The block's part of an output tile is summed.
    DEVICE void finish(const Walk& at) {
        constexpr int SUMMING = S::SLICE_WARPS * LANES;  // the threads of slice 0
        if constexpr (S::SLICES == 2) add_slices();
        const Exchange<S::SUMS> exchange{p.partials, p.flags, SUMMING};
        if (!at.ends_tile()) {
            exchange.publish(sums);
            return;
        }
        if (!at.begins_tile()) exchange.collect(at, S::output_tiles(p) * S::steps(p), sums);
        if (slice == 0) store(at);
    }

    DEVICE void add_slices() {
        constexpr int SUMMING = S::SLICE_WARPS * LANES;
        char* place = shared + S::SUMS_AT + 16 * (thread_index() % SUMMING);
        if (slice == 1) {
#pragma unroll
            for (int i = 0; i < S::SUMS / 4; ++i) {
                store_shared<float4>(place + 16 * i * SUMMING, {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]});
            }
        }
        barrier();
        if (slice == 1) return;
#pragma unroll
        for (int i = 0; i < S::SUMS / 4; ++i) {
            const float4 more = load_shared<float4>(place + 16 * i * SUMMING);
            sums[4 * i] += more.x;
            sums[4 * i + 1] += more.y;
            sums[4 * i + 2] += more.z;
            sums[4 * i + 3] += more.w;
        }
    }

    DEVICE void store(const Walk& at) const {
        const int strip = S::first_strip(p, at) + warp_strip(), here = thread_index_anew() % LANES;
        if (strip >= p.strips()) return;
#pragma unroll
        for (int j = 0; j < WARP_SUBTILES; ++j) {
            const int column = strip * TILE + (warp_subtile() + j) * SUBTILE_ROWS;
#pragma unroll
            for (int i = 0; i < S::X_TILES; ++i) {
                store_sums<Type>(p, S::first_row(p, at) + 8 * i, column, here, sums + 4 * (j * S::X_TILES + i));
            }
        }
    }
};

}  // namespace halfbyte
