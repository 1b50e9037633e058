// How the threads of a parallel region share out its work.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace kvb {

// Who does what of units [0, n). A thread takes its own share from front to back, so that it streams memory that lies
// together, and then helps others with theirs: cores are rarely all free all the time, a server's event loop runs on one.
// To be made before the parallel region; there is no barrier at the end.
class Shares {
 public:
  Shares() : taken_(omp_get_max_threads()) {}

  // Calls run(unit) for units that no other thread takes, until none is left.
  template <class Run>
  void take(int64_t units, Run run) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t owner = (thread + i) % threads;
      const int64_t begin = units * owner / threads, end = units * (owner + 1) / threads;
      for (int64_t unit; (unit = begin + taken_[owner].units.fetch_add(1, std::memory_order_relaxed)) < end;) run(unit);
    }
  }

 private:
  struct alignas(64) Taken {
    std::atomic<int64_t> units{0};
  };
  std::vector<Taken> taken_;
};

}  // namespace kvb
