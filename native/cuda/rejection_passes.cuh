// The sequence that a block works on, and its passes over a row: what each stage adds up.
#pragma once

#include "rejection_stages.cuh"

namespace halfbyte {

// Row-major. draft null: every draft was certain. lengths null: all K. settings null: a softmax of logits, or
// probabilities as they are.
struct Batch {
    const long long* draft_ids;  // [B][K]
    const float* draft;          // [B][K][V]
    const char* target;          // [B][K + 1][V]
    const long long* lengths;    // [B]
    const float* uniforms;       // [B][K + 1]
    const double* settings;      // [B or 1][4]: temperature, top-k, top-p, min-p
    long long* ids;              // [B][K + 1]
    long long* counts;           // [B]
    Record* records;             // [B]
    u64* bins;                   // [B][BINS], zeros between launches; not used without settings and logits
    u64* masses;                 // [B][segments]
    int drafts, vocabulary;
    int blocks;  // of a sequence
    int settings_stride, logits;
};

// FILTERED: with logits or settings. Otherwise rows are probabilities as they are, and DRAW is all there is.
template <class Type, bool FILTERED>
struct Sequence {
    const Batch& in;
    const int index, segments;
    Record* const record;
    u64* const masses;

    DEVICE explicit Sequence(const Batch& batch)
        : in(batch),
          index(block_index() / batch.blocks),
          segments((batch.vocabulary + SEGMENT - 1) / SEGMENT),
          record(batch.records + index),
          masses(batch.masses + static_cast<long long>(index) * segments) {}

    DEVICE const long long* draft_ids() const { return in.draft_ids + static_cast<long long>(index) * in.drafts; }
    DEVICE const float* uniforms() const { return in.uniforms + static_cast<long long>(index) * (in.drafts + 1); }
    DEVICE const char* target_row(int position) const {
        const long long row = static_cast<long long>(index) * (in.drafts + 1) + position;
        return in.target + row * in.vocabulary * Type::BYTES;
    }
    DEVICE const float* draft_row(int position) const {
        const long long row = static_cast<long long>(index) * in.drafts + position;
        return in.draft ? in.draft + row * in.vocabulary : nullptr;
    }
    DEVICE float draft_probability(int position, int id) const {
        const float* row = draft_row(position);
        return row ? load_constant<float>(row + id) : 1.0f;
    }
    DEVICE Distribution distribution() const {
        if constexpr (!FILTERED) return {true, false, false, false, 0.0f, 1.0f, 0, 0, 0.0f, 1.0f};
        const State& state = notes().state;
        const Settings& settings = notes().settings;
        return {settings.as_it_is != 0, in.logits != 0,    settings.scored != 0, settings.greedy != 0,
                state.highest,          settings.divisor,  state.least_score,    state.least_weight,
                state.least,            state.factor};
    }

    // Finite, so that -inf stays -inf.
    DEVICE static float divisor_of(double temperature) {
        if (temperature > MOST_TEMPERATURE) return static_cast<float>(MOST_TEMPERATURE);
        return static_cast<float>(temperature > LEAST_TEMPERATURE ? temperature : LEAST_TEMPERATURE);
    }
    DEVICE Settings read_settings() const {
        double given[4] = {1.0, static_cast<double>(in.vocabulary), 1.0, 0.0};
        const double infinite = infinity();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const double* const setting = in.settings + index * in.settings_stride + i;
            if (FILTERED && in.settings) given[i] = load_constant<double>(setting);
        }
        const double temperature = given[0], top_k = given[1], top_p = given[2], min_p = given[3];
        const long long length = in.lengths ? load_constant<long long>(in.lengths + index) : in.drafts;
        Settings settings;
        settings.valid = length >= 0 && length <= in.drafts && temperature >= 0 && temperature < infinite &&
                         top_k >= 1 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
        settings.length = static_cast<u32>(length);
        settings.top_k = top_k < in.vocabulary ? static_cast<u32>(top_k) : static_cast<u32>(in.vocabulary);
        settings.top_p = top_p;
        settings.min_p = static_cast<float>(min_p);
        settings.greedy = temperature == 0;
        settings.divisor = settings.greedy ? 1.0f : divisor_of(temperature);
        settings.scored = in.logits || !(temperature == 1 || settings.greedy);
        settings.as_it_is = !in.logits && temperature == 1 && !(top_k < in.vocabulary) && top_p >= 1 && min_p <= 0;
        return settings;
    }

    DEVICE void work(u32 stage, int first, int end) const {
        if (!FILTERED || stage == DRAW) return sum_segments(first, end, true);
        if (stage == PEAK) return find_peak(first, end);
        if (stage == SUM) return sum_kept(first, end);
        count_digits(stage, first, end);
    }

    DEVICE void find_peak(int first, int end) const {
        const Distribution distribution = this->distribution();
        u64 best = 0;
        each_token<16>(first, end, distribution, [&](int id, float value) {
            const u64 rank = distribution.is_valid(value) ? rank_of(value, id) : NO_RANK;
            best = rank > best ? rank : best;
        });
        best = block_max(best);
        if (thread_index() == 0 && best) max_global(&record->best, best);
    }

    DEVICE void count_digits(u32 stage, int first, int end) const {
        for (int bin = thread_index(); bin < BINS; bin += THREADS) bins().low[bin] = bins().high[bin] = 0;
        barrier();
        const Distribution distribution = this->distribution();
        const State& state = notes().state;
        const int shift = digit_shift(state.digit), bits = digit_bits(state.digit);
        const u64 prefix = state.prefix;
        const u32 mask = (1u << bits) - 1;
        each_token<8>(first, end, distribution, [&](int id, float value) {
            const float score = distribution.score(value);
            u64 rank = rank_of(score, id), amount = 1;
            if (stage == TOP_P) {
                const float weight = distribution.weight_of_score(score);
                amount = rank < distribution.least_score ? 0 : joined(mass_of(weight));
                rank = rank_of(weight, id);
            }
            if (rank >> (shift + bits) == prefix && amount) add_to_bin(static_cast<u32>(rank >> shift) & mask, amount);
        });
        barrier();
        u64* const all = in.bins + static_cast<long long>(index) * BINS;
        for (int bin = thread_index(); bin < BINS; bin += THREADS) {
            const u64 high = load_shared<u32>(&bins().high[bin]), low = load_shared<u32>(&bins().low[bin]);
            if (high | low) add_global(all + bin, high << 32 | low);
        }
    }

    DEVICE void sum_kept(int first, int end) const {
        const Distribution distribution = this->distribution();
        u64 sum = 0;
        each_token<8>(first, end, distribution, [&](int id, float value) {
            sum += joined(mass_of(distribution.weight(value, id)));
        });
        sum = block_sum(sum);
        if (thread_index() == 0 && sum) add_global(&record->sum, sum);
    }
    // Of the row at hand, all a block's warps together.
    template <int TOGETHER, class Use>
    DEVICE void each_token(int first, int end, const Distribution& distribution, Use&& use) const {
        const char* target = target_row(notes().state.position);
        for (int segment = first + warp_index(); segment < end; segment += WARPS) {
            read_segment<Type, false, TOGETHER>(target, nullptr, segment, in.vocabulary, distribution.nothing(),
                                                [&](int id, float value, float) { use(id, value); });
        }
    }

    // Masses of max(p - q, 0), or of p without a certain draft, or of p; of p too where nothing is left of the residual.
    DEVICE void sum_segments(int first, int end, bool residual) const {
        const State& state = notes().state;
        const float* draft = residual && state.rejected ? draft_row(state.position) : nullptr;
        if (draft) return sum_segments_of<true>(first, end, draft, -1);
        sum_segments_of<false>(first, end, nullptr, excluded(residual));
    }
    // The certain draft that was rejected; -1: none.
    DEVICE int excluded(bool residual) const {
        const State& state = notes().state;
        if (!residual || !state.rejected || in.draft) return -1;
        return static_cast<int>(load_constant<long long>(draft_ids() + state.position));
    }
    template <bool DRAFT>
    DEVICE void sum_segments_of(int first, int end, const float* draft, int excluded) const {
        const Distribution distribution = this->distribution();
        const char* target = target_row(notes().state.position);
        bool good = true;
        for (int segment = first + warp_index(); segment < end; segment += WARPS) {
            Mass own = {0, 0};
            const auto add = [&](int id, float value, float q) {
                const float p = distribution.probability(value, id), rest = DRAFT ? subtract(p, q) : p;
                good &= is_probability(p) && (!DRAFT || is_probability(q));
                const Mass mass = mass_of(rest > 0.0f ? rest : 0.0f);
                own.high += mass.high, own.low += mass.low;
            };
            constexpr int TOGETHER = FILTERED ? 8 : 16;
            read_segment<Type, DRAFT, TOGETHER>(target, draft, segment, in.vocabulary, distribution.nothing(), add);
            u64 mass = joined({warp_sum(own.high), warp_sum(own.low)});
            if (!DRAFT && excluded >= 0 && excluded / SEGMENT == segment) {
                mass -= joined(mass_of(distribution.probability(Type::load(target, excluded), excluded)));
            }
            if (lane_index() == 0) store_published(masses + segment, mass);
        }
        if (warp_ballot(!good) && lane_index() == 0) store_published(&record->damaged, 1u);
    }
};

}  // namespace halfbyte
