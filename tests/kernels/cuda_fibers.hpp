// Threads as fibers: who runs when, what is checked, and what the lanes of a warp do together. See cuda_machine.hpp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};

namespace halfbyte {

using u32 = unsigned;

namespace machine {

constexpr int LANES = 32, BANKS = 32;
constexpr size_t STACK = 64 << 10;

struct Tensor {
    const char* begin;
    size_t bytes;
    bool writable;
};
struct Copy {
    char* to;
    const char* from;
    int bytes;  // from memory; the rest is zero
    int size;
};
enum class State { READY, BARRIER, COLLECTIVE, DONE };

struct Thread {
    ucontext_t context;
    jmp_buf jump;
    bool started = false;
    State state = State::READY;
    int index, block;
    const char* operation = nullptr;        // of the warp
    void (*together)(Thread**) = nullptr;  // what the lanes compute at it; null: nothing
    unsigned long long word;                // what it takes and gives, where that is a word a lane
    u32 in[6];
    float* sums;
    u32 out;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
    std::vector<std::pair<uint32_t, int>> loads;  // address and bytes of each load from shared memory, for bank conflicts
};

struct Machine {
    std::vector<Tensor> tensors;
    std::vector<std::vector<char>> shared;
    std::vector<std::unique_ptr<Thread>> threads;
    std::unique_ptr<char[]> stacks;
    std::function<void()> kernel;
    std::string error;
    int blocks = 0, block_threads = 0;
    int resident = 0;  // blocks that are on it at once; 0: all
    Thread* current = nullptr;
    jmp_buf scheduler;
    std::mt19937 random;
    long long mma = 0, shared_loads = 0, bank_conflicts = 0, waits = 0;
};
inline Machine* gpu = nullptr;

inline void fail(const std::string& what) {
    const Thread& thread = *gpu->current;
    if (gpu->error.empty()) {
        gpu->error = what + " (block " + std::to_string(thread.block) + ", thread " + std::to_string(thread.index) + ")";
    }
    longjmp(gpu->scheduler, 2);
}

// Back to the scheduler, until the thread is chosen again.
inline void yield(State state) {
    Thread& self = *gpu->current;
    self.state = state;
    if (!setjmp(self.jump)) longjmp(gpu->scheduler, 1);
}

inline void check_global(const void* at, int bytes, bool write) {
    const char* address = static_cast<const char*>(at);
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("an address that is no multiple of its " + std::to_string(bytes) + " bytes");
    for (const Tensor& tensor : gpu->tensors) {
        if (address >= tensor.begin && address + bytes <= tensor.begin + tensor.bytes) {
            if (write && !tensor.writable) fail("a write to what is for reading only");
            return;
        }
    }
    fail(write ? "a write outside of every tensor" : "a read outside of every tensor");
}

inline uint32_t shared_address(const void* at, int bytes) {
    std::vector<char>& memory = gpu->shared[gpu->current->block];
    const ptrdiff_t offset = static_cast<const char*>(at) - memory.data();
    if (offset < 0 || offset + bytes > static_cast<ptrdiff_t>(memory.size())) fail("an address outside of shared memory");
    if (offset % bytes) fail("a shared address that is no multiple of its " + std::to_string(bytes) + " bytes");
    return static_cast<uint32_t>(offset);
}

inline void trampoline() {
    gpu->kernel();
    gpu->current->state = State::DONE;
    longjmp(gpu->scheduler, 1);
}

inline void resume(Thread& thread) {
    gpu->current = &thread;
    const int back = setjmp(gpu->scheduler);
    if (back == 2) throw std::runtime_error(gpu->error);
    if (back == 1) return;
    if (thread.started) longjmp(thread.jump, 1);
    thread.started = true;
    setcontext(&thread.context);
}

inline float half_to_float(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}
inline uint16_t float_to_half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float bfloat_to_float(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline uint16_t float_to_bfloat(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (std::isnan(value)) return 0x7FFF;
    return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}
// Exact in double, and rounded once: a + b · c of such short numbers needs less than 53 bits, or is far from a tie.
inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
    const double exact = static_cast<double>(half_to_float(a)) * half_to_float(b) + half_to_float(c);
    const _Float16 half = static_cast<_Float16>(exact);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline uint16_t bfloat_fma(uint16_t a, uint16_t b, uint16_t c) {
    return float_to_bfloat(bfloat_to_float(a) * bfloat_to_float(b) + bfloat_to_float(c));
}

inline float element(u32 pair, int which, bool bfloat) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
    return bfloat ? bfloat_to_float(bits) : half_to_float(bits);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type", as written there: group = lane >> 2, in_group
// = lane % 4.
template <bool bfloat>
void run_mma(Thread** warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < 8; ++i) {
            const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
            const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            a[row][column] = element(warp[lane]->in[i / 2], i % 2, bfloat);
        }
        for (int i = 0; i < 4; ++i) {
            const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
            b[row][group] = element(warp[lane]->in[4 + i / 2], i % 2, bfloat);
        }
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
            double sum = warp[lane]->sums[i];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            warp[lane]->sums[i] = static_cast<float>(sum);
        }
    }
    ++gpu->mma;
}

// PTX ISA, "movmatrix": a lane holds elements 2·(lane % 4) and the next of row lane / 4, before and after.
inline void run_transpose(Thread** warp) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < LANES; ++lane) {
        for (int i = 0; i < 2; ++i) matrix[lane / 4][lane % 4 * 2 + i] = static_cast<uint16_t>(warp[lane]->in[0] >> 16 * i);
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        warp[lane]->out = matrix[column][row] | static_cast<u32>(matrix[column + 1][row]) << 16;
    }
}

inline void run_shuffle(Thread** warp) {
    for (int lane = 0; lane < LANES; ++lane) warp[lane]->out = warp[lane ^ (warp[lane]->in[1] % LANES)]->in[0];
}

inline void run_collective(Thread** warp) {
    const std::string operation = warp[0]->operation;
    for (int lane = 1; lane < LANES; ++lane) {
        if (operation != warp[lane]->operation) {
            gpu->current = warp[lane];
            gpu->error = "lanes of a warp at different operations: " + operation + " and " + warp[lane]->operation;
            throw std::runtime_error(gpu->error);
        }
    }
    if (warp[0]->together) warp[0]->together(warp);
    for (int lane = 0; lane < LANES; ++lane) warp[lane]->state = State::READY;
}

// Loads are served 128 bytes at a time: 32 lanes of 4 bytes, 8 of 16. A pass more for each further word that a bank is
// asked for.
inline void count_conflicts(Thread** warp) {
    for (int lane = 1; lane < LANES; ++lane) {
        if (warp[lane]->loads.size() != warp[0]->loads.size()) {
            throw std::runtime_error("lanes of a warp made different numbers of loads from shared memory");
        }
    }
    for (size_t i = 0; i < warp[0]->loads.size(); ++i) {
        const int bytes = warp[0]->loads[i].second, together = 128 / bytes > LANES ? LANES : 128 / bytes;
        for (int first = 0; first < LANES; first += together) {
            std::vector<std::vector<uint32_t>> banks(BANKS);
            size_t passes = 1;
            for (int lane = first; lane < first + together; ++lane) {
                for (int word = 0; word < bytes / 4; ++word) {
                    const uint32_t at = warp[lane]->loads[i].first / 4 + word;
                    std::vector<uint32_t>& bank = banks[at % BANKS];
                    bool known = false;
                    for (uint32_t other : bank) known |= other == at;
                    if (!known) bank.push_back(at);
                    if (bank.size() > passes) passes = bank.size();
                }
            }
            ++gpu->shared_loads;
            gpu->bank_conflicts += static_cast<long long>(passes) - 1;
        }
    }
    for (int lane = 0; lane < LANES; ++lane) warp[lane]->loads.clear();
}

// Lanes do not go in step: every second time only some of them get a turn.
inline void run_warp(Thread** warp) {
    const bool upwards = gpu->random() % 2;
    const int turns = gpu->random() % 2 ? LANES : 1 + static_cast<int>(gpu->random() % LANES);
    for (int i = 0; i < turns; ++i) {
        Thread& thread = *warp[upwards ? i : LANES - 1 - i];
        if (thread.state == State::READY) resume(thread);
    }
    int collective = 0, done = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        collective += warp[lane]->state == State::COLLECTIVE;
        done += warp[lane]->state == State::DONE;
    }
    if (collective && done) throw std::runtime_error("a lane ended while others of its warp wait for it");
    if (collective == LANES) run_collective(warp);
}

inline void release_barrier(int block) {
    std::unique_ptr<Thread>* first = &gpu->threads[static_cast<size_t>(block) * gpu->block_threads];
    int waiting = 0, done = 0;
    for (int i = 0; i < gpu->block_threads; ++i) {
        waiting += first[i]->state == State::BARRIER;
        done += first[i]->state == State::DONE;
    }
    if (waiting && done) throw std::runtime_error("a thread ended while others of its block wait at a barrier");
    if (waiting < gpu->block_threads) return;
    for (int i = 0; i < gpu->block_threads; ++i) first[i]->state = State::READY;
    for (int i = 0; i < gpu->block_threads; i += LANES) {
        Thread* warp[LANES];
        for (int lane = 0; lane < LANES; ++lane) warp[lane] = first[i + lane].get();
        count_conflicts(warp);
    }
}

// Blocks come in any order, and none before there is room.
struct Queue {
    std::vector<int> waiting;
    std::vector<int> warps_left;  // of each block
    std::vector<int>& live;

    explicit Queue(std::vector<int>& live) : live(live) {
        const int warps = gpu->block_threads / LANES;
        for (int block = 0; block < gpu->blocks; ++block) waiting.push_back(block), warps_left.push_back(warps);
        if (gpu->resident) std::shuffle(waiting.begin(), waiting.end(), gpu->random);
        const int room = gpu->resident ? gpu->resident : gpu->blocks;
        for (int i = 0; i < room && !waiting.empty(); ++i) start();
    }
    void start() {
        const int warps = gpu->block_threads / LANES;
        for (int warp = 0; warp < warps; ++warp) live.push_back(waiting.back() * warps + warp);
        waiting.pop_back();
    }
    void end_warp(int block) {
        if (--warps_left[block] == 0 && !waiting.empty()) start();
    }
};

inline void run_all() {
    std::vector<int> live;
    Queue queue(live);
    long long idle = 0;
    while (!live.empty()) {
        const size_t pick = gpu->random() % live.size();
        Thread* warp[LANES];
        bool ready = false, done = true;
        for (int lane = 0; lane < LANES; ++lane) {
            warp[lane] = gpu->threads[static_cast<size_t>(live[pick]) * LANES + lane].get();
            ready |= warp[lane]->state == State::READY;
        }
        if (!ready) {
            if (++idle > 1000LL * static_cast<long long>(live.size())) throw std::runtime_error("every warp waits");
            continue;
        }
        if (gpu->waits > 10'000'000) throw std::runtime_error("a flag is waited for that nobody raises");
        idle = 0;
        run_warp(warp);
        bool arrived = false;
        for (int lane = 0; lane < LANES; ++lane) arrived |= warp[lane]->state == State::BARRIER || warp[lane]->state == State::DONE;
        if (arrived) release_barrier(warp[0]->block);
        for (int lane = 0; lane < LANES; ++lane) done &= warp[lane]->state == State::DONE;
        if (done) {
            count_conflicts(warp);
            live[pick] = live.back();
            live.pop_back();
            queue.end_warp(warp[0]->block);
        }
    }
}

// Runs a kernel. Throws what went wrong.
inline void launch(Machine& machine, int blocks, int threads, size_t shared_bytes, unsigned seed, std::function<void()> kernel) {
    gpu = &machine;
    machine.blocks = blocks;
    machine.block_threads = threads;
    machine.kernel = std::move(kernel);
    machine.random.seed(seed);
    machine.shared.assign(blocks, std::vector<char>(shared_bytes, static_cast<char>(0xFF)));
    machine.stacks.reset(new char[STACK * blocks * threads]);  // touched only as far as it is used
    for (int i = 0; i < blocks * threads; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->index = i % threads;
        thread->block = i / threads;
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = machine.stacks.get() + STACK * i;
        thread->context.uc_stack.ss_size = STACK;
        thread->context.uc_link = nullptr;
        makecontext(&thread->context, trampoline, 0);
        machine.threads.push_back(std::move(thread));
    }
    run_all();
}

inline void collective(const char* operation, void (*together)(Thread**) = nullptr) {
    gpu->current->operation = operation;
    gpu->current->together = together;
    yield(State::COLLECTIVE);
}

inline void begin_copy(void* to, const void* from, int bytes, bool valid) {
    shared_address(to, bytes);
    if (valid) check_global(from, bytes, false);
    std::memset(to, 0xFF, bytes);
    gpu->current->open.push_back({static_cast<char*>(to), static_cast<const char*>(from), valid ? bytes : 0, bytes});
}

}  // namespace machine
}  // namespace halfbyte
