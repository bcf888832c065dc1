// Where the time of a step goes: each part's seconds as the first thread of the team sees them, waiting for the others included.
#pragma once

#include <array>
#include <chrono>

namespace halfbyte {

class StepProfile {
   public:
    // In the order of a layer. The inputs of a product are prepared by every thread where there are one or two rows.
    enum Part {
        embedding, qkv_input, qkv, keys, attention, output_input, output, gate_up_input, gate_up, down_input, down,
        head_input, head, PARTS
    };
    static constexpr const char* NAMES[PARTS] = {
        "embedding", "qkv_input", "qkv", "keys", "attention", "output_input", "output", "gate_up_input", "gate_up",
        "down_input", "down", "head_input", "head"};

    void begin() { last_ = Clock::now(); }
    // What has passed since the last call was part of `part`.
    void lap(Part part) {
        const auto now = Clock::now();
        seconds_[part] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }
    double seconds(Part part) const { return seconds_[part]; }

   private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point last_{};
    std::array<double, PARTS> seconds_{};
};

}  // namespace halfbyte
