// Register-tiled products of the small dense matrices of chunked prefill (chunked.cpp), all float32.
//
// Matrices are kept in panels of kPanel columns, [ceil(columns / kPanel), rows, kPanel], zero where padded: a tile
// reads its right operand, and a transposed left operand, at constant offsets from one pointer per matrix. Every output
// is one chain of multiply-adds in ascending order of the inner index, whatever the shapes.
#pragma once
#include <algorithm>
#include <utility>

#include "vec.h"

namespace kvb {
namespace {

constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes;
// Tiles of kTileRows x kPanel sums leave registers for one row of the right operand.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Panels {
  float* data;
  int64_t rows;

  static int64_t size(int64_t rows, int64_t columns) { return rows * ceil_div(columns, kPanel) * kPanel; }
  // Row 0 at `column`; the next row lies kPanel floats behind.
  float* at(int64_t column) const { return data + column / kPanel * rows * kPanel + column % kPanel; }
};

struct Tile {
  Vec x[kTileRows][kPanelVecs] = {};

  void store_to(float* out, int64_t stride) const {
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kPanelVecs; ++v) store(out + r * stride + v * kLanes, x[r][v]);
  }
};

// tile[r] += sum of a[r, i] b[i] over `depth` rows i of the panel b; a's strides are constants so that they become
// offsets of loads. Inlined, the tile stays in registers.
template <int kRowStride, int kDepthStride>
inline __attribute__((always_inline)) void multiply_add(Tile& tile, const float* a, const float* b, int64_t depth) {
  for (int64_t i = 0; i < depth; ++i, a += kDepthStride, b += kPanel) {
    Vec row[kPanelVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v) tile.x[r][v] += a[r * kRowStride] * row[v];
  }
}

// Lanes of the first halves of a and b, or of the second halves, by turns.
#if defined(__clang__)
template <int kFrom, size_t... I>
inline Vec zip(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (kFrom + I / 2 + I % 2 * kLanes)...);
}
#else
template <int kFrom, size_t... I>
inline Vec zip(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shuffle(a, b, VecI{static_cast<int32_t>(kFrom + I / 2 + I % 2 * kLanes)...});
}
#endif

// Each round moves the top bit of the row's number to the end of the lane's, and that one's top bit to the end of the
// row's: after log2(kLanes) rounds the numbers have changed places.
inline void transpose(Vec (&x)[kLanes]) {
  constexpr auto kIndex = std::make_index_sequence<kLanes>();
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = zip<0>(x[i], x[i + kLanes / 2], kIndex);
      y[2 * i + 1] = zip<kLanes / 2>(x[i], x[i + kLanes / 2], kIndex);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// out[c, r] = rows[r, c] for kLanes rows and `columns` columns, both a multiple of kLanes.
inline void transpose_rows(const float* rows, int64_t stride, int64_t columns, float* out, int64_t out_stride) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = load(rows + i * stride + c);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out + (c + i) * out_stride, x[i]);
  }
}

}  // namespace
}  // namespace kvb
