// Rejection sampling of drafted tokens (Leviathan et al. 2023, algorithm 1), whole batches in one launch: which drafts
// stand, and the token behind them. The contract is that of src/halfbyte/sampling/rejection.py, and so are the tokens.
//
//     sequence b, drafts x0 x1 x2 x3                     [K + 1][V] of p, [K][V] of q
//
//     p  . . . .#. . . . . . . .  x0 stands: u0 q(x0) < p(x0)      two numbers of two rows
//     q  . . . .#. . . . . . . .
//     p  . .#. . . . . . . . . .  x1 stands
//     q  . .#. . . . . . . . . .
//     p  ########################  x2 is rejected: both rows whole, masses of max(p - q, 0)
//     q  ########################
//     p  . . . . . . . . . . . .  never read, as is all behind it
//
//     the rejected row:   ┌────────┬────────┬────────┬── segments of 512 tokens, a warp each
//                         │ block 0         │ block 1         │ ...     blocks that share the sequence
//                         └────────┴────────┴────────┴──
//     masses        Σ of each segment, as integers: any order gives the same
//     last block    point = u · Σ of all -> segment -> token, the first whose running sum exceeds the point
//
// With logits or filters a row has to be known as a whole before one token of it is, and each row that is reached is read
// several times, from L2 where the batch's rows fit:
//
//     PEAK    the largest number, its lowest id; whether every number is possible
//     TOP_K   the rank of the k-th token, by digits of 11, 11 and 10 bits: 2048 bins, the one the k-th is in, and on.
//             Where equal numbers straddle it, two more digits, of ids: the lower stay
//     TOP_P   the same with masses, up to the first that has p above it
//     SUM     the mass that is left; then whether the draft stands
//     DRAW    as above
//
// rejection_row.cuh says what a token weighs, rejection_stages.cuh how blocks go from stage to stage.
//
// Bytes. Probabilities as they are: 8 V a sequence at a rejection, 4 V where all stand, 32 bytes sectors of two numbers a
// draft. Times 1 / bandwidth that is the floor, in microseconds at the data sheets' 4800 GB/s (H200) and 2039 (A100), all
// rejected:
//
//     B = 1,  V = 32,000     0.26 MB     0.05     0.13     what counts here are latencies: some 5 of memory, one after
//     B = 64, V = 128,000    65.5 MB     13.7     32.1     the other, about 0.7 each, and the launch
//     B = 256, V = 128,000   262 MB      54.6     128.6
//
// With logits 4 V (fp32) or 2 V (fp16, bf16) a row that is reached, and again in every pass that L2 does not serve.
//
// Operations for a token of p and q: 4 to subtract, compare and check, 6 to round to an integer, 2 to add; 217 a warp for
// 512 tokens in what nvcc makes, 277 with what a segment costs. At 4 a clock that is 59 bytes a clock and SM; memory
// delivers about 13 to an SM of an A100 and 21 on an H200.
#include "rejection_sampler.cuh"

// One variant a compilation: REJECTION_TYPE is Fp32, Fp16 or Bf16; REJECTION_FILTERED, that there are logits or settings.
#ifdef REJECTION_TYPE
extern "C" __global__ void __launch_bounds__(halfbyte::THREADS, 3)
    rejection_sample(const long long* draft_ids, const float* draft, const char* target, const long long* lengths,
                     const float* uniforms, const double* settings, long long* ids, long long* counts,
                     halfbyte::Record* records, halfbyte::u64* bins, halfbyte::u64* masses, int drafts, int vocabulary,
                     int blocks, int settings_stride, int logits) {
    const halfbyte::Batch batch = {draft_ids, draft,   target, lengths, uniforms, settings,   ids,             counts,
                                   records,   bins,    masses, drafts,  vocabulary, blocks,   settings_stride, logits};
    halfbyte::Sampler<halfbyte::REJECTION_TYPE, REJECTION_FILTERED>(batch).run();
}
#endif
