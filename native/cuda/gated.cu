// The gated activation of an MLP (Shazeer 2020): out = f(gate) · up, f one of SiLU, GELU in its two forms, and ReLU.
//
//     gate_up [rows, 2 · width]                    out [rows, width]
//     ┌──────────────┬──────────────┐              ┌──────────────┐
//     │ gate  ■      │ up    ■      │  ──────────> │       ■      │    a thread 8 numbers of each
//     └──────────────┴──────────────┘              └──────────────┘
//
// Arithmetic is fp32, each result is rounded once. Bytes: 6 a number of `out`. For one token of a 7B Llama, 11008 numbers, that is
// 66 KB: 32 ns at the 2039 GB/s of an A100's data sheet; a launch costs more.
#include "float_lanes.cuh"

namespace halfbyte {

struct Gate {
    static constexpr int THREADS = 256;
    enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };
    const void* gate_up;
    void* out;
    int rows, width, activation;
};

DEVICE float activate(float x, int activation) {
    switch (activation) {
        case Gate::SILU: return x / (1.0f + exponential(-x));
        case Gate::GELU_TANH:
            return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
        case Gate::GELU: return 0.5f * x * (1.0f + error_function(0.70710678f * x));
        default: return x > 0.0f ? x : 0.0f;
    }
}

template <class Type, int WIDTH>
DEVICE void multiply_by_gate(const Gate& g) {
    const int words = g.width / WIDTH;  // of a row
    const long long word = static_cast<long long>(block_index()) * Gate::THREADS + thread_index();
    const long long row = word / words, column = word % words * WIDTH;
    if (row >= g.rows) return;
    float gate[WIDTH], up[WIDTH];
    load_floats<Type>(g.gate_up, row * 2 * g.width + column, gate);
    load_floats<Type>(g.gate_up, row * 2 * g.width + g.width + column, up);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) up[i] *= activate(gate[i], g.activation);
    store_floats<Type>(g.out, row * g.width + column, up);
}

}  // namespace halfbyte

// One variant a compilation: DECODER_TYPE is Half or BFloat. `gated_narrow` is for widths that are no multiple of 8.
#ifdef DECODER_TYPE
#define ENTRY(NAME, WIDTH)                                                                                               \
    extern "C" __global__ void __launch_bounds__(halfbyte::Gate::THREADS)                                                \
        NAME(const void* gate_up, void* out, int rows, int width, int activation) {                                      \
        halfbyte::multiply_by_gate<halfbyte::DECODER_TYPE, WIDTH>({gate_up, out, rows, width, activation});              \
    }
ENTRY(gated, 8)
ENTRY(gated_narrow, 1)
#endif
