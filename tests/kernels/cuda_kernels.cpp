// The kernels of native/cuda as they are, on the model of cuda_machine.hpp, for tests/kernels/test_cuda_kernels.py.
#include "w4a16_gemm.cu"

using namespace halfbyte;

namespace {

std::string message;

struct Counts {
    long long mma, shared_loads, bank_conflicts, waits;
};

template <class Kernel>
void run(const Product& product, machine::Machine& gpu, int blocks, unsigned seed) {
    machine::launch(gpu, blocks, THREADS, Kernel::SHARED_BYTES, seed, [&] { Kernel(product).run(); });
}

// Calls `use` with the kernel for a number of rows and the variant.
template <class Type, bool PAIR, bool ZEROS, class Use>
auto with_rows(int rows, Use&& use) {
    switch (rows) {
        case 8: return use(static_cast<Rows8<Type, PAIR, ZEROS>*>(nullptr));
        case 16: return use(static_cast<Rows16<Type, PAIR, ZEROS>*>(nullptr));
        case 32: return use(static_cast<Rows32<Type, PAIR, ZEROS>*>(nullptr));
        default: return use(static_cast<Rows64<Type, PAIR, ZEROS>*>(nullptr));
    }
}
template <class Type, class Use>
auto with_type(int rows, bool pair, bool zeros, Use&& use) {
    if (pair) return zeros ? with_rows<Type, true, true>(rows, use) : with_rows<Type, true, false>(rows, use);
    return zeros ? with_rows<Type, false, true>(rows, use) : with_rows<Type, false, false>(rows, use);
}
template <class Use>
auto with_kernel(int rows, bool bfloat, bool pair, bool zeros, Use&& use) {
    return bfloat ? with_type<BFloat>(rows, pair, zeros, use) : with_type<Half>(rows, pair, zeros, use);
}

}  // namespace

extern "C" {

const char* last_error() { return message.c_str(); }

int shared_bytes(int rows, int pair, int zeros) {
    return with_kernel(rows, false, pair, zeros, [](auto* kernel) { return std::remove_pointer_t<decltype(kernel)>::SHARED_BYTES; });
}

// 0, or 1 with the reason in last_error(). `tensors`: address and bytes of x, weights, scales, zeros, row_scale, bias,
// y, partials, flags; the last three may be written.
int run_w4a16(int rows, int bfloat, int pair, int zeros, const size_t (*tensors)[2], int m, int n, int k, int group_shift, int blocks,
              unsigned seed, Counts* counts) {
    machine::Machine gpu;
    for (int i = 0; i < 9; ++i) gpu.tensors.push_back({reinterpret_cast<const char*>(tensors[i][0]), tensors[i][1], i >= 6});
    auto at = [&](int i) { return reinterpret_cast<void*>(tensors[i][0]); };
    const Product product{at(0), static_cast<const uint4*>(at(1)), static_cast<const u32*>(at(2)), static_cast<const u32*>(at(3)),
                          static_cast<const float*>(at(4)), static_cast<const float*>(at(5)), at(6), static_cast<float4*>(at(7)),
                          static_cast<u32*>(at(8)), m, n, k, group_shift};
    try {
        with_kernel(rows, bfloat, pair, zeros,
                    [&](auto* kernel) { run<std::remove_pointer_t<decltype(kernel)>>(product, gpu, blocks, seed); });
    } catch (const std::exception& error) {
        message = error.what();
        return 1;
    }
    *counts = {gpu.mma, gpu.shared_loads, gpu.bank_conflicts, gpu.waits};
    return 0;
}

// The four pairs of 16-bit floats that a word of codes becomes; `nibbles` is a word of zero points, `subtile` which of
// its pairs.
void dequantize_w4a16(int bfloat, unsigned word, int zeros, unsigned nibbles, int subtile, unsigned* pairs) {
    u32 a[4];
    if (bfloat) {
        BFloat::dequantize(word, zeros ? BFloat::zeros(nibbles, subtile) : BFloat::symmetric(), a);
    } else {
        Half::dequantize(word, zeros ? Half::zeros(nibbles, subtile) : Half::symmetric(), a);
    }
    std::memcpy(pairs, a, sizeof(a));
}

}
