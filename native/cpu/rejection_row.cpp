#include "rejection_row.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "parallel.hpp"
#include "w4.hpp"

namespace halfbyte {

namespace {

// Buckets of a weight's exponent and first five bits: 1.001 is in bucket 4064.
constexpr int BUCKET_SHIFT = 18, BUCKETS = 4096;

int bucket_of(float weight) {
    std::uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return static_cast<int>(bits >> BUCKET_SHIFT);
}

std::int64_t sum(const std::vector<std::int64_t>& masses) {
    return std::accumulate(masses.begin(), masses.end(), std::int64_t{0});
}

}  // namespace

bool block_masses(const Tier& tier, const float* p, const float* q, std::size_t count, std::vector<std::int64_t>& masses) {
    const std::size_t blocks = (count + RejectionMath::BLOCK - 1) / RejectionMath::BLOCK;
    masses.resize(blocks);
    std::atomic<bool> good{true};
    parallel(static_cast<int>(blocks), count * (q ? 2 : 1), [&](int begin, int end) {
        if (!tier.rejection.masses(p, q, count, begin, end, masses.data())) good.store(false, std::memory_order_relaxed);
    });
    return good.load();
}

RejectionFault TargetRow::prepare(const Tier& tier, const float* row, std::size_t count, bool logits, const double* settings) {
    tier_ = &tier, count_ = count, dense_ = row, checked_ = false, factor_ = 1.0f;
    const double temperature = settings ? settings[0] : 1.0, top_p = settings ? settings[2] : 1.0;
    const std::size_t top_k = settings && settings[1] < static_cast<double>(count) ? static_cast<std::size_t>(settings[1]) : count;
    const float min_p = settings ? static_cast<float>(settings[3]) : 0.0f;
    if (!logits && temperature == 1.0 && top_k == count && top_p >= 1.0 && min_p <= 0.0f) return RejectionFault::none;

    checked_ = true;
    maxima_.resize(RejectionMath::GROUPS);
    if (!tier.rejection.group_maxima(row, count, maxima_.data())) return RejectionFault::target;
    highest_ = *std::max_element(maxima_.begin(), maxima_.end());
    if (!logits)
        if (const RejectionFault fault = check_probabilities(row); fault != RejectionFault::none) return fault;
    if (highest_ == -std::numeric_limits<float>::infinity()) return RejectionFault::no_mass;
    if (temperature == 0.0) {
        take_the_highest(row);
        return RejectionFault::none;
    }

    const float* values = row;
    const bool scored = logits || temperature != 1.0, listed = top_k < count;
    if (scored) {
        work_.resize(count);
        if (!logits) {
            for (std::size_t i = 0; i < count; ++i) work_[i] = std::log(row[i]);
            highest_ = std::log(highest_);
            for (float& value : maxima_) value = std::log(std::max(value, 0.0f));  // empty groups hold -inf
        }
        const auto divisor = std::max(static_cast<float>(temperature), 1e-30f);
        const float* source = logits ? row : work_.data();
        if (listed) {
            tier.rejection.score(source, count, highest_, divisor, work_.data());
        } else {
            masses_.resize((count + RejectionMath::BLOCK - 1) / RejectionMath::BLOCK);
            tier.rejection.weigh_blocks(source, count, highest_, divisor, work_.data(), masses_.data());
        }
        tier.rejection.score(maxima_.data(), maxima_.size(), highest_, divisor, maxima_.data());
        highest_ = 1.0f;  // the weight of the most likely token: exp(0)
        values = work_.data();
    }
    bool summed = !listed;  // `check_probabilities` or `weigh_blocks` left the masses of all tokens
    if (listed) {
        gather_top_k(values, top_k);
        if (scored) tier.rejection.weigh(weights_.data(), weights_.size());
        filter_list(top_p, min_p * highest_);
    } else {
        if (!scored) work_.assign(row, row + count);
        summed = !filter_dense(top_p, min_p * highest_);
    }
    return normalise(summed) ? RejectionFault::none : RejectionFault::no_mass;
}

float TargetRow::at(std::int64_t id) const {
    if (dense_) return dense_[id] * factor_;
    const auto found = std::lower_bound(ids_.begin(), ids_.end(), static_cast<std::int32_t>(id));
    return found != ids_.end() && *found == id ? weights_[found - ids_.begin()] * factor_ : 0.0f;
}

RejectionFault TargetRow::check_probabilities(const float* row) {
    if (!block_masses(*tier_, row, nullptr, count_, masses_) && !std::all_of(row, row + count_, is_probability))
        return RejectionFault::target;
    return sum(masses_) > 0 ? RejectionFault::none : RejectionFault::no_mass;
}

void TargetRow::take_the_highest(const float* row) {
    dense_ = nullptr;
    ids_.assign(1, static_cast<std::int32_t>(std::find(row, row + count_, highest_) - row));
    weights_.assign(1, 1.0f);
}

// At most the k-th largest value. Among the maxima of disjoint groups, the k-th largest is that: k values reach it.
float TargetRow::kth_largest(const float* values, std::size_t k) {
    const bool by_groups = 2 * k <= RejectionMath::GROUPS;
    copy_.assign(by_groups ? maxima_.data() : values, by_groups ? maxima_.data() + maxima_.size() : values + count_);
    std::nth_element(copy_.begin(), copy_.begin() + (k - 1), copy_.end(), std::greater<float>());
    return copy_[k - 1];
}

// Ids and values of the k largest; of those that tie at the edge, the lower ids.
void TargetRow::gather_top_k(const float* values, std::size_t k) {
    dense_ = nullptr;
    ids_.resize(std::max(ids_.size(), 4 * k));
    const float least = kth_largest(values, k);
    std::size_t found = tier_->rejection.gather(values, count_, least, ids_.data(), ids_.size());
    if (found > ids_.size()) {
        ids_.resize(found);
        found = tier_->rejection.gather(values, count_, least, ids_.data(), found);
    }
    copy_.resize(found);
    for (std::size_t i = 0; i < found; ++i) copy_[i] = values[ids_[i]];
    std::nth_element(copy_.begin(), copy_.begin() + (k - 1), copy_.end(), std::greater<float>());
    const float edge = copy_[k - 1];
    std::size_t ties = k - static_cast<std::size_t>(std::count_if(copy_.begin(), copy_.end(), [&](float v) { return v > edge; }));
    std::size_t kept = 0;
    weights_.resize(k);
    for (std::size_t i = 0; i < found; ++i) {
        const float value = values[ids_[i]];
        if (value < edge || (value == edge && ties == 0)) continue;
        if (value == edge) --ties;
        ids_[kept] = ids_[i], weights_[kept++] = value;
    }
    ids_.resize(kept);
}

void TargetRow::filter_list(double top_p, float least) {
    if (top_p < 1.0) {
        order_.resize(ids_.size());
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return weights_[a] > weights_[b]; });
        std::int64_t total = 0, before = 0;
        for (float weight : weights_) total += fixed_point(weight);
        for (int at : order_) {
            const std::int64_t mass = fixed_point(weights_[at]);
            if (!(static_cast<double>(before) < top_p * static_cast<double>(total))) weights_[at] = 0.0f;
            before += mass;
        }
    }
    tier_->rejection.keep_from(weights_.data(), weights_.size(), least);
}

// Whether it removed anything, maybe; `masses_` are those of all tokens when it is called.
bool TargetRow::filter_dense(double top_p, float least) {
    dense_ = work_.data();
    if (top_p < 1.0) {
        const auto total = static_cast<double>(sum(masses_));
        // Tokens below (1 - p) / n of the sum have less than 1 - p of it together, so those before them reach p.
        keep_nucleus(top_p * total, static_cast<float>(0.999 * (1.0 - top_p) * total / static_cast<double>(count_) * 0x1p-40));
    }
    if (least > 0.0f) tier_->rejection.keep_from(work_.data(), count_, least);
    return top_p < 1.0 || least > 0.0f;
}

// Keep the fewest largest weights whose masses reach `limit`. Weights go into buckets; only the one where the limit is reached
// is sorted.
void TargetRow::keep_nucleus(double limit, float cut) {
    histogram_.assign(BUCKETS, 0);
    for (std::size_t i = 0; i < count_; ++i)
        if (work_[i] >= cut) histogram_[bucket_of(work_[i])] += fixed_point(work_[i]);
    std::int64_t before = 0;
    int bucket = BUCKETS - 1;
    while (bucket > 0 && static_cast<double>(before + histogram_[bucket]) < limit) before += histogram_[bucket--];

    copy_.clear();
    for (std::size_t i = 0; i < count_; ++i)
        if (bucket_of(work_[i]) == bucket) copy_.push_back(work_[i]);
    std::sort(copy_.begin(), copy_.end(), std::greater<float>());
    std::size_t kept = 0;
    for (; kept < copy_.size() && static_cast<double>(before) < limit; ++kept) before += fixed_point(copy_[kept]);
    if (kept == 0) return;  // nothing has any mass
    const float edge = copy_[kept - 1];
    auto surplus = std::count(copy_.begin() + kept, copy_.end(), edge);
    tier_->rejection.keep_from(work_.data(), count_, edge);
    for (std::size_t i = count_; surplus > 0 && i-- > 0;)
        if (work_[i] == edge) work_[i] = 0.0f, --surplus;
}

// weights · (2^40 / mass), in fp32; false where there is no mass.
bool TargetRow::normalise(bool summed) {
    std::int64_t total = 0;
    if (dense_) {
        if (!summed) block_masses(*tier_, dense_, nullptr, count_, masses_);
        total = sum(masses_);
    } else {
        for (float weight : weights_) total += fixed_point(weight);
    }
    if (total == 0) return false;
    factor_ = static_cast<float>(0x1p40 / static_cast<double>(total));
    return true;
}

void TargetRow::settle() {
    if (factor_ == 1.0f) return;
    float* weights = dense_ ? work_.data() : weights_.data();
    tier_->rejection.scale(weights, dense_ ? count_ : weights_.size(), factor_);
    factor_ = 1.0f;
}

}  // namespace halfbyte
