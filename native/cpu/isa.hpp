// Which tiers this CPU, its operating system and this build have between them.
#pragma once

#include <string>
#include <vector>

#include "w4.hpp"

namespace halfbyte {

// Fastest first; `portable` is always last. Asked once: in a virtual machine CPUID takes microseconds.
const std::vector<const Tier*>& available_tiers();

// Whether this CPU has the instruction of the tier's `bf16_dots`.
bool has_bf16(const Tier& tier);

// Every tier by name, whether or not this build and this CPU have it.
std::vector<std::string> known_tiers();

}  // namespace halfbyte
