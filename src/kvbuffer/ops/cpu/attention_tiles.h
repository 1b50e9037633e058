// Attention of some rows to one unit of tokens: scores, online softmax, weighted values.
//
// Every sum runs over one index in ascending order in one accumulator, so that a row's bits do not depend on
// the tile it is in.
#pragma once
#include <algorithm>

#include "paged_kv.h"
#include "vec.h"

namespace kvb {
namespace {

constexpr int kUnit = 64;  // tokens between two updates of the online softmax
constexpr int kUnitVecs = kUnit / kLanes;
constexpr float kLowest = -3e38f;  // a score below all others, finite so that differences are never NaN

// The keys (D, 16) and values (16, D) of one page and key/value head.
template <class E>
struct Page {
  const E *keys, *values;
};

// The pages of one unit, and those of the unit after it.
template <class E>
struct Unit {
  Page<E> page[kUnit / kPage], next[kUnit / kPage];
  int64_t tokens;  // of which exist; slots past them hold anything
};

// With kAhead a tile prefetches the same elements of the next unit: a page is too short a stream for the
// hardware to recognise in time, and few rows compute too little to hide it.
template <bool kAhead, int kRows, int kCols, class E>
void score_tile(const float* q, const Unit<E>& unit, int64_t first_col, int64_t dim, float* scores) {
  const E *keys[kCols], *next[kCols];
  for (int c = 0; c < kCols; ++c) {
    const int64_t token = (first_col + c) * kLanes;
    keys[c] = unit.page[token / kPage].keys + token % kPage;
    next[c] = unit.next[token / kPage].keys + token % kPage;
  }
  Vec acc[kRows][kCols] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vec k[kCols];
    for (int c = 0; c < kCols; ++c) {
      k[c] = load(keys[c] + d * kPage);
      if (kAhead) __builtin_prefetch(next[c] + d * kPage, 0, 2);
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kCols; ++c) acc[r][c] += q[r * dim + d] * k[c];
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) store(scores + r * kUnit + (first_col + c) * kLanes, acc[r][c]);
}

template <bool kAhead, int kRows, int kCols, class E>
void value_tile(const float* weights, const Unit<E>& unit, const float* scale, int64_t dim, int64_t d, float* out) {
  Vec acc[kRows][kCols] = {};
  for (int64_t page = 0; page * kPage < unit.tokens; ++page) {
    const int64_t count = std::min<int64_t>(kPage, unit.tokens - page * kPage);
    for (int64_t t = 0; t < count; ++t) {
      Vec v[kCols];
      for (int c = 0; c < kCols; ++c) v[c] = load(unit.page[page].values + t * dim + d + c * kLanes);
      if (kAhead) __builtin_prefetch(unit.next[page].values + t * dim + d, 0, 2);
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kCols; ++c) acc[r][c] += weights[r * kUnit + page * kPage + t] * v[c];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) {
      float* o = out + r * dim + d + c * kLanes;
      store(o, load(o) * scale[r] + acc[r][c]);
    }
}

template <bool kAhead, int kRows, int kCols, class E>
void score_rows(const float* q, const Unit<E>& unit, int64_t dim, float* scores) {
  const int64_t cols = (unit.tokens + kLanes - 1) / kLanes;  // rounded up to kCols; the surplus is masked
  for (int64_t c = 0; c < cols; c += kCols) score_tile<kAhead, kRows, kCols>(q, unit, c, dim, scores);
}

template <bool kAhead, class E>
void score_unit(const float* q, const Unit<E>& unit, int64_t rows, int64_t dim, float* scores) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) score_rows<kAhead, 8, 2>(q + r * dim, unit, dim, scores + r * kUnit);
  for (; r + 4 <= rows; r += 4) score_rows<kAhead, 4, 2>(q + r * dim, unit, dim, scores + r * kUnit);
  for (; r < rows; ++r) score_rows<kAhead, 1, 4>(q + r * dim, unit, dim, scores + r * kUnit);
}

template <bool kAhead, int kRows, int kCols, class E>
void value_rows(const float* weights, const Unit<E>& unit, const float* scale, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + kCols * kLanes <= dim; d += kCols * kLanes)
    value_tile<kAhead, kRows, kCols>(weights, unit, scale, dim, d, out);
  for (; d < dim; d += kLanes) value_tile<kAhead, kRows, 1>(weights, unit, scale, dim, d, out);
}

template <bool kAhead, class E>
void value_unit(const float* weights, const Unit<E>& unit, const float* scale, int64_t rows, int64_t dim, float* out) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) value_rows<kAhead, 8, 2>(weights + r * kUnit, unit, scale + r, dim, out + r * dim);
  for (; r + 4 <= rows; r += 4) value_rows<kAhead, 4, 2>(weights + r * kUnit, unit, scale + r, dim, out + r * dim);
  for (; r < rows; ++r) value_rows<kAhead, 1, 4>(weights + r * kUnit, unit, scale + r, dim, out + r * dim);
}

static inline float hmax(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// One step of the online softmax, for a row that sees the tokens of the unit whose bits are set in `visible`: its
// scores become weights relative to the new maximum; `scale` takes earlier results from the old maximum to the new.
void softmax_row(float* scores, uint64_t visible, float* max, float* lanes, float* scale) {
  VecI bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  Vec s[kUnitVecs];
  VecI seen[kUnitVecs];
  Vec top = splat(*max);
  for (int c = 0; c < kUnitVecs; ++c) {
    seen[c] = (bit & static_cast<int32_t>(visible >> (c * kLanes) & ((uint64_t{1} << kLanes) - 1))) != 0;
    s[c] = load(scores + c * kLanes);
    s[c] = seen[c] ? s[c] : splat(kLowest);
    top = s[c] > top ? s[c] : top;
  }
  const float new_max = hmax(top);
  *scale = vexp(splat(*max - new_max))[0];
  *max = new_max;
  Vec sum{};
  for (int c = 0; c < kUnitVecs; ++c) {
    const Vec weight = seen[c] ? vexp(s[c] - new_max) : Vec{};
    store(scores + c * kLanes, weight);
    sum += weight;
  }
  store(lanes, load(lanes) * *scale + sum);
}

}  // namespace
}  // namespace kvb
