// The place of each row's largest element.
//
//   name    shape   dtype     access
//   x       [M, N]  float32   read
//   places  [M]     int64     written: the first of equals; -1 if the row holds NaN, or if its largest is infinite
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace kvb {
namespace {

// Only the block that holds the largest element is searched for its place.
constexpr int64_t kBlock = 64 * kLanes;
// Below this many elements waking the other threads costs more than it saves.
constexpr int64_t kSerialElements = 1 << 15;

// The largest of n elements; NaN if one of them is.
float largest(const float* x, int64_t n) {
  Vec most = splat(-INFINITY);
  VecI nan{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    most = v > most ? v : most;
    nan |= v != v;
  }
  float result = -INFINITY;
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    result = std::max(result, most[lane]);
    has_nan |= nan[lane] != 0;
  }
  for (; i < n; ++i) {
    result = std::max(result, x[i]);
    has_nan |= x[i] != x[i];
  }
  return has_nan ? NAN : result;
}

int64_t argmax(const float* x, int64_t n) {
  int64_t block = 0;
  float peak = -INFINITY;
  for (int64_t i = 0; i < n; i += kBlock) {
    const float most = largest(x + i, std::min(kBlock, n - i));
    if (std::isnan(most)) return -1;
    if (most > peak) peak = most, block = i;
  }
  return std::isinf(peak) ? -1 : std::find(x + block, x + n, peak) - x;
}

}  // namespace
}  // namespace kvb

extern "C" void kvb_argmax(const float* x, int64_t rows, int64_t columns, int64_t* places) {
#pragma omp parallel for schedule(dynamic) if (rows * columns > kvb::kSerialElements)
  for (int64_t r = 0; r < rows; ++r) places[r] = kvb::argmax(x + r * columns, columns);
}
