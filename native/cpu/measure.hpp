// What this machine can do at most: the two numbers every speed is held against.
#pragma once

#include <cstddef>

#include "w4.hpp"

namespace halfbyte {

// Bytes per second read from a buffer of `nbytes` by the pool's threads together; best of `repeats` passes.
double measure_read_bandwidth(const Tier& tier, std::size_t nbytes, int repeats);

// float32 multiply-adds per second × 2, all of the pool's threads together.
double measure_peak_flops(const Tier& tier);

}  // namespace halfbyte
