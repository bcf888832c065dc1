// Rejection sampling of drafted tokens (Leviathan et al. 2023, algorithm 1), whole batches at a time.
//
// Masses are integers, round(weight · 2^40), so totals and the inverse distribution are the same in any order of summation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbyte {

// What a tier provides.
struct RejectionMath {
    static constexpr int BLOCK = 256;       // weights whose masses are summed into one number
    static constexpr int GROUPS = 1024;     // of `group_maxima`
    static constexpr float MOST = 1.0009765625f;  // a probability, rounding forgiven

    // Mass of each block of max(p - q, 0), or of p where q is null, for blocks [begin, end) of a row of `count`.
    // False where a value outside [0, MOST], a NaN among them, or a negative zero was met: look again.
    bool (*masses)(const float* p, const float* q, std::size_t count, std::size_t begin, std::size_t end,
                   std::int64_t* masses);
    // Maxima of the numbers i, i + GROUPS, i + 2·GROUPS, ... False where there is a NaN or +inf.
    bool (*group_maxima)(const float* z, std::size_t count, float* maxima);
    // scores = (z - highest) / temperature
    void (*score)(const float* z, std::size_t count, float highest, float temperature, float* scores);
    // weights = exp(scores), in place.
    void (*weigh)(float* scores, std::size_t count);
    // Score, weigh and sum the masses of the blocks, a block at a time. Returns what `masses` would.
    bool (*weigh_blocks)(const float* z, std::size_t count, float highest, float temperature, float* weights,
                         std::int64_t* masses);
    // Those below `least` become 0.
    void (*keep_from)(float* weights, std::size_t count, float least);
    void (*scale)(float* weights, std::size_t count, float factor);
    // Indices of those that are at least `least`, ascending, at most `room`; returns how many there are.
    std::size_t (*gather)(const float* z, std::size_t count, float least, std::int32_t* indices, std::size_t room);
};

// Row-major. `settings`: temperature, top-k, top-p, min-p of each row, `settings_stride` doubles apart; null: target
// probabilities are used as they are. draft null: the drafts are certain. lengths null: all K.
struct RejectionInput {
    const std::int64_t* draft_ids;  // [B][K]
    const float* draft;             // [B][K][V]
    const float* target;            // [B][K + 1][V]
    const std::int64_t* lengths;    // [B]
    const float* uniforms;          // [B][K + 1]
    const double* settings;
    std::size_t settings_stride;
    bool logits;
    int batch, drafts;
    std::size_t vocabulary;
    std::int64_t* ids;     // [B][K + 1], -1 behind the last token
    std::int64_t* counts;  // [B]
};

// What is wrong with a row; src/halfbyte/sampling/rejection_native.py has the same numbers.
enum class RejectionFault : std::int64_t { none, length, draft_id, uniform, target, draft, no_mass };

struct Tier;

// Returns the number of faulty rows. Of those, counts holds minus the fault and the first id its position.
int reject(const Tier& tier, const RejectionInput& input);

// Draws from one row of logits [vocabulary] after temperature and filters, the way `reject` draws a last token, and writes the
// distribution, float [vocabulary], to `probabilities`: what a drafter has to hand on. settings: as above, for this row.
RejectionFault draw_row(const Tier& tier, const float* logits, std::size_t vocabulary, const double* settings, float uniform,
                        float* probabilities, std::int64_t& id);

}  // namespace halfbyte
