// What this machine can do at most: the two numbers every speed is held against.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "w4.hpp"

namespace halfbyte {

// A buffer of about `nbytes`, placed as weights are, that the pool's threads read together.
class ReadProbe {
   public:
    ReadProbe(const Tier& tier, std::size_t nbytes);
    double seconds();  // of one pass; the first finds the buffer in no cache, or in one that is too small
    std::size_t nbytes() const { return nbytes_; }

   private:
    const Tier& tier_;
    std::size_t nbytes_;
    std::shared_ptr<std::uint8_t> memory_;
};

// Bytes per second that so many threads together read, each from `nbytes` of its own, for at least `seconds`; the best of three
// times. From the second pass on they are in the cache they fit.
double measure_read(const Tier& tier, std::size_t nbytes, double seconds);

// Operations per second of one of a tier's loops, all of the pool's threads together; a multiply-add is two.
double measure_peak(PeakLoop loop);

}  // namespace halfbyte
