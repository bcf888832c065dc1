// A persistent pool for work measured in microseconds.
//
// `run(chunks, fn)` splits work into chunks that threads claim one by one from an atomic ticket; the caller takes part and
// waits only for chunks that were claimed, never for a worker that has not woken up. So a core taken by somebody else's
// spinning thread (OpenMP's, say) slows a call down by its share of the work and no more.
// Workers spin for SPIN_MICROSECONDS after the last work, then sleep.
#pragma once

#include <functional>

#include "team.hpp"

namespace halfbyte {

class ThreadPool {
   public:
    // The process's pool. A child of fork() gets a new one: threads do not survive a fork.
    static ThreadPool& instance();

    // Threads that work on a call, the caller included; at least 1. Takes effect with the next call.
    void set_threads(int threads);
    int threads() const;

    // Call fn(chunk) for every chunk in [0, chunks), in any order, and return when all have returned. A call made while
    // another thread's is running, or from inside one, runs in the caller alone. fn must not throw.
    void run(int chunks, const std::function<void(int)>& fn);

    // Call fn(team, id) once on each of threads() threads, all at the same time. Where `run` would have worked alone, the team
    // is the caller.
    void run_team(const std::function<void(Team&, int)>& fn);

   private:
    ThreadPool();
    struct State;
    State* state_;  // never freed: workers may outlive static destruction
};

}  // namespace halfbyte
