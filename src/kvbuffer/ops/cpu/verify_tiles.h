// Register-tiled products of several vectors at once with rows of a state or of values, and with keys (verify.cpp).
//
// Every element of a product with rows is one chain of multiply-adds in the order of the rows, whatever the tiles.
#pragma once
#include "rows.h"

namespace kvb {
namespace {

// Sums of a tile that fit in the registers beside what they are made from.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileSums = 24;
#else
constexpr int kTileSums = 12;
#endif
constexpr int kScoreTile = 4;

// Rows that stay in the L1 cache while all vectors and columns pass over them. Meanwhile as many are fetched for the
// next block.
constexpr int64_t kRowBlockBytes = 8 * 1024;
// Fetches n elements. Always inlined: taken by itself it has no effect that a compiler would see, and is left out.
template <int kWrite, class T>
inline __attribute__((always_inline)) void fetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i, kWrite, 2);
}

// Vectors of K floats in pieces of kLanes, [padded(K) / kLanes, count, kLanes]: a tile of vectors is read at constant
// offsets from one pointer.
struct Vectors {
  float* data;
  int64_t count;

  int64_t piece() const { return count * kLanes; }
  // Elements r to r + kLanes of vector i, r being a multiple of kLanes.
  float* at(int64_t i, int64_t r) const { return data + r * count + i * kLanes; }
};

// Calls f(first, size as a constant) for groups of nearly equal sizes <= kMax that make up 0 to n - 1.
template <int kMax, class F>
inline void with_constant(int64_t n, F&& f) {
  if constexpr (kMax > 1)
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  f(std::integral_constant<int, kMax>());
}
template <int kMax, class F>
inline void for_groups(int64_t n, F&& f) {
  int64_t first = 0;
  for (int64_t groups = (n + kMax - 1) / kMax; groups > 0; --groups) {
    const int64_t size = (n - first) / groups;
    with_constant<kMax>(size, [&](auto constant) { f(first, constant); });
    first += size;
  }
}

// out[i, :] += sum over r < n of x[i][r] * rows[r, :] for NX vectors and NV vectors of columns. The same columns of the
// rows `ahead` elements further on are fetched meanwhile.
template <int NX, int NV, class S>
void product_tile(const S* rows, int64_t n, int64_t V, int64_t ahead, const float* x, int64_t piece, float* out) {
  Vec sums[NX][NV];
#pragma GCC unroll 16
  for (int i = 0; i < NX; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sums[i][j] = load(out + i * V + j * kLanes);
  for (int64_t r = 0; r < n; r += kLanes, x += piece)
    for (int64_t k = 0; k < std::min<int64_t>(kLanes, n - r); ++k, rows += V) {
      fetch<0>(rows + ahead, NV * kLanes);
      Vec row[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) row[j] = load(rows + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < NX; ++i) {
        const Vec element = splat(x[i * kLanes + k]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sums[i][j] += element * row[j];
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < NX; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(out + i * V + j * kLanes, sums[i][j]);
}

// out[i, :] += sum over r < n of x[i][r] * rows[r, :] for vectors begin to end - 1; rows [n, V], out [end - begin, V].
// All rows but the first block are fetched ahead.
template <class S>
void add_all_products(const S* rows, int64_t n, int64_t V, const Vectors& x, int64_t begin, int64_t end, float* out) {
  const int64_t block = padded(std::max<int64_t>(1, kRowBlockBytes / (V * sizeof(S))));
  for (int64_t r = 0; r < n; r += block) {
    const int64_t size = std::min(block, n - r), ahead = r + 2 * block <= n ? block * V : 0;
    for_groups<kTileSums / 2>(end - begin, [&](int64_t i, auto vectors) {
      constexpr int NX = decltype(vectors)::value, kFit = kTileSums / NX, NV = kFit >= 8 ? 8 : kFit >= 4 ? 4 : 2;
      auto tile = [&](int64_t c, auto columns) {
        product_tile<NX, decltype(columns)::value>(rows + r * V + c, size, V, ahead, x.at(begin + i, r), x.piece(),
                                                   out + i * V + c);
      };
      int64_t c = 0;
      for (; c + NV * kLanes <= V; c += NV * kLanes) tile(c, std::integral_constant<int, NV>());
      for (; c < V; c += kLanes) tile(c, std::integral_constant<int, 1>());
    });
  }
}

template <int NX, int NY>
void score_tile(const Vectors& x, int64_t first, const float* keys, int64_t K, const Vectors& scores, int64_t column) {
  Vec sums[NX][NY] = {};
  const float* vectors = x.at(first, 0);
  for (int64_t r = 0; r < K; r += kLanes, vectors += x.piece())
#pragma GCC unroll 4
    for (int j = 0; j < NY; ++j) {
      const Vec key = load(keys + j * K + r);
#pragma GCC unroll 4
      for (int i = 0; i < NX; ++i) sums[i][j] += load(vectors + i * kLanes) * key;
    }
  float* out = scores.at(first, column / kLanes * kLanes) + column % kLanes;
  for (int i = 0; i < NX; ++i)
    for (int j = 0; j < NY; ++j) out[i * kLanes + j] = hsum(sums[i][j]);
}

// scores[i][j] = x[i] . keys[j] for n keys; keys [n, K], K being padded.
void score_all(const Vectors& x, const float* keys, int64_t n, int64_t K, const Vectors& scores) {
  auto tiles = [&](int64_t j, auto columns) {
    for_groups<kScoreTile>(x.count, [&](int64_t i, auto vectors) {
      score_tile<decltype(vectors)::value, decltype(columns)::value>(x, i, keys + j * K, K, scores, j);
    });
  };
  // Tiles begin at multiples of their width, so that none lies across two pieces.
  const int64_t whole = n / kScoreTile * kScoreTile;
  for (int64_t j = 0; j < whole; j += kScoreTile) tiles(j, std::integral_constant<int, kScoreTile>());
  for_groups<kScoreTile>(n - whole, [&](int64_t j, auto columns) { tiles(whole + j, columns); });
}

}  // namespace
}  // namespace kvb
