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
constexpr std::size_t READ_STEP = 256;
constexpr int MOST_PASSES = 1 << 24;

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
            if (tier_.read(memory_.get() + chunk * CHUNK, CHUNK, 1) < 0.0f) sink.fetch_add(1);
        });
    });
}

double measure_read(const Tier& tier, std::size_t nbytes, double seconds) {
    const std::size_t size = std::max<std::size_t>(1, nbytes / READ_STEP) * READ_STEP;
    const int threads = ThreadPool::instance().threads();
    std::vector<std::shared_ptr<std::uint8_t>> memory(static_cast<std::size_t>(threads));
    for (auto& own : memory) own = weight_memory(size);
    std::atomic<int> sink{0};
    std::vector<double> times(memory.size());
    const auto read = [&](int passes) {
        std::fill(times.begin(), times.end(), 0.0);
        ThreadPool::instance().run_team([&](Team& team, int id) {
            const auto thread = static_cast<std::size_t>(id);
            team.barrier();
            times[thread] = seconds_of([&] {
                if (tier.read(memory[thread].get(), size, passes) < 0.0f) sink.fetch_add(1);
            });
        });
        return *std::max_element(times.begin(), times.end());
    };
    ThreadPool::instance().run_team([&](Team&, int id) { std::memset(memory[static_cast<std::size_t>(id)].get(), 1, size); });
    int passes = 1;
    while (read(passes) < seconds && passes < MOST_PASSES) passes *= 2;
    double best = read(passes);
    for (int i = 1; i < 3; ++i) best = std::min(best, read(passes));
    const auto working = std::count_if(times.begin(), times.end(), [](double time) { return time > 0.0; });
    return static_cast<double>(size) * passes * static_cast<double>(working) / best;
}

double measure_peak(PeakLoop loop) {
    constexpr std::int64_t STEPS = 2'000'000;
    const int threads = ThreadPool::instance().threads();
    std::vector<float> sinks(static_cast<std::size_t>(threads) * 16);
    double best = 0.0;
    for (int i = 0; i < 3; ++i) {
        std::atomic<std::int64_t> total{0};
        const double seconds = seconds_of([&] {
            ThreadPool::instance().run(threads, [&](int chunk) {
                total.fetch_add(static_cast<std::int64_t>(loop(STEPS, &sinks[static_cast<std::size_t>(chunk) * 16])));
            });
        });
        best = std::max(best, static_cast<double>(total.load()) / seconds);
    }
    return best;
}

}  // namespace halfbyte
