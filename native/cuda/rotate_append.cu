// What lies between the product that makes q, k and v and attention, in one launch: norms of the heads of q and k where the
// model has them (Qwen3), rotation of q and k by their position (Su et al. 2021, eq. 34), k and v to the cache.
//
//     qkv [rows, (heads + 2 · kv_heads) · head_dim]          keys, values [sequences, kv_heads, capacity, head_dim]
//     ┌────────────────┬────────┬────────┐
//     │ q heads        │ k      │ v      │    q turned where it stands; k turned, and v, to position p of the cache
//     └────────────────┴────────┴────────┘
//
// A head is cut into slots of 16 numbers, a lane each. Number i turns with number i + pairs, so a slot that turns is two words
// of 8, `pairs` apart; behind them 2 · pairs, up to head_dim, nothing turns (partial rotation), nor does any of v:
//
//     0          pairs       2 · pairs    head_dim
//     │ 0 │ 1 │ 2 │ 0 │ 1 │ 2 │ 3   3 │ 4   4 │     slots of a head of 80 numbers, pairs = 24
//
// Lanes of a head are a power of two, so that its mean square is a few shuffles. All arithmetic is fp32; q, k and v are rounded
// once, as they are stored. Positions are read here, not by the host: a captured graph runs at whatever positions the buffer
// holds. A row of position -1 stands for nothing (sequences of a step with fewer tokens than others): it is not appended.
//
// Bytes of a row: 2 · head_dim · (2 · heads + 4 · kv_heads), and 8 · pairs of the tables, for all heads of the row from L2.
#include "float_lanes.cuh"

namespace halfbyte {

struct Rotation {
    static constexpr int THREADS = 256, SLOT = 16;
    void* qkv;
    void *keys, *values;
    const int* positions;            // [rows], below the capacity; -1 for none
    const float *cosines, *sines;    // [positions, pairs]
    const void *q_norm, *k_norm;     // [head_dim] or null
    int rows, tokens;                // in all; of a sequence, whose rows are neighbours
    int heads, kv_heads, head_dim, pairs, capacity;
    int lanes;                       // of a head: a power of two, head_dim / 16 or more
    float epsilon, offset;
};

DEVICE void load_table(const float* table, long long index, float (&values)[8]) {
    const float4 low = load_constant<float4>(table + index), high = load_constant<float4>(table + index + 4);
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = all[i];
}

template <class Type>
DEVICE void rotate_append(const Rotation& r) {
    const int group = (block_index() * Rotation::THREADS + thread_index()) / r.lanes, slot = thread_index() % r.lanes;
    const int heads = r.heads + 2 * r.kv_heads, row = group / heads, head = group % heads;
    const bool is_value = head >= r.heads + r.kv_heads, is_query = head < r.heads;
    const int position = row < r.rows ? load_constant<int>(r.positions + row) : -1;
    const bool live = slot < r.head_dim / Rotation::SLOT && position >= 0 && position < r.capacity;
    const int pairs = is_value ? 0 : r.pairs;
    const bool turns = 8 * slot < pairs;
    const int low = turns ? 8 * slot : 2 * pairs + Rotation::SLOT * (slot - pairs / 8), high = low + (turns ? pairs : 8);
    const long long from = (static_cast<long long>(row) * heads + head) * r.head_dim;
    float a[8] = {}, b[8] = {};
    if (live) {
        load_floats<Type>(r.qkv, from + low, a);
        load_floats<Type>(r.qkv, from + high, b);
    }
    if (r.q_norm) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += a[i] * a[i] + b[i] * b[i];
        for (int mask = r.lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (live && !is_value) {
            const float factor = inverse_sqrt(sum / static_cast<float>(r.head_dim) + r.epsilon);
            const void* const norm = is_query ? r.q_norm : r.k_norm;
            float for_a[8], for_b[8];
            load_floats<Type>(norm, low, for_a);
            load_floats<Type>(norm, high, for_b);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                a[i] *= factor * (r.offset + for_a[i]);
                b[i] *= factor * (r.offset + for_b[i]);
            }
        }
    }
    if (!live) return;
    if (turns) {
        float cosines[8], sines[8];
        load_table(r.cosines, static_cast<long long>(position) * r.pairs + low, cosines);
        load_table(r.sines, static_cast<long long>(position) * r.pairs + low, sines);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float turned = a[i] * cosines[i] - b[i] * sines[i];
            b[i] = b[i] * cosines[i] + a[i] * sines[i];
            a[i] = turned;
        }
    }
    if (is_query) {
        store_floats<Type>(r.qkv, from + low, a);
        store_floats<Type>(r.qkv, from + high, b);
        return;
    }
    const int kv_head = head - r.heads - (is_value ? r.kv_heads : 0);
    const long long place = static_cast<long long>(row / r.tokens) * r.kv_heads + kv_head;
    const long long to = (place * r.capacity + position) * r.head_dim;
    store_floats<Type>(is_value ? r.values : r.keys, to + low, a);
    store_floats<Type>(is_value ? r.values : r.keys, to + high, b);
}

}  // namespace halfbyte

// One variant a compilation: DECODER_TYPE is Half or BFloat.
#ifdef DECODER_TYPE
extern "C" __global__ void __launch_bounds__(halfbyte::Rotation::THREADS)
    rotate_append(void* qkv, void* keys, void* values, const int* positions, const float* cosines, const float* sines,
                  const void* q_norm, const void* k_norm, int rows, int tokens, int heads, int kv_heads, int head_dim,
                  int pairs, int capacity, int lanes, float epsilon, float offset) {
    halfbyte::rotate_append<halfbyte::DECODER_TYPE>({qkv, keys, values, positions, cosines, sines, q_norm, k_norm, rows,
                                                     tokens, heads, kv_heads, head_dim, pairs, capacity, lanes, epsilon,
                                                     offset});
}
#endif
