// One span of attention, see attention.hpp. Included by tier.hpp only.
//
// Scores: for each 16 positions and each d one load of keys per vector, widened from fp16 or int8, and one FMA a query: one to four
// chains over d for each score. Values: one chain over the positions for each query and d. Operations: 2 · head_dim FMAs a query
// and position, and 2 · head_dim conversions a position, shared by the queries. Scores take as long as fetching what they read,
// so the values are fetched beside them. The scales of int8 cost nothing beside them: a
// position's key scale multiplies its score, its value scale the weight that its value gets.
#pragma once

#include <type_traits>

#include "attention.hpp"
#include "math_kernel.hpp"

namespace halfbyte {
namespace {

template <class S>
struct AttentionKernel {
    using F = typename S::F;
    static constexpr int VECTORS = KEY_BLOCK / S::WIDTH;

    static constexpr int LANES = 16;  // chains: one would wait for each addition

    static float largest(const float* w, int n) {
        float lanes[LANES];
        for (int l = 0; l < LANES; ++l) lanes[l] = w[0];
        int i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int l = 0; l < LANES; ++l) lanes[l] = w[i + l] > lanes[l] ? w[i + l] : lanes[l];
        for (; i < n; ++i) lanes[0] = w[i] > lanes[0] ? w[i] : lanes[0];
        for (int l = 1; l < LANES; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
        return lanes[0];
    }

    static float total(const float* w, int n) {
        float lanes[LANES] = {};
        int i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int l = 0; l < LANES; ++l) lanes[l] += w[i + l];
        for (; i < n; ++i) lanes[0] += w[i];
        for (int l = 1; l < LANES; ++l) lanes[0] += lanes[l];
        return lanes[0];
    }

    // N: std::uint16_t for fp16, std::int8_t.
    template <class N>
    static constexpr bool IS_INT8 = std::is_same_v<N, std::int8_t>;
    static F load(const std::uint16_t* p) { return S::load_f16(p); }
    static F load(const std::int8_t* p) { return S::load_i8(p); }

    static constexpr int power_of_two_within(int n) { return n < 2 ? 1 : 2 * power_of_two_within(n / 2); }
    // Accumulators: with a weight or a query for each query and one number of the cache they fit sixteen registers.
    static constexpr int ACCUMULATORS = 12;
    static constexpr std::size_t CACHE_LINE = 64;

    // Of the sixteen positions from `at` on. Meanwhile their values are fetched, which are wanted next.
    template <class N, int Q>
    static inline void scores(const AttentionSpan& a, float (*out)[SPAN], int at) {
        constexpr int CHAINS = power_of_two_within(ACCUMULATORS / (Q * VECTORS));
        const N* keys = static_cast<const N*>(a.keys) + static_cast<std::size_t>(at) * a.head_dim;
        const N* values = static_cast<const N*>(a.values) + static_cast<std::size_t>(at) * a.head_dim;
        F acc[CHAINS][Q][VECTORS];
        for (int c = 0; c < CHAINS; ++c)
            for (int q = 0; q < Q; ++q)
                for (int v = 0; v < VECTORS; ++v) acc[c][q][v] = S::set1(0.0f);
        for (int d = 0; d < a.head_dim; d += CHAINS) {
            for (std::size_t line = 0; line < CHAINS * KEY_BLOCK * sizeof(N); line += CACHE_LINE)
                __builtin_prefetch(values + static_cast<std::size_t>(d) * KEY_BLOCK + line / sizeof(N));
            for (int c = 0; c < CHAINS; ++c)
                for (int v = 0; v < VECTORS; ++v) {
                    const F key = load(keys + static_cast<std::size_t>(d + c) * KEY_BLOCK + v * S::WIDTH);
                    for (int q = 0; q < Q; ++q)
                        acc[c][q][v] = S::fma(S::set1(a.queries[q * a.query_stride + d + c]), key, acc[c][q][v]);
                }
        }
        for (int v = 0; v < VECTORS; ++v) {
            const int to = at + v * S::WIDTH;
            for (int q = 0; q < Q; ++q) {
                F sum = acc[0][q][v];
                for (int c = 1; c < CHAINS; ++c) sum = S::add(sum, acc[c][q][v]);
                S::store(out[q] + to, IS_INT8<N> ? S::mul(sum, S::load(a.key_scales + to)) : sum);
            }
        }
    }

    template <class N, int Q, int V>
    static inline void values_at(const AttentionSpan& a, const float (*weights)[SPAN], int first, int last, int d) {
        F acc[Q][V];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < V; ++v) acc[q][v] = S::set1(0.0f);
        for (int i = first; i < last; ++i) {
            const N* row = static_cast<const N*>(a.values) + static_cast<std::size_t>(i) * a.head_dim + d;
            F weight[Q];
            for (int q = 0; q < Q; ++q) weight[q] = S::set1(weights[q][i]);
            for (int v = 0; v < V; ++v) {
                const F value = load(row + v * S::WIDTH);
                for (int q = 0; q < Q; ++q) acc[q][v] = S::fma(weight[q], value, acc[q][v]);
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < V; ++v) S::store(a.result + q * a.result_stride + 2 + d + v * S::WIDTH, acc[q][v]);
    }

    // From d on, as many vectors at a time as there are accumulators for.
    template <class N, int Q, int V>
    static inline void values_from(const AttentionSpan& a, const float (*weights)[SPAN], int first, int last, int d) {
        for (; d + V * S::WIDTH <= a.head_dim; d += V * S::WIDTH) values_at<N, Q, V>(a, weights, first, last, d);
        if constexpr (V > 1)
            if (d < a.head_dim) values_from<N, Q, V / 2>(a, weights, first, last, d);
    }

    template <class N, int Q>
    __attribute__((noinline)) static void attend_queries(const AttentionSpan& a) {
        alignas(64) float weights[Q][SPAN];
        const int first = a.begin, last = a.end;
        for (int i = first / KEY_BLOCK * KEY_BLOCK; i < last; i += KEY_BLOCK) scores<N, Q>(a, weights, i);
        for (int q = 0; q < Q; ++q) {
            float* w = weights[q];
            if (a.softcap != 0.0f) MathKernel<S>::softcap(w + first, last - first, a.softcap);
            const float most = largest(w + first, last - first);
            for (int i = first; i < last; ++i) w[i] = exp_of(w[i] - most);
            a.result[q * a.result_stride] = most;
            a.result[q * a.result_stride + 1] = total(w + first, last - first);
            if constexpr (IS_INT8<N>)
                for (int i = first; i < last; ++i) w[i] *= a.value_scales[i];
        }
        values_from<N, Q, power_of_two_within(ACCUMULATORS / Q)>(a, weights, first, last, 0);
    }

    template <class N>
    static void attend_numbers(const AttentionSpan& a) {
        switch (a.count) {
            case 1: return attend_queries<N, 1>(a);
            case 2: return attend_queries<N, 2>(a);
            case 3: return attend_queries<N, 3>(a);
            default: return attend_queries<N, 4>(a);
        }
    }

    static void attend(const AttentionSpan& a) {
        if (a.type == CacheType::int8)
            attend_numbers<std::int8_t>(a);
        else
            attend_numbers<std::uint16_t>(a);
    }
};

}  // namespace
}  // namespace halfbyte
