// The sampler of one sequence, by the blocks that share it: who does what when, and what a stage leads to.
#pragma once

#include "rejection_passes.cuh"

namespace halfbyte {

// FILTERED: with logits or settings. Otherwise there is one stage, and neither tickets nor waits.
template <class Type, bool FILTERED>
class Sampler {
   public:
    static constexpr int SHARED_BYTES = NOTES_BYTES + (FILTERED ? static_cast<int>(sizeof(Bins)) : 0);

    DEVICE explicit Sampler(const Batch& batch) : own(batch), in(batch), record(own.record) {}

    DEVICE void run() {
        if (!begin()) {
            if (block_index() % in.blocks == 0) write(0, -1);
            return;
        }
        for (;;) {
            const u32 ticket = FILTERED ? draw_ticket() : block_index() % in.blocks;
            const int number = ticket / in.blocks, piece = ticket % in.blocks;
            if (FILTERED && number > 0) copy_state_in();
            const u32 stage = notes().state.stage;
            const int first = piece * own.segments / in.blocks, end = (piece + 1) * own.segments / in.blocks;
            if (!notes().state.faulty) own.work(stage, first, end);
            const bool last = sign_off(number);
            if (stage == DRAW) {
                if (last) finish();
                return;
            }
            if (last) {
                end_stage(stage);
                open_stage(number + 1);
            }
        }
    }

   private:
    const Sequence<Type, FILTERED> own;
    const Batch& in;
    Record* const record;

    // Every block does this for itself, to the same end. False where the sequence cannot be sampled.
    DEVICE bool begin() {
        if (thread_index() == 0) {
            notes().settings = own.read_settings();
            notes().state = {};
        }
        barrier();
        const Settings& settings = notes().settings;
        if (warp_index() == 0) {
            const bool good = settings.valid && inputs_are_valid(settings.length);
            if (good && settings.as_it_is) decide_as_it_is(settings.length);
            if (lane_index() == 0) {
                notes().last = good;
                if (!settings.as_it_is) notes().state.stage = PEAK;
            }
        }
        barrier();
        return notes().last;
    }

    // A warp looks at what is looked at before any row.
    DEVICE bool inputs_are_valid(int length) const {
        bool good = true;
        for (int position = lane_index(); position <= in.drafts; position += LANES) {
            const float uniform = load_constant<float>(own.uniforms() + position);
            good &= uniform >= 0.0f && uniform < 1.0f;
            if (position < length) {
                const long long id = load_constant<long long>(own.draft_ids() + position);
                good &= id >= 0 && id < in.vocabulary;
            }
        }
        return warp_ballot(!good) == 0;
    }

    // The position of the last token where the target is used as it is: two numbers a draft, a lane each.
    DEVICE void decide_as_it_is(int length) const {
        int position = length;
        bool damaged = false;
        for (int first = 0; first < length && position == length; first += LANES) {
            const int mine = first + lane_index();
            bool wrong = false, stands = true;
            if (mine < length) {
                const int id = static_cast<int>(load_constant<long long>(own.draft_ids() + mine));
                const float p = Type::load(own.target_row(mine), id), q = own.draft_probability(mine, id);
                wrong = !is_probability(p) || !is_probability(q);
                stands = multiply(load_constant<float>(own.uniforms() + mine), q) < p;
            }
            const u32 stops = warp_ballot(wrong || !stands), wrongs = warp_ballot(wrong);
            if (stops) {
                position = first + lowest_set(stops);
                damaged = wrongs >> lowest_set(stops) & 1;
            }
        }
        if (lane_index() == 0) {
            State& state = notes().state;
            state.stage = DRAW, state.position = position, state.rejected = position < length, state.faulty = damaged;
        }
    }

    DEVICE u32 draw_ticket() const {
        if (thread_index() == 0) {
            const u32 ticket = add_acquire_release(&record->tickets, 1);
            while (load_acquire(&record->open) < ticket / in.blocks) {
            }
            notes().ticket = ticket;
        }
        barrier();
        return notes().ticket;
    }
    DEVICE void copy_state_in() const {
        if (thread_index() < STATE_WORDS) {
            const u32 word = load_published(record->state + thread_index());
            store_shared(reinterpret_cast<u32*>(&notes().state) + thread_index(), word);
        }
        barrier();
    }
    DEVICE void open_stage(int number) const {
        barrier();
        if (thread_index() < STATE_WORDS) {
            store_published(record->state + thread_index(), reinterpret_cast<u32*>(&notes().state)[thread_index()]);
        }
        barrier();
        if (thread_index() == 0) store_release(&record->open, static_cast<u32>(number));
    }
    // Whether this block is the last of the stage.
    DEVICE bool sign_off(int number) const {
        barrier();
        if (thread_index() == 0) {
            const u32 all = static_cast<u32>(number + 1) * in.blocks;
            notes().last = add_acquire_release(&record->arrivals, 1) + 1 == all;
        }
        barrier();
        return notes().last;
    }

    // The last block of a stage, all its threads.
    DEVICE void end_stage(u32 stage) const {
        if (stage == TOP_K || stage == TOP_P) {
            choose_digit(stage);
        } else if (thread_index() == 0) {
            stage == PEAK ? end_peak() : end_sum();
        }
    }

    DEVICE void end_peak() const {
        State& state = notes().state;
        const Settings& settings = notes().settings;
        const u64 best = load_published(&record->best);
        store_published(&record->best, u64{0});
        const float value = restored(static_cast<u32>(best >> ID_BITS));
        const int id = static_cast<int>(LAST_ID - static_cast<u32>(best & LAST_ID));
        const bool empty = in.logits ? value == -infinity() : joined(mass_of(value)) == 0;
        if (best == NO_RANK || empty) return refuse();
        state.highest = in.logits || !settings.scored ? value : logarithm(value);
        state.least = multiply(settings.min_p, settings.scored ? 1.0f : value);
        state.factor = 1.0f;
        state.least_score = state.least_weight = 0;
        if (settings.greedy) {
            state.least_score = rank_of(own.distribution().score(value), id);
            return decide();
        }
        if (settings.top_k < static_cast<u32>(in.vocabulary)) return begin_search(TOP_K);
        after_top_k();
    }
    DEVICE void begin_search(Stage stage) const {
        State& state = notes().state;
        state.stage = stage, state.digit = 0, state.prefix = state.before = 0;
    }
    DEVICE void after_top_k() const {
        if (notes().settings.top_p < 1.0) {
            begin_search(TOP_P);
        } else {
            notes().state.stage = SUM;
        }
    }

    // The bin, from the top, in which the k-th token is, or the last one whose predecessors do not reach p.
    DEVICE void choose_digit(u32 stage) const {
        constexpr int EACH = BINS / THREADS;
        State& state = notes().state;
        u64* const mine = in.bins + static_cast<long long>(own.index) * BINS + (BINS - EACH * (thread_index() + 1));
        u64 amounts[EACH], sum = 0, total;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            amounts[i] = load_published(mine + EACH - 1 - i);
            store_published(mine + EACH - 1 - i, u64{0});
            sum += amounts[i];
        }
        u64 before = block_prefix(sum, total) + state.before;
        const double limit = state.digit == 0 ? notes().settings.top_p * static_cast<double>(total) : state.limit;
        const u64 wanted = notes().settings.top_k;
        barrier();  // the state is about to change
        if (thread_index() == 0) {
            state.limit = limit;
            if (total == 0) refuse();
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const u64 behind = before + amounts[i];
            const bool is_kth = before < wanted && behind >= wanted;
            const bool reaches = static_cast<double>(before) < limit && !(static_cast<double>(behind) < limit);
            const int bin = BINS - 1 - (EACH * thread_index() + i);
            if (stage == TOP_K ? is_kth : reaches) end_digit(stage, bin, before, amounts[i], limit);
            before = behind;
        }
    }
    DEVICE void end_digit(u32 stage, int bin, u64 before, u64 amount, double limit) const {
        State& state = notes().state;
        const int digit = state.digit, shift = digit_shift(digit);
        const u64 prefix = state.prefix << digit_bits(digit) | static_cast<u64>(bin);
        bool all = digit == DIGITS - 1;  // whether all of the bin is kept
        if (stage == TOP_K) {
            all |= before + amount == notes().settings.top_k;
        } else if (digit == NUMBER_DIGITS - 1) {
            const u64 each = joined(mass_of(restored(static_cast<u32>(prefix))));
            all |= static_cast<double>(before + amount - each) < limit;
        }
        state.prefix = prefix, state.before = before;
        if (!all) {
            state.digit = digit + 1;
        } else if (stage == TOP_K) {
            state.least_score = prefix << shift;
            after_top_k();
        } else {
            state.least_weight = prefix << shift;
            state.stage = SUM;
        }
    }

    DEVICE void end_sum() const {
        const u64 total = load_published(&record->sum);
        store_published(&record->sum, u64{0});
        if (total == 0) return refuse();
        notes().state.factor = static_cast<float>(1099511627776.0 / static_cast<double>(total));
        decide();
    }

    // Whether the draft at this position stands; then the next row is looked at, else the last token is drawn.
    DEVICE void decide() const {
        State& state = notes().state;
        const int position = state.position;
        state.stage = DRAW;
        if (position == static_cast<int>(notes().settings.length)) return;
        const int id = static_cast<int>(load_constant<long long>(own.draft_ids() + position));
        const float p = own.distribution().probability(Type::load(own.target_row(position), id), id);
        const float q = own.draft_probability(position, id);
        if (!is_probability(p) || !is_probability(q)) return refuse();
        if (multiply(load_constant<float>(own.uniforms() + position), q) < p) {
            state.stage = PEAK, state.position = position + 1;
        } else {
            state.rejected = 1;
        }
    }
    DEVICE void refuse() const { notes().state.stage = DRAW, notes().state.faulty = 1; }

    // The last block of all, all its threads.
    DEVICE void finish() const {
        const State& state = notes().state;
        bool good = !state.faulty && load_published(&record->damaged) == 0;
        int id = -1;
        if (good) {
            id = draw(true);
            if (id < 0 && state.rejected) {  // nothing is left of the residual: rounding
                barrier();
                own.sum_segments(0, own.segments, false);
                barrier();
                id = draw(false);
            }
        }
        const bool found = id >= 0;
        write(found ? state.position + 1 : 0, id);
        barrier();
        u32* const words = reinterpret_cast<u32*>(record);
        if (thread_index() < static_cast<int>(sizeof(Record) / sizeof(u32))) store_published(words + thread_index(), 0u);
    }

    // The first id at which the running sum of masses exceeds u · total; -1 where there is no mass.
    DEVICE int draw(bool residual) const {
        const int each = (own.segments + THREADS - 1) / THREADS, first = each * thread_index();
        const int end = first + each < own.segments ? first + each : own.segments;
        u64 sum = 0, total;
        for (int segment = first; segment < end; ++segment) sum += load_published(own.masses + segment);
        u64 before = block_prefix(sum, total);
        if (total == 0) return -1;
        const double uniform = load_constant<float>(own.uniforms() + in.drafts);
        const u64 point = static_cast<u64>(static_cast<long long>(uniform * static_cast<double>(total)));
        if (before <= point && point < before + sum) {
            int segment = first;
            for (u64 mass; before + (mass = load_published(own.masses + segment)) <= point; ++segment) before += mass;
            notes().segment = segment, notes().rest = point - before;
        }
        barrier();
        find_in_segment(residual);
        barrier();
        return static_cast<int>(notes().id);
    }
    DEVICE void find_in_segment(bool residual) const {
        constexpr int EACH = SEGMENT / THREADS;
        const State& state = notes().state;
        const Distribution distribution = own.distribution();
        const char* target = own.target_row(state.position);
        const float* draft = residual && state.rejected ? own.draft_row(state.position) : nullptr;
        const int first = static_cast<int>(notes().segment) * SEGMENT + EACH * thread_index();
        const int without = own.excluded(residual);
        const u64 point = notes().rest;
        u64 mine[EACH], sum = 0, total;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int id = first + i;
            mine[i] = 0;
            if (id < in.vocabulary && id != without) {
                const float p = distribution.probability(Type::load(target, id), id);
                const float rest = draft ? subtract(p, load_constant<float>(draft + id)) : p;
                mine[i] = joined(mass_of(rest > 0.0f ? rest : 0.0f));
            }
            sum += mine[i];
        }
        u64 before = block_prefix(sum, total);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (before <= point && point < before + mine[i]) notes().id = static_cast<u32>(first + i);
            before += mine[i];
        }
    }

    DEVICE void write(int count, int id) const {
        long long* const ids = in.ids + static_cast<long long>(own.index) * (in.drafts + 1);
        for (int i = thread_index(); i <= in.drafts; i += THREADS) {
            long long token = -1;
            if (i + 1 < count) token = load_constant<long long>(own.draft_ids() + i);
            if (i + 1 == count) token = id;
            store_global<long long>(ids + i, token);
        }
        if (thread_index() == 0) store_global<long long>(in.counts + own.index, static_cast<long long>(count));
    }
};

}  // namespace halfbyte
