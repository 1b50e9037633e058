// A dense layer as part of a parallel region, so that several steps can share one: linear.cpp and mlp.cpp.
#pragma once
#include "packing.h"
#include "shares.h"

namespace kvb {

// Blocking for large M: rows are packed and multiplied in blocks that stay in a thread's L2 cache, but of no fewer rows
// than it takes to hide the reading of the weights.
constexpr int64_t kRowBytes = 512 * 1024;
constexpr int64_t kFewestTiles = 2, kMostTiles = 12;
// Below this many multiply-adds waking the other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 18;

// Packed weights [panels * kPanel, K], divided by `scale`.
template <class C>
struct Dense {
  const typename C::Element* packed;
  float scale;
  int64_t k, panels;

  int64_t width() const { return padded_k<C>(k); }
  int64_t work(int64_t rows) const { return rows * width() * panels * kPanel; }
};

struct DenseScratch {
  Workspace rows, sums;

  static DenseScratch& of_thread() {
    static thread_local DenseScratch scratch;
    return scratch;
  }
};

// The calling thread's part of the products of x [m, K] with the weights. Panels are taken in sets of kSet, and
// store(row, panel, sums, stride) gets the finished sums of one row: those of panel + p at sums + p * stride.
template <int64_t kSet, class C, class Store>
static void multiply_part(Shares& shares, const float* x, int64_t x_stride, int64_t m, const Dense<C>& w, Store store) {
  using Row = typename C::Row;
  DenseScratch& scratch = DenseScratch::of_thread();
  const int64_t width = w.width(), row_width = packed_width<C>(width), sets = w.panels / kSet;
  const int64_t fitting = kRowBytes / (row_width * static_cast<int64_t>(sizeof(Row))) / kMaxRows;
  const int64_t row_blocks = ceil_div(m, std::clamp(fitting, kFewestTiles, kMostTiles) * kMaxRows);
  const auto first_row = [&](int64_t row_block) { return m * row_block / row_blocks; };
  int64_t packed_block = -1;
  shares.take(row_blocks * sets, [&](int64_t unit) {
    const int64_t row_block = unit / sets, panel = unit % sets * kSet;
    const int64_t first = first_row(row_block), rows = first_row(row_block + 1) - first;
    const Tiles tiles(rows);
    Row* row = scratch.rows.get<Row>(rows * row_width);
    float* sums = scratch.sums.get<float>(kSet * rows * kPanel);
    if (packed_block != row_block)
      pack_rows<C>(tiles, [&](int64_t r) { return x + (first + r) * x_stride; }, w.k, w.scale, row);
    packed_block = row_block;
    for (int64_t p = 0; p < kSet; ++p)
      multiply<C>(tiles, row, row_width, w.packed + (panel + p) * width * kPanel, width, sums + p * rows * kPanel);
    for (int64_t r = 0; r < rows; ++r) store(first + r, panel, sums + r * kPanel, rows * kPanel);
  });
}

}  // namespace kvb
