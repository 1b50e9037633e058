// Register-tiled products of several vectors at once with rows of a state or of values, and with keys (verify.cpp).
//
// Every element of a product with rows is one chain of multiply-adds in the order of the rows, whatever the tiles.
#pragma once
#include "states.h"

namespace kvb {
namespace {

// Sums of a tile that fit in the registers beside what they are made from.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileSums = 24;
#else
constexpr int kTileSums = 12;
#endif
// Keys and vectors whose scores are made together: as many as a vector has lanes.
constexpr int kScoreKeys = 4, kScoreVectors = kLanes / kScoreKeys;

// Vectors of K floats in pieces of kLanes, [padded(K) / kLanes, count, kLanes]: a tile of vectors is read at constant
// offsets from one pointer.
struct Vectors {
  float* data;
  int64_t count;

  int64_t piece() const { return count * kLanes; }
  // Elements r to r + kLanes of vector i, r being a multiple of kLanes.
  float* at(int64_t i, int64_t r) const { return data + r * count + i * kLanes; }
  float* element(int64_t i, int64_t r) const { return at(i, r / kLanes * kLanes) + r % kLanes; }
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

// out[i, :] = sum over r < n of x[i][r] * rows[r, :] for NX vectors and NV vectors of columns, a step ahead with each
// row. The sums stay in registers from the first row to the last, so that rows are read once and may lie in the L2 cache.
template <int NX, int NV, class S>
void product_tile(const S* rows, int64_t n, int64_t V, const float* x, int64_t piece, float* out, Ahead& ahead) {
  Vec sums[NX][NV] = {};
  for (int64_t r = 0; r < n; r += kLanes, x += piece)
    for (int64_t k = 0; k < std::min<int64_t>(kLanes, n - r); ++k, rows += V) {
      ahead.step();
      Vec row[NV];
      if constexpr (NV == 1)
        row[0] = load(rows);
      else
#pragma GCC unroll 4
        for (int j = 0; j < NV; j += 2) load_pair(rows + j * kLanes, row[j], row[j + 1]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) row[j] = held(row[j]);
#pragma GCC unroll 16
      for (int i = 0; i < NX; ++i) {
        const Vec element = held(splat(x[i * kLanes + k]));
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sums[i][j] += element * row[j];
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < NX; ++i) {
    if constexpr (NV > 1)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j += 2) in_order<S>(sums[i][j], sums[i][j + 1]);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(out + i * V + j * kLanes, sums[i][j]);
  }
}

// Vectors that are multiplied at once, and vectors of columns at a time for NX of them.
constexpr int kTileVectors = kTileSums / 2;
constexpr int tile_columns(int NX) { return kTileSums / NX >= 8 ? 8 : kTileSums / NX >= 4 ? 4 : 2; }

// out[i, :] = sum over r < n of x[i][r] * rows[r, :] for all vectors; rows [n, V], out [x.count, V].
template <class S>
void all_products(const S* rows, int64_t n, int64_t V, const Vectors& x, float* out, Ahead& ahead) {
  for_groups<kTileVectors>(x.count, [&](int64_t i, auto vectors) {
    constexpr int NX = decltype(vectors)::value, NV = tile_columns(NX);
    auto tile = [&](int64_t c, auto columns) {
      product_tile<NX, decltype(columns)::value>(rows + c, n, V, x.at(i, 0), x.piece(), out + i * V + c, ahead);
    };
    int64_t c = 0;
    for (; c + NV * kLanes <= V; c += NV * kLanes) tile(c, std::integral_constant<int, NV>());
    for (; c < V; c += kLanes) tile(c, std::integral_constant<int, 1>());
  });
}

// Steps ahead of a product of `count` vectors.
int64_t product_steps(int64_t n, int64_t V, int64_t count) {
  int64_t steps = 0;
  for_groups<kTileVectors>(count, [&](int64_t, auto vectors) {
    constexpr int64_t columns = tile_columns(decltype(vectors)::value) * kLanes;
    steps += n * (V / columns + V % columns / kLanes);
  });
  return steps;
}

// out[i, :] = the vectors' products with a state [K, V]. The vectors have the rows' scales in them.
template <class S>
void all_state_products(const State<S>& state, int64_t K, int64_t V, const Vectors& x, float* out, Ahead& ahead) {
#if defined(KVB_INT8_PRODUCTS)
  if constexpr (State<S>::kQuantised)
    if (V % kIntegerColumns == 0 && K <= kIntegerRows)
      return for_groups<kTileVectors>(x.count, [&](int64_t first, auto vectors) {
        constexpr int NX = decltype(vectors)::value;
        int32_t pairs[NX][kIntegerRows / 2];
        float units[NX], *to[NX];
        for (int i = 0; i < NX; ++i) {
          units[i] = quantise_pairs(x.at(first + i, 0), x.piece(), K, pairs[i]);
          to[i] = std::fill_n(out + (first + i) * V, V, 0.f) - V;
        }
        add_integer_products<NX>(state.data, K, V, *pairs, units, to, ahead);
      });
#endif
  all_products(state.data, K, V, x, out, ahead);
}

// Of NX vectors and NY keys, the scores; those of further keys, up to kScoreKeys, become 0.
template <int NX, int NY>
void score_tile(const Vectors& x, int64_t first, const float* keys, int64_t K, const Vectors& scores, int64_t column) {
  Vec sums[NX][NY] = {};
  const float* vectors = x.at(first, 0);
  for (int64_t r = 0; r < K; r += kLanes, vectors += x.piece()) {
    Vec elements[NX];
#pragma GCC unroll 4
    for (int i = 0; i < NX; ++i) elements[i] = held(load(vectors + i * kLanes));
#pragma GCC unroll 4
    for (int j = 0; j < NY; ++j) {
      const Vec key = held(load(keys + j * K + r));
#pragma GCC unroll 4
      for (int i = 0; i < NX; ++i) sums[i][j] += elements[i] * key;
    }
  }
  const Vec all = hsum_each([&](auto lane) {
    constexpr int i = decltype(lane)::value / kScoreKeys, j = decltype(lane)::value % kScoreKeys;
    if constexpr (i < NX && j < NY)
      return sums[i][j];
    else
      return Vec{};
  });
  float lanes[kLanes];
  store(lanes, all);
  float* out = scores.element(first, column);
  for (int i = 0; i < NX; ++i) std::copy_n(lanes + i * kScoreKeys, kScoreKeys, out + i * kLanes);
}

// scores[i][j] = x[i] . keys[j] for n keys; keys [n, K], K being padded.
void score_all(const Vectors& x, const float* keys, int64_t n, int64_t K, const Vectors& scores) {
  for (int64_t j = 0; j < n; j += kScoreKeys)
    with_constant<kScoreKeys>(std::min<int64_t>(n - j, kScoreKeys), [&](auto columns) {
      for_groups<kScoreVectors>(x.count, [&](int64_t i, auto vectors) {
        score_tile<decltype(vectors)::value, decltype(columns)::value>(x, i, keys + j * K, K, scores, j);
      });
    });
}

}  // namespace
}  // namespace kvb
