// Sums over the rows of a matrix: what reading a state or records comes down to. Also rows whose length is no multiple
// of the vector width, and a thread's work space.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "vec.h"

namespace kvb {

// The first n < kLanes elements; the other lanes are zero.
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::copy(p, p + n, lanes);
  return load(lanes);
}

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// f(i, elements i to i + kLanes of p), the last ones filled up with zeros.
template <class T, class F>
inline void for_vectors(const T* p, int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, load(p + i));
  if (i < n) f(i, load_first(p + i, n - i));
}

// a . b of n elements each.
template <class T>
inline float dot(const T* a, const float* b, int64_t n) {
  Vec acc{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) acc += load(a + i) * load(b + i);
  if (i < n) acc += load_first(a + i, n - i) * load_first(b + i, n - i);
  return hsum(acc);
}

// p[i] = exp(p[i]); there is room for padded(n).
static inline void exp_all(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(p + i, vexp(load(p + i)));
}

static inline void multiply(float* x, const float* by, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load(x + i) * load(by + i));
}

// Column blocks that a row of V elements is worked on in: f(first column, number of vectors as a constant).
constexpr int kBlockVecs = kLanes == 16 ? 8 : 4;
template <int kMost = kBlockVecs, class F>
inline void for_column_blocks(int64_t V, F&& f) {
  int64_t c = 0;
  for (; c + kMost * kLanes <= V; c += kMost * kLanes) f(c, std::integral_constant<int, kMost>());
  for (; c + kMost / 2 * kLanes <= V; c += kMost / 2 * kLanes) f(c, std::integral_constant<int, kMost / 2>());
  for (; c < V; c += kLanes) f(c, std::integral_constant<int, 1>());
}

// Whether a row is one block.
static inline bool one_block(int64_t V) {
  return V == kBlockVecs * kLanes || V == kBlockVecs / 2 * kLanes || V == kLanes;
}

// out[x] += sum over r < n of coefficients[x][r] * rows[r], rows being [n, V]: one pass over the rows for all NX sums,
// and a step ahead with each.
template <int NX, class T>
KVB_SINGLE_COPY void add_products(const T* rows, int64_t n, int64_t V, const float* const (&coefficients)[NX],
                                  float* const (&out)[NX], Ahead& ahead) {
  for_column_blocks(V, [&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    const float* by[NX];  // held in registers, as the sums are
#pragma GCC unroll 4
    for (int x = 0; x < NX; ++x) by[x] = coefficients[x];
    Vec acc[NX][NV] = {};
    const T* row = rows + c;
    for (int64_t r = 0; r < n; ++r, row += V) {
      ahead.step();
      Vec factor[NX], elements[NV];
#pragma GCC unroll 4
      for (int x = 0; x < NX; ++x) factor[x] = held(splat(by[x][r]));
      if constexpr (NV == 1)
        elements[0] = load(row);
      else
#pragma GCC unroll 4
        for (int j = 0; j < NV; j += 2) load_pair(row + j * kLanes, elements[j], elements[j + 1]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        const Vec element = held(elements[j]);
#pragma GCC unroll 4
        for (int x = 0; x < NX; ++x) acc[x][j] += factor[x] * element;
      }
    }
#pragma GCC unroll 4
    for (int x = 0; x < NX; ++x) {
      if constexpr (NV > 1)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j += 2) in_order<T>(acc[x][j], acc[x][j + 1]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        float* to = out[x] + c + j * kLanes;
        store(to, load(to) + acc[x][j]);
      }
    }
  });
}

// An array of a thread's work space, grown once and reused; aligned to cache lines.
class Scratch {
 public:
  // Makes room for n floats and returns them, uninitialised.
  float* reserve(int64_t n) {
    const size_t lines = n / 16 + 1;
    if (lines_.size() < lines) lines_.resize(lines);
    return lines_.data()->floats;
  }

 private:
  struct alignas(64) Line {
    float floats[16];
  };
  std::vector<Line> lines_;
};

}  // namespace kvb
