// The threads of one parallel region, which work off stage after stage of tasks.
//
// A stage ends when its tasks are done, not when all threads have come: on a busy machine one of them may be away for
// milliseconds, and the others go on without it. Back again, it passes over the stages that it missed.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Team {
    // The stage in the upper half, its next task in the lower: a task is only ever taken of the stage one is in.
    alignas(64) std::atomic<uint64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};  // tasks of this stage
};

class Member {
  public:
    explicit Member(Team &team) : team(team) {}

    // work(0), ..., work(tasks - 1), each by one thread; afterwards all see what all of them wrote. Every member comes
    // by the same stages in the same order.
    template <typename WORK> void stage(int64_t tasks, WORK work) {
        if (tasks == 0) return;
        for (int64_t task; (task = take(tasks)) >= 0;) {
            work(task);
            if (team.done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
                team.done.store(0, std::memory_order_relaxed);
                team.next.store((number + 1) << 32, std::memory_order_release);
            }
        }
        for (int turn = 0; team.next.load(std::memory_order_acquire) >> 32 == number; turn++) {
            if (turn < SPINS) pause();
            else std::this_thread::yield();  // whoever has the last task may need this core
        }
        number++;
    }

  private:
    static constexpr int SPINS = 2000;  // 20 to 50 us: later than that is only who has lost its core

    int64_t take(int64_t tasks) {
        uint64_t next = team.next.load(std::memory_order_acquire);
        while (next >> 32 == number && int64_t(next & 0xffffffff) < tasks)
            if (team.next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) return next & 0xffffffff;
        return -1;
    }
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    Team &team;
    uint64_t number = 0;
};

}  // namespace
