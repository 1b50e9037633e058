// The largest element of each row: what a greedy request needs of its logits.
//
//   rows  [R, V], row stride given  float32  read
//   best  [R]                       int64    written: the lowest index among the largest elements; -1 where the largest is
//                                            not a finite number, or the row holds NaN
#include "vec.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

static int64_t argmax(const float* row, int64_t n) {
  Vec most = splat(-INFINITY);
  VecI unordered{}, where{}, index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes, index += kLanes) {
    const Vec x = load(row + i);
    const VecI larger = x > most;
    unordered |= x != x;
    most = larger ? x : most;
    where = larger ? index : where;
  }
  float largest = -INFINITY;
  int64_t best = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (unordered[lane]) return -1;
    if (most[lane] > largest || (most[lane] == largest && where[lane] < best)) largest = most[lane], best = where[lane];
  }
  for (; i < n; ++i) {
    if (std::isnan(row[i])) return -1;
    if (row[i] > largest) largest = row[i], best = i;
  }
  return std::isfinite(largest) ? best : -1;
}

}  // namespace
}  // namespace kvb

extern "C" void kvb_argmax(const float* rows, int64_t stride, int64_t count, int64_t n, int64_t* best) {
#pragma omp parallel for schedule(static) if (count > 1)
  for (int64_t r = 0; r < count; ++r) best[r] = kvb::argmax(rows + r * stride, n);
}
