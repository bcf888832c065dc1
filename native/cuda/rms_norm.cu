// y = RMSNorm(x), or x += scale · branch and y = RMSNorm(x), rows [channels] of fp16 or bf16 (Zhang and Sennrich 2019, eq. 4):
//
//     y[i] = x[i] · (mean(x²) + ε)^(-1/2) · (offset + w[i])
//
// Sums and factors are fp32. Architectures round in two places: before the weight as well as after (Llama, Qwen), or after
// only, with an offset of 1 (Gemma). What is written back to x is what the mean is taken of.
//
//     x       branch        a block a row of x, a thread every 512th word of 8 numbers
//     ┌──┬──┬──┬──┐
//     │t0│t1│t2│… │  ──>  x' = round(x + scale · branch)  ──>  memory, and shared memory: a thread's own words
//     └──┴──┴──┴──┘                │
//                                  Σ x'²: 5 shuffles, 16 floats through shared memory, 5 shuffles
//                                  │
//                         y = x' · factor · w              each thread the words it kept
//
// Bytes of a row: x 2, y 2, and with a branch 4 more, for each channel; weights come from L2. A row of 4096 channels is 32
// KiB: 16 ns at the 2039 GB/s of an A100's data sheet. What a single row costs is the way to memory and back, twice.
#include "float_lanes.cuh"

namespace halfbyte {

struct Norm {
    static constexpr int THREADS = 512, WARPS = THREADS / 32;
    void* x;             // [rows, channels]; written where there is a branch
    const void* branch;  // [rows, channels] or null
    const void* weight;  // [channels]
    void* y;             // [rows, channels]
    int channels;
    float scale, epsilon, offset;
    int round_first;
};

// Over all threads of a block, the same in each of them; `partials` [WARPS] in shared memory.
DEVICE float block_sum(float value, char* partials) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    if (lane == 0) store_shared(partials + 4 * warp, value);
    barrier();
    value = load_shared<float>(partials + 4 * (lane % Norm::WARPS));
    for (int mask = Norm::WARPS / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Shared memory: [WARPS] floats, then the row, rounded up to what all threads take at once.
template <class Type, int WIDTH>
DEVICE void rms_norm(const Norm& norm) {
    using Word = typename Lanes<Type, WIDTH>::Word;
    constexpr int STEP = Norm::THREADS * WIDTH;
    const long long row = static_cast<long long>(block_index()) * norm.channels;
    char* const kept = shared_memory() + 4 * Norm::WARPS;
    float sum = 0.0f;
    for (int i = thread_index() * WIDTH; i < norm.channels; i += STEP) {
        float values[WIDTH];
        load_floats<Type>(norm.x, row + i, values);
        if (norm.branch) {
            float branch[WIDTH];
            load_floats<Type>(norm.branch, row + i, branch);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) values[j] += norm.scale * branch[j];
            store_floats<Type>(norm.x, row + i, values);
            round_floats<Type>(values);
        }
        store_shared(kept + 2 * i, Lanes<Type, WIDTH>::narrow(values));
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum += values[j] * values[j];
    }
    const float factor = inverse_sqrt(block_sum(sum, shared_memory()) / static_cast<float>(norm.channels) + norm.epsilon);
    for (int first = 0; first < norm.channels; first += STEP) {
        const int i = first + thread_index() * WIDTH;
        const Word word = load_shared<Word>(kept + 2 * i);
        if (i >= norm.channels) continue;
        float values[WIDTH], weights[WIDTH];
        Lanes<Type, WIDTH>::widen(word, values);
        load_floats<Type>(norm.weight, i, weights);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) values[j] *= factor;
        if (norm.round_first) round_floats<Type>(values);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) values[j] *= norm.offset + weights[j];
        store_floats<Type>(norm.y, row + i, values);
    }
}

}  // namespace halfbyte

// One variant a compilation: DECODER_TYPE is Half or BFloat. `rms_norm_narrow` is for rows that are no multiple of 8 numbers.
#ifdef DECODER_TYPE
#define ENTRY(NAME, WIDTH)                                                                                               \
    extern "C" __global__ void __launch_bounds__(halfbyte::Norm::THREADS)                                                \
        NAME(void* x, const void* branch, const void* weight, void* y, int channels, float scale, float epsilon,         \
             float offset, int round_first) {                                                                            \
        halfbyte::rms_norm<halfbyte::DECODER_TYPE, WIDTH>(                                                               \
            {x, branch, weight, y, channels, scale, epsilon, offset, round_first});                                      \
    }
ENTRY(rms_norm, 8)
ENTRY(rms_norm_narrow, 1)
#endif
