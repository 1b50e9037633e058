// Counters in memory that processes share: each process raises its own, and waits for those of the others.
//
// name          shape            dtype               use
// counters      [n, 8]           uint64              a cache line each, of which the first element counts
//
// What a process wrote before it raised its counter is seen by those that waited for that.
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kStride = 8;
constexpr int64_t kMicrosecond = 1000;
// Others that work at the same thing come within this time; to hand the core to them would take longer.
constexpr int64_t kSpin = 50 * kMicrosecond;
// And within this time what comes after a step.
constexpr int64_t kYield = 2000 * kMicrosecond;
constexpr int64_t kLongestSleep = 1000 * kMicrosecond;

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000 * 1000 * kMicrosecond + time.tv_nsec;
}

bool all_reached(const uint64_t* counters, int64_t n, uint64_t value) {
  for (int64_t i = 0; i < n; ++i)
    if (__atomic_load_n(counters + i * kStride, __ATOMIC_ACQUIRE) < value) return false;
  return true;
}

}  // namespace

extern "C" void kvb_raise_counter(uint64_t* counters, int64_t own, uint64_t value) {
  __atomic_store_n(counters + own * kStride, value, __ATOMIC_RELEASE);
}

// Whether all counters reach the value within so many nanoseconds.
extern "C" int kvb_wait_for_counters(const uint64_t* counters, int64_t n, uint64_t value, int64_t nanoseconds) {
  const int64_t begin = now();
  while (!all_reached(counters, n, value)) {
    const int64_t waited = now() - begin;
    if (waited > nanoseconds) return 0;
    if (waited < kSpin) continue;
    if (waited < kYield) {
      sched_yield();
      continue;
    }
    const timespec sleep{0, std::min(kLongestSleep, waited / 20)};
    nanosleep(&sleep, nullptr);
  }
  return 1;
}
