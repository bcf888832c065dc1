#include "thread_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace halfbyte {

namespace {

constexpr auto SPIN_MICROSECONDS = std::chrono::microseconds(50);
constexpr int MAX_CHUNKS = 1 << 16;
constexpr int SPINS_BEFORE_YIELD = 2000;  // about 30 µs

std::atomic<ThreadPool*> g_pool{nullptr};
std::atomic<int> g_threads{1};  // outlives a fork, unlike the pool

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

// The ticket says what is to be claimed: bits 0-19 next chunk, bits 20-39 number of chunks, bits 40-63 serial number of
// the call. A claim is one fetch_add; its result tells which call it belongs to, and `fn` of that call cannot change
// before the claimed chunk is done. Late claims add at most one a worker, far below 2^20.
struct ThreadPool::State {
    static constexpr int BITS = 20;
    static constexpr std::uint64_t MASK = (std::uint64_t{1} << BITS) - 1;

    std::atomic<std::uint64_t> ticket{0};
    std::atomic<int> done{0};
    const std::function<void(int)>* fn = nullptr;

    std::mutex busy;  // held by the caller of `run`
    std::mutex sleep;
    std::condition_variable wake;
    std::atomic<int> sleeping{0};
    int started = 0;             // workers that exist

    static bool open(std::uint64_t ticket) { return (ticket & MASK) < ((ticket >> BITS) & MASK); }

    // Claim and run chunks until none is left.
    void work() {
        while (open(ticket.load(std::memory_order_relaxed))) {
            const std::uint64_t claim = ticket.fetch_add(1, std::memory_order_acq_rel);
            if (!open(claim)) return;
            (*fn)(static_cast<int>(claim & MASK));
            done.fetch_add(1, std::memory_order_release);
        }
    }

    bool idle(int id) const {
        // Sequentially consistent, so that a worker which has just said that it sleeps cannot have read an older ticket.
        return !open(ticket.load()) || id >= g_threads.load(std::memory_order_relaxed);
    }

    void worker(int id) {
        for (;;) {
            const auto deadline = std::chrono::steady_clock::now() + SPIN_MICROSECONDS;
            while (idle(id)) {
                for (int i = 0; i < 64 && idle(id); ++i) pause();
                if (idle(id) && std::chrono::steady_clock::now() > deadline) {
                    std::unique_lock<std::mutex> lock(sleep);
                    sleeping.fetch_add(1);
                    wake.wait(lock, [&] { return !idle(id); });
                    sleeping.fetch_sub(1);
                }
            }
            work();
        }
    }

    void start_workers() {
        for (const int count = g_threads.load() - 1; started < count; ++started)
            std::thread([this, id = started + 1] { worker(id); }).detach();
    }

    // The caller holds `busy`.
    void share(int chunks, const std::function<void(int)>& task) {
        start_workers();
        publish(chunks, task);
        work();
        // A chunk takes microseconds. If one takes longer, its worker may be waiting for the very core we are spinning on.
        for (int spins = 0; done.load(std::memory_order_acquire) < chunks; ++spins)
            if (spins < SPINS_BEFORE_YIELD) pause();
            else std::this_thread::yield();
    }

    void publish(int chunks, const std::function<void(int)>& task) {
        fn = &task;
        done.store(0, std::memory_order_relaxed);
        const std::uint64_t serial = (ticket.load(std::memory_order_relaxed) >> (2 * BITS)) + 1;
        // Sequentially consistent, as is `sleeping`: either a worker about to sleep sees the ticket, or we see it asleep.
        ticket.store((serial << (2 * BITS)) | (static_cast<std::uint64_t>(chunks) << BITS));
        if (sleeping.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep);
            wake.notify_all();
        }
    }
};

namespace {

// The parent's workers and locks mean nothing here; what they owned is left behind.
void forget_after_fork() { g_pool.store(nullptr); }

}  // namespace

ThreadPool::ThreadPool() : state_(new State) {}

ThreadPool& ThreadPool::instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
    (void)registered;
    ThreadPool* pool = g_pool.load(std::memory_order_acquire);
    if (pool == nullptr) {
        auto* fresh = new ThreadPool;
        if (g_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh->state_;
        delete fresh;
    }
    return *pool;
}

void ThreadPool::set_threads(int threads) { g_threads.store(std::max(1, threads)); }

int ThreadPool::threads() const { return g_threads.load(); }

void ThreadPool::run(int chunks, const std::function<void(int)>& fn) {
    State& state = *state_;
    std::unique_lock<std::mutex> lock(state.busy, std::try_to_lock);
    if (chunks <= 1 || chunks > MAX_CHUNKS || g_threads.load() == 1 || !lock.owns_lock()) {
        for (int chunk = 0; chunk < chunks; ++chunk) fn(chunk);
        return;
    }
    state.share(chunks, fn);
}

void ThreadPool::run_team(const std::function<void(Team&, int)>& fn) {
    State& state = *state_;
    std::unique_lock<std::mutex> lock(state.busy, std::try_to_lock);
    Team team(lock.owns_lock() ? g_threads.load() : 1);
    if (team.size() == 1) return fn(team, 0);
    // A member is one chunk. It ends when all have ended, so no thread can claim two.
    state.share(team.size(), [&](int id) { fn(team, id); });
}

}  // namespace halfbyte
