// Rejection sampling of drafted tokens (Leviathan et al. 2023, algorithm 1), whole batches in one launch: which drafts
// stand, and the token behind them. The contract is that of src/halfbyte/sampling/rejection.py, and so are the tokens.
//
//     sequence b, drafts x0 x1 x2 x3                     [K + 1][V] of p, [K][V] of q
//
//     p  ········#···············  x0 stands: u0 q(x0) < p(x0), two numbers of two rows
//     q  ········#···············
//     p  ···#····················  x1 stands
//     q  ···#····················
//     p  ########################  x2 is rejected: both rows whole, masses of max(p - q, 0)
//     q  ########################
//     p  ························  never read whole, as is all behind it
//
//     the rejected row  ┌───┬───┬───┬───┬───┬───┬──    segments of 512 tokens, a warp each
//                       │ block 0       │ block 1 ...    blocks that share the sequence
//                       └───┴───┴───┴───┴───┴───┴──
//     masses            Σ of each segment, as integers: any order gives the same
//     last block        point = u · Σ of all → segment → token, the first whose running sum exceeds the point
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
// rejection_row.cuh says what a token weighs, rejection_stages.cuh how blocks go from stage to stage, rejection_passes.cuh
// what a stage adds up, rejection_sampler.cuh what it leads to.
//
// Bytes. Probabilities as they are: 8 V a sequence at a rejection, 4 V where all drafts stand, and two numbers a draft.
// The floor is that over the bandwidth; in microseconds at the data sheets' 2039 GB/s (A100) and 4800 (H200), all
// rejected:
//
//     B = 1,   V = 32,000     0.26 MB    0.13   0.05    what counts there are nine trips to memory, one after the other
//     B = 64,  V = 128,000    65.5 MB    32     14
//     B = 256, V = 128,000    262 MB     129    55
//
// With logits 4 V (fp32) or 2 V (fp16, bf16) a row that is reached, and again in every pass that L2 does not serve.
//
// Operations. 265 instructions of a warp for 512 tokens of p and q, 4 KiB, in what nvcc makes for sm_90a. At 4 a clock
// that is 62 bytes a clock and SM; memory delivers about 13 to an SM of an A100 and 21 on an H200.
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
