#include "kv_cache.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <stdexcept>

#include "parallel.hpp"

namespace halfbyte {

namespace {

// Heads lie far apart, so that huge pages take memory for positions nobody has reached. Up to here that does not matter.
constexpr std::size_t HUGE_PAGES_UP_TO = std::size_t{64} << 20;

int ring_slots(int window) { return static_cast<int>(round_up(static_cast<std::size_t>(window) + SLACK, SPAN)); }

}  // namespace

KvCache::KvCache(const std::vector<int>& windows, int sequences, int kv_heads, int head_dim, int capacity, CacheType type)
    : sequences_(sequences), kv_heads_(kv_heads), head_dim_(head_dim), type_(type) {
    if (windows.empty() || sequences < 1 || kv_heads < 1 || head_dim < 1 || capacity < 1)
        throw std::invalid_argument("cache: sizes must be positive");
    capacity_ = rollback_ = static_cast<int>(round_up(capacity, KEY_BLOCK));
    for (const int window : windows) {
        if (window < 0) throw std::invalid_argument("cache: windows must not be negative");
        const bool ring = window > 0 && window < capacity_ && ring_slots(window) < capacity_;
        places_.push_back({nbytes_, ring ? ring_slots(window) : capacity_});
        nbytes_ += static_cast<std::size_t>(sequences) * kv_heads * head_bytes(places_.back().slots);
        // The row after a rollback by n still needs the window - 1 positions before it.
        if (ring) rollback_ = std::min(rollback_, places_.back().slots - window + 1);
    }
    void* memory = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (nbytes_ <= HUGE_PAGES_UP_TO) madvise(memory, nbytes_, MADV_HUGEPAGE);  // a wish, as in memory.cpp
#endif
    data_ = static_cast<std::uint8_t*>(memory);
}

KvCache::~KvCache() { munmap(data_, nbytes_); }

std::size_t KvCache::head_bytes(int slots) const {
    const std::size_t numbers = 2 * static_cast<std::size_t>(slots) * head_dim_ * number_bytes();
    return numbers + (type_ == CacheType::int8 ? 2 * sizeof(float) * slots : 0);
}

bool KvCache::holds(int layer, int window) const {
    return slots(layer) == capacity_ || (window > 0 && window <= slots(layer) - SLACK);
}

KvHead KvCache::head(int layer, int sequence, int head) const {
    const Place& place = places_[layer];
    const std::size_t numbers = static_cast<std::size_t>(place.slots) * head_dim_ * number_bytes();
    std::uint8_t* keys = data_ + place.start + (static_cast<std::size_t>(sequence) * kv_heads_ + head) * head_bytes(place.slots);
    auto* scales = reinterpret_cast<float*>(keys + 2 * numbers);
    return {keys, keys + numbers, scales, scales + place.slots};
}

}  // namespace halfbyte
