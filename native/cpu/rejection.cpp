#include "rejection.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.hpp"
#include "rejection_row.hpp"
#include "w4.hpp"

namespace halfbyte {

namespace {

// What a thread keeps from call to call.
struct Workspace {
    TargetRow target;
    std::vector<std::int64_t> masses;
};

// The distribution the last token is drawn from: max(p - q, 0), or p without the drafted token, or p.
struct Source {
    const TargetRow& target;
    const float* draft;     // null: none, or certain
    std::int64_t excluded;  // the certain draft; -1: none

    float weight(std::int64_t id, float p) const {
        if (id == excluded) return 0.0f;
        const float rest = draft ? p - draft[id] : p;
        return rest > 0.0f ? rest : 0.0f;
    }
};

RejectionFault fault_of(const RejectionInput& in, const TargetRow& target, const float* draft) {
    const bool good = target.checked() || std::all_of(target.dense(), target.dense() + in.vocabulary, is_probability);
    if (!good) return RejectionFault::target;
    const bool draft_good = !draft || std::all_of(draft, draft + in.vocabulary, is_probability);
    return draft_good ? RejectionFault::none : RejectionFault::draft;
}

// The id at which the running sum of masses exceeds u · total, or -1 if there is no mass.
std::int64_t draw_from_list(const Source& source, float u) {
    const auto& ids = source.target.ids();
    const auto& weights = source.target.weights();
    std::int64_t total = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) total += fixed_point(source.weight(ids[i], weights[i]));
    if (total == 0) return -1;
    auto point = static_cast<std::int64_t>(static_cast<double>(u) * static_cast<double>(total));
    for (std::size_t i = 0;; ++i)
        if ((point -= fixed_point(source.weight(ids[i], weights[i]))) < 0) return ids[i];
}

std::int64_t draw_from_blocks(const Source& source, std::size_t count, float u, std::vector<std::int64_t>& masses) {
    constexpr std::size_t BLOCK = RejectionMath::BLOCK;
    const float* p = source.target.dense();
    if (source.excluded >= 0) masses[source.excluded / BLOCK] -= fixed_point(p[source.excluded]);
    std::int64_t total = 0;
    for (std::int64_t mass : masses) total += mass;
    if (total == 0) return -1;
    auto point = static_cast<std::int64_t>(static_cast<double>(u) * static_cast<double>(total));
    std::size_t block = 0;
    while (point >= masses[block]) point -= masses[block++];
    for (std::size_t id = block * BLOCK; id < count; ++id)
        if ((point -= fixed_point(source.weight(static_cast<std::int64_t>(id), p[id]))) < 0) return static_cast<std::int64_t>(id);
    return -1;  // not reached: the blocks' masses are those of their tokens
}

RejectionFault draw(const Tier& tier, const RejectionInput& in, Workspace& work, const Source& source, float u, std::int64_t& id) {
    const TargetRow& target = work.target;
    const float* p = target.dense();
    const bool good = p ? block_masses(tier, p, source.draft, in.vocabulary, work.masses)
                        : !source.draft || block_masses(tier, source.draft, nullptr, in.vocabulary, work.masses);
    if (!good)
        if (const RejectionFault fault = fault_of(in, target, source.draft); fault != RejectionFault::none) return fault;
    id = p ? draw_from_blocks(source, in.vocabulary, u, work.masses) : draw_from_list(source, u);
    if (id >= 0) return RejectionFault::none;
    if (!source.draft && source.excluded < 0) return RejectionFault::no_mass;
    return draw(tier, in, work, {target, nullptr, -1}, u, id);  // nothing is left of the residual: rounding
}

RejectionFault check(const RejectionInput& in, int b, std::int64_t length, std::int64_t& position) {
    const std::size_t drafts = in.drafts;
    position = 0;
    if (length < 0 || length > in.drafts) return RejectionFault::length;
    for (; position < length; ++position)
        if (const std::int64_t id = in.draft_ids[b * drafts + position]; id < 0 || id >= static_cast<std::int64_t>(in.vocabulary))
            return RejectionFault::draft_id;
    for (position = 0; position <= in.drafts; ++position)
        if (const float u = in.uniforms[b * (drafts + 1) + position]; !(u >= 0.0f && u < 1.0f)) return RejectionFault::uniform;
    return RejectionFault::none;
}

RejectionFault sample_row(const Tier& tier, const RejectionInput& in, int b, Workspace& work, std::int64_t& position) {
    const std::size_t drafts = in.drafts, vocabulary = in.vocabulary, first = b * (drafts + 1);
    const std::int64_t length = in.lengths ? in.lengths[b] : in.drafts;
    std::int64_t* ids = in.ids + first;
    std::fill_n(ids, drafts + 1, -1);
    if (const RejectionFault fault = check(in, b, length, position); fault != RejectionFault::none) return fault;
    const double* settings = in.settings ? in.settings + b * in.settings_stride : nullptr;
    const float* draft = nullptr;
    std::int64_t rejected = -1;
    for (position = 0;; ++position) {
        const float* row = in.target + (first + position) * vocabulary;
        const RejectionFault fault = work.target.prepare(tier, row, vocabulary, in.logits, settings);
        if (fault != RejectionFault::none) return fault;
        if (position == length) break;
        const std::int64_t id = in.draft_ids[b * drafts + position];
        const float* q = in.draft ? in.draft + (b * drafts + position) * vocabulary : nullptr;
        const float p_of_id = work.target.at(id), q_of_id = q ? q[id] : 1.0f;
        if (!is_probability(p_of_id)) return RejectionFault::target;
        if (!is_probability(q_of_id)) return RejectionFault::draft;
        if (!(in.uniforms[first + position] * q_of_id < p_of_id)) {
            draft = q;
            rejected = q ? -1 : id;
            break;
        }
        ids[position] = id;
    }
    work.target.settle();
    const Source source{work.target, draft, rejected};
    in.counts[b] = position + 1;
    return draw(tier, in, work, source, in.uniforms[first + drafts], ids[position]);
}

}  // namespace

int reject(const Tier& tier, const RejectionInput& in) {
    std::atomic<int> faults{0};
    const auto rows = [&](int begin, int end) {
        static thread_local Workspace work;
        for (int b = begin; b < end; ++b) {
            std::int64_t position = 0;
            const RejectionFault fault = sample_row(tier, in, b, work, position);
            if (fault == RejectionFault::none) continue;
            in.counts[b] = -static_cast<std::int64_t>(fault);
            in.ids[static_cast<std::size_t>(b) * (in.drafts + 1)] = position;
            faults.fetch_add(1, std::memory_order_relaxed);
        }
    };
    // A few long rows are worth more threads inside each of them than one thread each.
    if (in.batch < ThreadPool::instance().threads())
        rows(0, in.batch);
    else
        parallel(in.batch, in.batch * in.vocabulary, rows);
    return faults.load();
}

RejectionFault draw_row(const Tier& tier, const float* logits, std::size_t vocabulary, const double* settings, float uniform,
                        float* probabilities, std::int64_t& id) {
    static thread_local Workspace work;
    TargetRow& row = work.target;
    if (const RejectionFault fault = row.prepare(tier, logits, vocabulary, true, settings); fault != RejectionFault::none)
        return fault;
    row.settle();
    if (row.dense()) {
        std::copy_n(row.dense(), vocabulary, probabilities);
    } else {
        std::fill_n(probabilities, vocabulary, 0.0f);
        for (std::size_t i = 0; i < row.ids().size(); ++i) probabilities[row.ids()[i]] = row.weights()[i];
    }
    RejectionInput input{};
    input.vocabulary = vocabulary;
    return draw(tier, input, work, {row, nullptr, -1}, uniform, id);
}

}  // namespace halfbyte
