// y [M, N] = x [M, K] · Wᵀ + bias, x and y in fp16 or bf16, W [N, K] in 4-bit codes with a scale, and perhaps a zero
// point, per group of 32 columns, of a multiple of 64, or per row:
//
//     y[m, n] = row_scale[n] · Σ_groups scale[n, j] · Σ_(k in group j) x[m, k] · (q[n, k] - z[n, j]) + bias[n].
//
// The tensor cores compute yᵀ: W is operand A, rows of x are the eight columns of operand B, so that M is padded to 8
// only.
//
//      W strip, K ────────────────>                 x, K ──>
//      ┌──────┬──────┬──────┬──            8 rows  ┌──────┬──────┬──
//   64 │ tile │ tile │ tile │  2 KiB each          │      │      │
//      └──────┴──────┴──────┴──                    └──────┴──────┴──
//      tile = 4 subtiles [16, 64];   subtile = 32 lanes × 16 bytes = 4 mma.m16n8k16 for each 8 rows of x
//
// w4a16_layout.cuh draws where each code is, w4a16_types.cuh the instructions that make it a float, stripes.cuh who
// computes what.
//
// Bytes. W: 1/2 a weight + (2 + 1/2) / group_size; 0.52 at 128, 0.54 at 64, once from memory for all of x. y and the
// activations: 2·M·(K + N), little while M << K. The floor for M <= 16 is therefore reading W: K·N·0.52 bytes over the
// bandwidth of memory. Operations of a warp for a subtile, 1024 weights, and 8·i rows of x, fp16 (bf16):
//
//     dequantize    36 (44), and with zero points 5 (4) a group
//     mma           4·i
//     scale         4·i a group, at least one in 64 columns
//     x             2·i loads of 16 bytes, for two subtiles each
//
// and as much again for addresses, counters and predicates: about 100 instructions for 512 bytes with i = 1, counted in
// what nvcc makes (make cuda-check). At 4 a clock that is 20 bytes a clock and SM; memory delivers about 13 to an SM of an
// A100 and 21 on an H200. From i = 8 on the tensor cores are the floor: 2·M·N·K operations.
//
// Range and error. q - z is an integer of at most 15, exact; products are exact; tensor cores add them in fp32, groups
// are added by FMA in fp32, and y is rounded once. Scales keep the 11 bits that the AWQ format stores; others are
// rounded to that, 2^-11 of each at most.
#include "w4a16_gemm.cuh"
#include "w4a16_gemv.cuh"

namespace halfbyte {

// By the most rows of x they are for; the last takes any number, 64 at a time.
template <class Type, bool PAIR, bool ZEROS>
using Rows8 = Gemv<Type, PAIR, ZEROS>;
template <class Type, bool PAIR, bool ZEROS>
using Rows16 = Gemm<Type, Shape<2, 2, 2, 5, PAIR, ZEROS>>;
template <class Type, bool PAIR, bool ZEROS>
using Rows32 = Gemm<Type, Shape<4, 2, 2, 4, PAIR, ZEROS>>;
template <class Type, bool PAIR, bool ZEROS>
using Rows64 = Gemm<Type, Shape<8, 4, 1, 5, PAIR, ZEROS>>;

}  // namespace halfbyte

// One variant a compilation: W4A16_TYPE is Half or BFloat; W4A16_PAIR, that a tile has two groups, of 32 columns each;
// W4A16_ZEROS, that there are zero points, not 8 throughout.
#ifdef W4A16_TYPE
#define ENTRY(NAME, KERNEL, BLOCKS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(halfbyte::THREADS, BLOCKS)                                          \
        NAME(const void* x, const uint4* weights, const unsigned* scales, const unsigned* zeros,                     \
             const float* row_scale, const float* bias, void* y, float4* partials, unsigned* flags, int m, int n,    \
             int k, int group_shift) {                                                                               \
        using Kernel = halfbyte::KERNEL<halfbyte::W4A16_TYPE, W4A16_PAIR, W4A16_ZEROS>;                              \
        Kernel({x, weights, scales, zeros, row_scale, bias, y, partials, flags, m, n, k, group_shift}).run();        \
    }
ENTRY(w4a16_rows8, Rows8, 2)
ENTRY(w4a16_rows16, Rows16, 2)
ENTRY(w4a16_rows32, Rows32, 1)
ENTRY(w4a16_rows64, Rows64, 1)
#endif
