// Fetching ahead: what a thread's next task reads comes from memory while its present one computes.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kvb {

// Regions of memory that are fetched into the L2 cache a few lines at a time: the task at hand calls `step` once per
// row that it works on, so that requests to memory are spread evenly over its arithmetic. The processor's own
// prefetchers follow a stream only from one load to the next, and stand still while data in the cache is worked on.
class Ahead {
 public:
  void clear() { count_ = next_ = 0, fetches_ = 0, at_ = end_ = nullptr; }

  // Adds a region, of which one line in `sparsity` is fetched: the processor's prefetchers take that as the start of a
  // stream and bring what follows, and fetches hold places that loads need. What does not fit on the list is loaded
  // when it is read.
  void expect(const void* data, int64_t bytes, int sparsity = 1) {
    if (count_ == kRegions || bytes <= 0) return;
    const char* begin = static_cast<const char*>(data);
    regions_[count_++] = {begin, begin + bytes, sparsity * kLine};
    fetches_ += bytes / (sparsity * kLine) + 1;
  }

  // Says in how many steps everything is to be fetched.
  void spread(int64_t steps) {
    const int64_t full = std::max<int64_t>(1, steps - count_);  // a step ends where a region does
    per_step_ = (fetches_ + full - 1) / full;
    next_region();
  }

  // Always inlined: a call in their midst would cost the caller's sums their registers.
  __attribute__((always_inline)) void step() {
    const char *at = at_, *stop = std::min(at + per_step_ * stride_, end_);
    for (; at < stop; at += stride_) __builtin_prefetch(at, 0, 2);
    at_ = at;
    if (at >= end_) next_region();
  }

 private:
  struct Region {
    const char *begin, *end;
    int64_t stride;
  };
  static constexpr int kRegions = 32, kLine = 64;

  __attribute__((always_inline)) void next_region() {
    if (next_ == count_) return;
    const Region& region = regions_[next_++];
    at_ = region.begin, end_ = region.end, stride_ = region.stride;
  }

  Region regions_[kRegions];
  int count_ = 0, next_ = 0;
  int64_t fetches_ = 0, per_step_ = 0, stride_ = kLine;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace kvb
