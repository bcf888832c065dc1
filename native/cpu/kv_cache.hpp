// Keys and values of some sequences, and where each position stands.
//
// For each layer, sequence and key-value head there are `slots` positions (a multiple of 16) of head_dim numbers, fp16 or int8:
//
//     keys[s / 16][d][s % 16]             sixteen positions side by side: scores need no horizontal sums
//     values[s][d]
//     key_scales[s], value_scales[s]      float32, with int8 only: a number is scale · code, scale = max|x| / 127
//
// Position p stands in slot p % slots. A layer that attends to all positions has a slot for each. One with a sliding window has a
// ring, whose slots are a multiple of SPAN, so that a span lies in one piece, and at least SLACK more than the window: a pass
// writes the keys of all its rows before the first of them attends, and a rollback goes back to rows whose window reaches
// further back than the last one's did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.hpp"

namespace halfbyte {

// Rows of a sequence that may go through the layers together, and tokens a rollback may always go back by.
constexpr int SLACK = 256;

// Keys and values of one head of one sequence in one layer.
struct KvHead {
    std::uint8_t *keys, *values;
    float *key_scales, *value_scales;  // with int8 only
};

// Untouched pages cost nothing. A small cache asks for huge ones.
class KvCache {
   public:
    // windows: of each layer, in positions; 0 for all. Throws std::invalid_argument or std::bad_alloc.
    KvCache(const std::vector<int>& windows, int sequences, int kv_heads, int head_dim, int capacity, CacheType type);
    ~KvCache();
    KvCache(const KvCache&) = delete;
    KvCache& operator=(const KvCache&) = delete;

    int layers() const { return static_cast<int>(places_.size()); }
    int sequences() const { return sequences_; }
    int capacity() const { return capacity_; }
    int kv_heads() const { return kv_heads_; }
    int head_dim() const { return head_dim_; }
    CacheType type() const { return type_; }
    std::size_t number_bytes() const { return type_ == CacheType::int8 ? sizeof(std::int8_t) : sizeof(std::uint16_t); }
    std::size_t nbytes() const { return nbytes_; }
    int slots(int layer) const { return places_[layer].slots; }
    // Whether a layer's slots suffice for a window.
    bool holds(int layer, int window) const;
    // Tokens a sequence can go back by and find all that its windows still need.
    int rollback() const { return rollback_; }
    KvHead head(int layer, int sequence, int head) const;

   private:
    struct Place {
        std::size_t start;  // bytes
        int slots;
    };
    std::size_t head_bytes(int slots) const;
    int sequences_, kv_heads_, head_dim_, capacity_, rollback_;
    CacheType type_;
    std::vector<Place> places_;
    std::size_t nbytes_ = 0;
    std::uint8_t* data_;
};

}  // namespace halfbyte
