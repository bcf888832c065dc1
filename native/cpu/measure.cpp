#include "measure.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "memory.hpp"
#include "thread_pool.hpp"

namespace halfbyte {

namespace {

constexpr std::size_t CHUNK = 64 * 1024;

double seconds_of(const std::function<void()>& fn) {
    const auto start = std::chrono::steady_clock::now();
    fn();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

ReadProbe::ReadProbe(const Tier& tier, std::size_t nbytes)
    : tier_(tier), nbytes_(std::max<std::size_t>(1, nbytes / CHUNK) * CHUNK), memory_(weight_memory(nbytes_)) {
    std::memset(memory_.get(), 1, nbytes_);
}

double ReadProbe::seconds() {
    std::atomic<int> sink{0};
    return seconds_of([&] {
        ThreadPool::instance().run(static_cast<int>(nbytes_ / CHUNK), [&](int chunk) {
            if (tier_.read(memory_.get() + chunk * CHUNK, CHUNK) < 0.0f) sink.fetch_add(1);
        });
    });
}

double measure_peak_flops(const Tier& tier) {
    constexpr std::int64_t STEPS = 2'000'000;
    const int threads = ThreadPool::instance().threads();
    std::vector<float> sinks(static_cast<std::size_t>(threads) * 16);
    double flops = 0.0;
    double best = 0.0;
    for (int i = 0; i < 3; ++i) {
        std::atomic<std::int64_t> total{0};
        const double seconds = seconds_of([&] {
            ThreadPool::instance().run(threads, [&](int chunk) {
                total.fetch_add(static_cast<std::int64_t>(tier.fma(STEPS, &sinks[static_cast<std::size_t>(chunk) * 16])));
            });
        });
        flops = static_cast<double>(total.load());
        best = std::max(best, flops / seconds);
    }
    return best;
}

}  // namespace halfbyte
