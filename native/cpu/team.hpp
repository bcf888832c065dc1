// Threads that go through a program together: the same phases in the same order, a barrier after each.
//
// A phase is cut into pieces that are claimed one by one, so that a thread that lost its core for a moment does not hold
// up the others for longer than its piece. A barrier costs about 0.2 µs when all run; a waiter spins, then yields its core.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace halfbyte {

class Team {
   public:
    explicit Team(int size) : size_(size) {}

    int size() const { return size_; }

    // fn(begin, end) over [0, units) in pieces of `piece`, by all threads that call; returns when all of it is done.
    template <class Fn>
    void phase(int units, int piece, const Fn& fn) {
        for (;;) {
            const int begin = next_.fetch_add(piece, std::memory_order_relaxed);
            if (begin >= units) break;
            fn(begin, std::min(begin + piece, units));
        }
        barrier();
    }

    // Pieces of `units` that give every thread about four, each a multiple of `multiple`.
    int piece(int units, int multiple = 1) const {
        const int pieces = 4 * size_ * multiple;
        return std::max(1, (units + pieces - 1) / pieces) * multiple;
    }

    void barrier() {
        const std::uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < SPINS_BEFORE_YIELD)
                pause();
            else
                std::this_thread::yield();
        }
    }

   private:
    static constexpr int SPINS_BEFORE_YIELD = 4000;

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    const int size_;
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<std::uint32_t> round_{0};
};

}  // namespace halfbyte
