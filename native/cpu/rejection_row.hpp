// One row of target probabilities or logits after temperature, top-k, top-p and min-p.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "rejection.hpp"

namespace halfbyte {

inline std::int64_t fixed_point(float weight) { return std::llrint(static_cast<double>(weight) * 0x1p40); }
// Floating-point comparisons are false for a NaN.
inline bool is_probability(float value) { return value >= 0.0f && value <= RejectionMath::MOST; }

// Masses of the blocks of max(p - q, 0), by all threads where the row is long and they are free; false as for
// RejectionMath::masses.
bool block_masses(const Tier& tier, const float* p, const float* q, std::size_t count, std::vector<std::int64_t>& masses);

// Dense where every token may be left, a list of ids where top-k or temperature 0 leaves a few. Its memory is kept from row to
// row: one of these belongs to a thread.
class TargetRow {
   public:
    // settings: four doubles, or null if there is nothing to do, and then nothing is looked at.
    RejectionFault prepare(const Tier& tier, const float* row, std::size_t count, bool logits, const double* settings);

    float at(std::int64_t id) const;
    // Must be called before the weights are looked at: rows whose draft stands do without it.
    void settle();
    bool checked() const { return checked_; }       // whether all values have been looked at
    const float* dense() const { return dense_; }   // null: the lists are the distribution
    const std::vector<std::int32_t>& ids() const { return ids_; }      // ascending
    const std::vector<float>& weights() const { return weights_; }

   private:
    RejectionFault check_probabilities(const float* row);
    RejectionFault start_scores(const float* logits, float temperature);
    void take_the_highest(const float* row);
    void gather_top_k(const float* values, std::size_t k);
    float kth_largest(const float* values, std::size_t k);
    void filter_list(double top_p, float least);
    bool filter_dense(double top_p, float least);
    void keep_nucleus(double limit, float cut);
    bool normalise(bool summed);

    const Tier* tier_ = nullptr;
    std::size_t count_ = 0;
    float highest_ = 0.0f, factor_ = 1.0f;  // factor: what the weights are still to be multiplied by
    bool checked_ = false;
    const float* dense_ = nullptr;
    std::vector<std::int32_t> ids_, order_;
    std::vector<float> weights_, work_, copy_, maxima_;
    std::vector<std::int64_t> masses_, histogram_;
};

}  // namespace halfbyte
